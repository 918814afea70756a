"""Runs of `replay_rejected` and `recompute_failures` as Dagster makes them, against a real PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus, JobDefinition
from dagster._daemon.monitoring.run_monitoring import check_run_timeout
from dagster._time import get_current_timestamp
from dagster_shared.record import copy

from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.orchestration.config import to_run_config
from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.orchestration.repair import build_recompute_job, build_replay_job
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import run
from sensor_pipeline_tests.oracle import connect, stored
from sensor_pipeline_tests.orchestration.test_job import metadata
from sensor_pipeline_tests.orchestration.test_sensor import publish, record, tick
from sensor_pipeline_tests.postgres.tables import busy_history, every_row, ingest_once, want
from sensor_pipeline_tests.rejecting import (
    TOO_LARGE,
    check_replayed,
    check_verified,
    messages,
    query,
    rejecting_history,
    strict,
)
from sensor_pipeline_tests.test_any_history import Log

DEFINITIONS = ["-m", "sensor_pipeline.orchestration.definitions"]


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def rejected(database_settings: Settings) -> Log:
    """A history of which a third was rejected, ingested."""
    log = rejecting_history(database_settings)
    ingest_once(database_settings, log)
    return log


def of_reason(log: Log, reason: str = TOO_LARGE) -> int:
    return sum(1 for m in messages(log) if m.bad == reason)


# Replay


def test_without_config_every_rejected_message_is_replayed_and_the_run_tells_what_became_of_them(
    database_settings: Settings, rejected: Log, instance: DagsterInstance
) -> None:
    result = build_replay_job(database_settings).execute_in_process(instance=instance)
    assert result.success
    check_replayed(database_settings, rejected)
    said = metadata(result, "replay")
    assert said["became readings"] == of_reason(rejected)
    assert said["bad again"] == of_reason(rejected, "not_json")
    assert said["looked at"] == said["became readings"] + said["bad again"]
    assert said["gone meanwhile"] == 0
    (logged,) = query(
        database_settings,
        "SELECT id, dagster_run_id, failures_started, failures_ended FROM batches WHERE kind = 'replay'",
    )
    assert (logged.id, logged.dagster_run_id) == (said["batches"][0], result.run_id)
    assert (logged.failures_started, logged.failures_ended) == (said["failures started"], said["failures ended"])
    samples = [sample.data for sample in said["bad again, with samples"].records]
    assert len(samples) == 3
    places = {(m.topic, m.partition, m.offset) for m in messages(rejected) if m.bad == "not_json"}
    assert {(s["topic"], s["partition"], s["offset"]) for s in samples} <= places
    assert {(s["reason"], s["messages"]) for s in samples} == {("not_json", of_reason(rejected, "not_json"))}
    assert [column.name for column in said["bad again, with samples"].schema.columns] == list(samples[0])


def test_what_the_launchpad_is_filled_with_is_what_runs_without_config(database_settings: Settings) -> None:
    assert build_replay_job(database_settings).run_config == {
        "ops": {"replay": {"config": {"reasons": [], "topics": [], "since": "", "until": "", "dry_run": False}}}
    }
    assert build_recompute_job(database_settings).run_config == {
        "ops": {"recompute": {"config": {"machines": [], "since": "", "until": ""}}}
    }


def with_config(op: str, **config: Any) -> dict[str, Any]:
    return {"ops": {op: {"config": config}}}


def test_a_dry_run_says_what_would_become_of_them_and_writes_nothing(
    database_settings: Settings, rejected: Log, instance: DagsterInstance
) -> None:
    before = every_row(database_settings)
    job = build_replay_job(database_settings)
    result = job.execute_in_process(with_config("replay", dry_run=True), instance=instance)
    assert metadata(result, "replay")["would become readings"] == of_reason(rejected)
    assert every_row(database_settings) == before


def test_the_config_names_reasons_topics_and_times(
    database_settings: Settings, rejected: Log, instance: DagsterInstance
) -> None:
    job = build_replay_job(database_settings)

    def looked_at(**config: Any) -> int:
        result = job.execute_in_process(with_config("replay", dry_run=True, **config), instance=instance)
        found: int = metadata(result, "replay")["looked at"]
        return found

    assert looked_at(reasons=["not_json"]) == of_reason(rejected, "not_json")
    assert looked_at(topics=[rejected.topic]) == of_reason(rejected) + of_reason(rejected, "not_json")
    assert looked_at(since="1 hour") == looked_at()
    assert looked_at(until="1 hour") == 0
    assert looked_at(until="2026-01-01T00:00:00+01:00") == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"since": "yesterday"}, "since: 'yesterday' is neither an ISO 8601 time nor a duration"),
        ({"since": "1 hour", "until": "2 hours"}, "lies after until"),
        ({"reasons": ["no_reason"]}, "there is no reason no_reason; the reasons are"),
        ({"topics": ["no-topic"]}, "there is no topic no-topic in the database; it has rejecting-1"),
    ],
)
@pytest.mark.usefixtures("rejected")
def test_a_config_that_cannot_be_meant_fails_the_run_in_one_line(
    database_settings: Settings, instance: DagsterInstance, config: dict[str, Any], words: str
) -> None:
    job = build_replay_job(database_settings)
    result = job.execute_in_process(with_config("replay", **config), instance=instance, raise_on_error=False)
    failure = next(e for e in result.all_node_events if e.is_step_failure).event_specific_data
    said = failure.user_failure_data.description
    assert words in said
    assert "\n" not in said


# Recompute


def damage(settings: Settings, statement: str) -> None:
    with connect(settings).begin() as connection:
        connection.execute(sa.text("ALTER TABLE failures DROP CONSTRAINT failures_do_not_overlap"))
        connection.execute(sa.text(statement))


@pytest.fixture
def busy(database_settings: Settings) -> Log:
    log = busy_history(database_settings)
    ingest_once(database_settings, log)
    return log


def test_without_config_failures_of_all_machines_are_mended_and_the_run_tells_which(
    database_settings: Settings, busy: Log, instance: DagsterInstance
) -> None:
    damage(database_settings, "DELETE FROM failures WHERE machine_id IN (1, 2)")
    result = build_recompute_job(database_settings).execute_in_process(instance=instance)
    assert stored(database_settings) == want(busy)
    check_verified(database_settings)
    said = metadata(result, "recompute")
    assert (said["machines looked at"], said["machines mended"]) == (4, 2)
    rows = [row.data for row in said["mended"].records]
    assert len(rows) == 2
    assert sum(row["made"] for row in rows) == said["failures made"] > 0
    assert all("which is not stored for this machine and time" in row["what was wrong"] for row in rows)
    again = build_recompute_job(database_settings).execute_in_process(instance=instance)
    assert metadata(again, "recompute")["machines mended"] == 0
    assert metadata(again, "recompute")["mended"].records == []


def test_of_the_machines_and_the_time_that_the_config_names_every_failure_that_touches_it_is_mended_whole(
    database_settings: Settings, busy: Log, instance: DagsterInstance
) -> None:
    long = """
        SELECT f.id, start_time + (last_failing_time - start_time) / 2 AS middle
        FROM failures f JOIN machines m ON m.id = f.machine_id
        WHERE last_failing_time > start_time {} ORDER BY f.id
    """
    chosen = query(database_settings, long.format("AND m.machine_id = 'm1'"))[1]
    damage(database_settings, "UPDATE failures SET last_failing_time = start_time")
    since = until = chosen.middle.isoformat()
    config = with_config("recompute", machines=["m1"], since=since, until=until)
    result = build_recompute_job(database_settings).execute_in_process(config, instance=instance)
    said = metadata(result, "recompute")
    assert (said["machines looked at"], said["machines mended"], said["failures changed"]) == (1, 1, 1)
    assert [row.data["machine"] for row in said["mended"].records] == ["m1"]
    assert [row.id for row in query(database_settings, long.format(""))] == [chosen.id]
    build_recompute_job(database_settings).execute_in_process(instance=instance)
    assert stored(database_settings) == want(busy)


def test_a_machine_that_is_not_there_fails_the_run_in_one_line(
    database_settings: Settings, busy: Log, instance: DagsterInstance
) -> None:
    job = build_recompute_job(database_settings)
    config = with_config("recompute", machines=["m1", "nobody"])
    result = job.execute_in_process(config, instance=instance, raise_on_error=False)
    failure = next(e for e in result.all_node_events if e.is_step_failure).event_specific_data
    assert "there is no machine nobody in the database" in failure.user_failure_data.description


# Among Dagster's other work


BUILDERS = {"replay": build_replay_job, "recompute": build_recompute_job}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_run_that_takes_hours_is_not_ended_as_a_batch_would_be(
    database_settings: Settings, instance: DagsterInstance, name: str
) -> None:
    """Dagster's own check, with the limit that dagster.yaml sets for batches."""

    def status(job: JobDefinition, seconds: float, run_config: Any = None) -> DagsterRunStatus:
        run = instance.create_run_for_job(
            job, status=DagsterRunStatus.STARTED, tags=job.run_tags, run_config=run_config
        )
        found = instance.get_run_record_by_id(run.run_id)
        assert found is not None
        started = copy(found, start_time=get_current_timestamp() - seconds)
        check_run_timeout(instance, started, logging.getLogger(), 300.0)
        again = instance.get_run_by_id(run.run_id)
        assert again is not None
        return again.status

    job = BUILDERS[name](database_settings)
    batch = to_run_config(Batch("t", "t-id", (OffsetRange(0, 0, 1),)))
    assert status(build_job(database_settings), 3_600, batch) == DagsterRunStatus.FAILURE
    assert status(job, 3_600 * 12) == DagsterRunStatus.STARTED
    assert status(job, 3_600 * 48) == DagsterRunStatus.FAILURE
    assert "lane" not in job.run_tags


