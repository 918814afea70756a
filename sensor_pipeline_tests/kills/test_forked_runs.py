"""Runs are forked from a process that has imported everything, and survive whatever becomes of it."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
from pathlib import Path

import pytest
from dagster._grpc.server import DagsterApiServer

from sensor_pipeline.orchestration.forked_runs import TITLE
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.test_three_ways import dagster_database, lag
from sensor_pipeline_tests.kills import victim
from sensor_pipeline_tests.kills.deployment import Deployment, deployed
from sensor_pipeline_tests.kills.test_points import check_end
from sensor_pipeline_tests.kills.test_random import publish_fleet
from sensor_pipeline_tests.postgres.tables import other_session, sessions
from sensor_pipeline_tests.publishing import Publisher

__all__ = ["dagster_database"]

# Of 388 modules that a run imported beside the definitions, Dagster's storage most of them.
MOST_LEFT_TO_IMPORT = 20
_LEFT_TO_IMPORT = """
import sys
import sensor_pipeline.orchestration.preloaded
before = set(sys.modules)
from dagster import DagsterInstance
with DagsterInstance.get() as instance:
    from sensor_pipeline.orchestration.definitions import defs
    defs.resolve_job_def("ingest_batch")
print(len(set(sys.modules) - before))
"""


def test_dagster_takes_a_runs_process_from_where_it_is_set() -> None:
    source = inspect.getsource(DagsterApiServer.StartRun)
    for taken in ("_mp_ctx.Process(", "_mp_ctx.Queue()", "_mp_ctx.Event()"):
        assert f"self.{taken}" in source


@pytest.mark.usefixtures("dagster_database")
def test_batches_are_forked_and_the_end_of_what_they_are_forked_from_is_not_theirs(
    settings: Settings, tmp_path: Path
) -> None:
    publisher, dice = Publisher(settings), random.Random(1)
    publish_fleet(publisher, dice, 0, 100)
    victim.catch_up(settings)
    with deployed(settings, tmp_path / "dagster", max_runtime=60) as deployment:
        forked_from = []
        for _ in range(2):
            publish_fleet(publisher, dice, len(publisher.published), 200)
            with other_session(settings, "SELECT FROM ingested_offsets FOR UPDATE"):
                deployment.wait_for("a run in its write", lambda: sessions(settings, waiting=True))
                (run,) = deployment.run_processes()
                assert TITLE in " ".join(run.cmdline())
                parent = run.parent()
                assert parent is not None
                assert "multiprocessing.forkserver" in " ".join(parent.cmdline())
                parent.kill()
                forked_from.append(parent)
            deployment.wait_for("the run's end", lambda run=run: not run.is_running())
            assert not lag(settings)
        deployment.wait_for("an end of all runs", lambda: set(deployment.runs().values()) <= {"SUCCESS", "FAILURE"})
    assert forked_from[0] != forked_from[1]
    check_end(settings, publisher.published)


@pytest.mark.usefixtures("dagster_database")
def test_a_run_has_hardly_anything_left_to_import(settings: Settings, tmp_path: Path) -> None:
    env = Deployment(settings, tmp_path / "dagster", max_runtime=60).env
    ended = subprocess.run([sys.executable, "-c", _LEFT_TO_IMPORT], env=env, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < MOST_LEFT_TO_IMPORT
