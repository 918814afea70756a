"""Runs that a real Redis hands to real worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.launcher import LaunchRunContext, WorkerStatus
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import ConfigurationError, UnavailableError
from sensor_pipeline.offsets import Batch
from sensor_pipeline.orchestration.config import to_run_config
from sensor_pipeline.orchestration.instance import find_wrong
from sensor_pipeline.orchestration.job import JOB_NAME, build_job
from sensor_pipeline.orchestration.workers import WorkersLauncher
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import BIN, environment, run
from sensor_pipeline_tests.acceptance.test_three_ways import dagster_database
from sensor_pipeline_tests.hosts.redis_server import RedisServer, needs_redis
from sensor_pipeline_tests.kills.test_points import check_end
from sensor_pipeline_tests.orchestration.test_job import publish_some, whole_backlog
from sensor_pipeline_tests.postgres.tables import other_session, sessions, until

__all__ = ["dagster_database"]

pytestmark = [needs_redis, pytest.mark.usefixtures("dagster_database")]

LOST_AFTER = 60


def shipped(name: str) -> str:
    return resources.files("sensor_pipeline.orchestration").joinpath(name).read_text()


class Clock:
    """Goes on by so many seconds whenever it is looked at."""

    STEP = 10.0

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.STEP
        return self.now


class Site:
    """An instance whose runs workers execute, and the workers of this machine."""

    def __init__(self, settings: Settings, home: Path, redis: RedisServer, monkeypatch: Any) -> None:
        self.settings = settings
        self.redis = redis
        self.dagster = replace(settings, postgres_db=f"{settings.postgres_db}_dagster")
        self.home = home
        self.log = home / "worker.log"
        self.env = environment(
            settings,
            DAGSTER_HOME=str(home),
            DAGSTER_POSTGRES_DB=self.dagster.postgres_db,
            CELERY_BROKER_URL=redis.url,
        )
        home.mkdir()
        (home / "dagster.yaml").write_text(shipped("dagster.yaml") + shipped("workers.yaml"))
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)
        self.instance = DagsterInstance.from_config(str(home))
        launcher = self.instance.run_launcher
        assert isinstance(launcher, WorkersLauncher)
        self.launcher = launcher

    @contextmanager
    def worker(self, concurrency: int = 1) -> Iterator[subprocess.Popen[bytes]]:
        """A worker that has said that it is ready; what is left of it after the block is killed."""
        with self.log.open("ab") as log:
            command = [str(BIN / "sensor-pipeline"), "worker", "--concurrency", str(concurrency)]
            process = subprocess.Popen(
                command, env=self.env, cwd=self.home, stdout=log, stderr=log, start_new_session=True
            )
        try:
            until(lambda: process.poll() is not None or self.launcher.workers())
            assert process.poll() is None, self.log.read_text()
            yield process
        finally:
            kill_with_children(process)

    def run_of(self, batch: Batch) -> DagsterRun:
        """A run that is there and not launched."""
        pointer = ModuleCodePointer("sensor_pipeline.orchestration.definitions", "defs", None)
        origin = JobPythonOrigin(JOB_NAME, RepositoryPythonOrigin(sys.executable, pointer))
        return self.instance.create_run_for_job(
            build_job(self.settings), run_config=to_run_config(batch), job_code_origin=origin
        )

    def launch(self, batch: Batch) -> str:
        """Launch a run of a batch as the daemon does; returns its id."""
        run = self.run_of(batch)
        self.instance.launch_run(run.run_id, None)  # type: ignore[arg-type]
        return run.run_id

    def run(self, run_id: str) -> DagsterRun:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def await_end(self, run_id: str) -> DagsterRunStatus:
        return until(lambda: self.run(run_id).is_finished and self.run(run_id).status)

    def said(self, run_id: str) -> str:
        return "\n".join(entry.message or entry.user_message for entry in self.instance.all_logs(run_id))


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """As if the host had lost its power."""
    with suppress(psutil.NoSuchProcess):
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def site(settings: Settings, tmp_path: Path, redis: RedisServer, monkeypatch: Any) -> Iterator[Site]:
    site = Site(settings, tmp_path / "dagster", redis, monkeypatch)
    with site.instance:
        yield site
        for part in (site.instance.run_storage, site.instance.event_log_storage, site.instance.schedule_storage):
            part._engine.dispose()  # type: ignore[union-attr]


def test_a_worker_executes_runs_one_after_the_other_and_what_is_under_way_when_it_is_asked_to_stop(
    site: Site, pipeline: Pipeline
) -> None:
    publisher = publish_some(site.settings)
    batch = whole_backlog(pipeline)
    with site.worker() as worker:
        first = site.launch(batch)
        assert site.await_end(first) == DagsterRunStatus.SUCCESS, site.said(first)
        # Handed out twice, as Redis may: it is done once.
        site.launcher.launch_run(LaunchRunContext(site.run(first), None))
        second = site.launch(batch)
        assert site.await_end(second) == DagsterRunStatus.SUCCESS
        assert "Ignoring a run worker that started after the run had already finished" in site.said(first)

        publisher.published += publish_some(site.settings).published
        with other_session(site.settings, "SELECT FROM ingested_offsets FOR UPDATE"):
            last = site.launch(whole_backlog(pipeline))
            until(lambda: sessions(site.settings, waiting=True))
            # As Ctrl-C and a careless supervisor do: to its whole process group.
            os.killpg(worker.pid, signal.SIGTERM)
            until(lambda: "Warm shutdown" in site.log.read_text())
            assert worker.poll() is None
        assert worker.wait(60) == 0
    assert site.run(last).status == DagsterRunStatus.SUCCESS
    check_end(site.settings, publisher.published)
    assert "not-in-a-log" not in site.log.read_text() + site.said(first)


def test_a_run_whose_worker_was_killed_is_lost_after_the_time_that_is_set_and_not_before(
    site: Site, pipeline: Pipeline
) -> None:
    publisher = publish_some(site.settings)
    pipeline.run(whole_backlog(pipeline))
    publisher.published += publish_some(site.settings).published
    batch = whole_backlog(pipeline)
    site.launcher._clock = Clock()
    with site.worker() as worker, other_session(site.settings, "SELECT FROM ingested_offsets FOR UPDATE"):
        run_id = site.launch(batch)
        until(lambda: sessions(site.settings, waiting=True))
        health = partial(site.launcher.check_run_worker_health, site.run(run_id))
        assert health().status == WorkerStatus.RUNNING
        kill_with_children(worker)
        seen = []
        while (last := health()).status == WorkerStatus.RUNNING:
            seen.append(last.msg)
        assert set(seen) == {"no worker has answered for it just now"}
        assert len(seen) == LOST_AFTER // Clock.STEP
        assert last.status == WorkerStatus.FAILED
        assert last.msg == "no worker has executed it for 60 s: its worker was killed, or is cut off"
        assert site.launcher.get_run_worker_debug_info(site.run(run_id)) == (
            f"Workers that answer at {site.launcher.place}: none."
        )
    # What is left of it ended with its connection, so that its lane is free.
    pipeline.run(batch)
    check_end(site.settings, publisher.published)


def test_while_redis_is_away_no_run_is_given_up_and_a_launch_and_doctor_say_it_in_one_line(
    site: Site, pipeline: Pipeline
) -> None:
    publish_some(site.settings)
    run = site.run_of(whole_backlog(pipeline))
    site.redis.kill()
    try:
        said = f"Redis at redis://:**@127.0.0.1:{site.redis.port}/0 does not answer: Error 111 connecting"
        health = site.launcher.check_run_worker_health(run)
        assert (health.status, str(health.msg)[: len(said)]) == (WorkerStatus.RUNNING, said)
        with pytest.raises(UnavailableError, match="check that it runs, and CELERY_BROKER_URL"):
            site.instance.launch_run(run.run_id, None)  # type: ignore[arg-type]
        assert site.run(run.run_id).status == DagsterRunStatus.FAILURE
        assert said in site.said(run.run_id)
        assert any(sentence.startswith(f"no run is launched: {said}") for sentence in find_wrong(site.instance))
    finally:
        site.redis.start()
    assert any(sentence.startswith("no worker answers at") for sentence in find_wrong(site.instance))


def test_a_worker_ends_a_run_by_itself_where_run_monitoring_would_and_is_cut_off_from_it(
    site: Site, pipeline: Pipeline, monkeypatch: Any
) -> None:
    publish_some(site.settings)
    run = site.run_of(whole_backlog(pipeline))
    limits = []
    monkeypatch.setattr(
        site.launcher._execute, "apply_async", lambda *, time_limit, **_others: limits.append(time_limit)
    )
    for tags in ({}, {MAX_RUNTIME_SECONDS_TAG: "86400"}):
        site.launcher.launch_run(LaunchRunContext(run.with_tags(tags), None))
    assert limits == [300 + 60, 86_400 + 60]


def test_the_block_for_workers_adds_a_launcher_to_the_shipped_settings_and_changes_nothing(site: Site) -> None:
    both = yaml.safe_load((site.home / "dagster.yaml").read_text())
    assert both == {**yaml.safe_load(shipped("dagster.yaml")), "run_launcher": both["run_launcher"]}
    assert "run_launcher" not in yaml.safe_load(shipped("dagster.yaml"))
    named = both["run_launcher"]
    assert (named["module"], named["class"]) == (WorkersLauncher.__module__, WorkersLauncher.__name__)
    assert not any("Redis" in sentence for sentence in find_wrong(site.instance))


@pytest.mark.parametrize("address", ["", "amqp://guest@somewhere//", "redis:/secret"])
def test_an_address_that_is_not_one_of_redis_is_refused_without_being_said(address: str) -> None:
    with pytest.raises(ConfigurationError, match="CELERY_BROKER_URL must be an address such as") as refused:
        WorkersLauncher(address, LOST_AFTER)
    assert not address or address not in str(refused.value)


def test_a_worker_is_refused_where_it_would_get_no_run(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    bare = run(settings, "sensor-pipeline", "worker", DAGSTER_HOME=str(tmp_path))
    assert bare.returncode == 1
    assert (
        "has runs launched by DefaultRunLauncher, so that a worker would get none; append the package's" in bare.stderr
    )
    homeless = run(settings, "sensor-pipeline", "worker", DAGSTER_HOME="")
    assert (homeless.returncode, homeless.stderr.count("\n")) == (1, 1)
    assert homeless.stderr.startswith("sensor-pipeline: DAGSTER_HOME is not set; set it to a folder with")