@pytest.mark.parametrize("status", [DagsterRunStatus.STARTED, DagsterRunStatus.FAILURE])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_sensor_plans_as_if_these_runs_were_not_there(
    settings: Settings, instance: DagsterInstance, name: str, status: DagsterRunStatus
) -> None:
    publish(settings, 40)
    alone = tick(settings, instance)
    instance.create_run_for_job(BUILDERS[name](settings), status=status)
    assert tick(settings, instance) == alone
    record(instance, settings, alone[0][0], DagsterRunStatus.STARTED)
    assert tick(settings, instance)[0] == []


@pytest.fixture
def execute(database_settings: Settings, tmp_path: Path) -> Callable[..., str]:
    """`dagster job execute`, in a process of its own; what it said."""

    def execute(job: str, config: str | None = None) -> str:
        more = []
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
            more = ["-c", str(tmp_path / "config.yaml")]
        command = ["dagster", "job", "execute", *DEFINITIONS, "-j", job, *more]
        done = run(database_settings, *command, DAGSTER_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return execute


def test_both_jobs_are_in_the_definitions_and_run_in_a_process_of_their_own(
    database_settings: Settings, rejected: Log, execute: Callable[..., str]
) -> None:
    damage(database_settings, "DELETE FROM failures")
    said = execute("recompute_failures")
    assert "machines looked at, 3 mended" in said
    assert stored(database_settings) == want(rejected)
    said = execute("replay_rejected", "ops: {replay: {config: {reasons: [too_large], since: 1 day}}}")
    assert f"{of_reason(rejected)} rejected messages looked at; {of_reason(rejected)} became readings" in said
    check_replayed(database_settings, rejected)


def test_a_run_keeps_to_the_settings_of_its_process(
    database_settings: Settings, rejected: Log, instance: DagsterInstance
) -> None:
    job = build_replay_job(strict(database_settings))
    said = metadata(job.execute_in_process(instance=instance), "replay")
    assert said["became readings"] == 0
    assert said["bad again"] == of_reason(rejected) + of_reason(rejected, "not_json")
    job = build_replay_job(replace(database_settings, postgres_password="wrong"))
    assert not job.execute_in_process(instance=instance, raise_on_error=False).success
