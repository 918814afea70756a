"""`kill -9` of each of Dagster's processes, and of runs, while a backlog is ingested; and runs that are given up."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import DEADLINE_SECONDS
from sensor_pipeline_tests.acceptance.test_three_ways import dagster_database, lag
from sensor_pipeline_tests.kafka.producing import group_offsets
from sensor_pipeline_tests.kills import victim
from sensor_pipeline_tests.kills.deployment import CODE_SERVER, DAEMON, RUN, WEB_SERVER, deployed
from sensor_pipeline_tests.kills.test_points import check_end, prefixes
from sensor_pipeline_tests.kills.test_random import publish_fleet
from sensor_pipeline_tests.postgres.tables import every_row, other_session, sessions
from sensor_pipeline_tests.publishing import Publisher
from sensor_pipeline_tests.soak import amount

__all__ = ["dagster_database"]

pytestmark = pytest.mark.usefixtures("dagster_database")

# A run and its code server together: then nobody is left who could say that the run is over.
KILLED = amount(
    [[RUN], [DAEMON, WEB_SERVER], [CODE_SERVER, RUN]],
    6 * [[RUN], [DAEMON], [WEB_SERVER], [CODE_SERVER], [CODE_SERVER, RUN], [CODE_SERVER, DAEMON, RUN]],
)
MAX_RUNTIME = 20


@pytest.mark.soak
def test_a_backlog_is_ingested_whichever_of_dagsters_processes_are_killed_meanwhile(
    settings: Settings, tmp_path: Path
) -> None:
    settings = replace(settings, batch_size=600, lanes=2)
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    publisher = Publisher(settings)
    publish_fleet(publisher, dice, 0, 500 * len(KILLED))
    with deployed(settings, tmp_path / "dagster", max_runtime=MAX_RUNTIME) as deployment:
        # A batch that was killed at seven tries one after the other waits ten minutes for the next.
        deployment.patience_seconds = amount(DEADLINE_SECONDS, 900)
        for names in dice.sample(KILLED, len(KILLED)):
            if not lag(settings):
                publish_fleet(publisher, dice, len(publisher.published), 1_000)
            # In the middle of something, and not of Dagster's own start.
            deployment.wait_for("a run", deployment.run_processes)
            for name in names:
                deployment.kill(name)
            before = len(deployment.runs())
            deployment.wait_for(
                "another run", lambda before=before: len(deployment.runs()) > before or not lag(settings)
            )
        deployment.wait_for("no lag", lambda: not lag(settings))
        deployment.wait_for("the group where the ledger is", lambda: group_offsets(settings) == prefixes(settings))
        deployment.wait_for("an end of all runs", lambda: set(deployment.runs().values()) <= {"SUCCESS", "FAILURE"})
        runs = Counter(deployment.runs().values())
    print(f"seed {seed}: killed {KILLED} over {len(publisher.published)} messages; runs: {dict(runs)}")
    check_end(settings, publisher.published)


def test_a_run_that_dagster_gave_up_goes_on_after_another_has_written_its_batch_and_writes_nothing(
    settings: Settings, tmp_path: Path, administer: Callable[[str], None]
) -> None:
    publisher = Publisher(settings)
    dice = random.Random(1)
    publish_fleet(publisher, dice, 0, 100)
    victim.catch_up(settings)
    publish_fleet(publisher, dice, 100, 500)
    with deployed(settings, tmp_path / "dagster", max_runtime=MAX_RUNTIME) as deployment:
        with other_session(settings, "SELECT FROM ingested_offsets FOR UPDATE"):
            waiting = deployment.wait_for("a run in its write", lambda: sessions(settings, waiting=True))
            (zombie,) = deployment.run_processes()
            (run_id,) = deployment.runs()
            zombie.suspend()
            # Its code server could ask it to end, and its connection keep what it has locked.
            deployment.kill(CODE_SERVER)
            for session in waiting:
                administer(f"SELECT pg_terminate_backend({session})")
        deployment.wait_for("another run that writes it", lambda: not lag(settings))
        deployment.wait_for("its end", lambda: "SUCCESS" in deployment.runs().values())
        assert deployment.runs()[run_id] == "FAILURE"
        before = rows_of_batches(settings)
        zombie.resume()
        deployment.wait_for("the end of the first", lambda: not zombie.is_running())
        said = deployment.said(run_id)
        # Dagster takes its word for it: what it gave up is a success in the end.
        assert deployment.runs()[run_id] == "SUCCESS"
    assert "were ingested before; nothing was written" in said
    assert rows_of_batches(settings) == before
    check_end(settings, publisher.published)


def rows_of_batches(settings: Settings) -> dict[str, Any]:
    """Every row but the notices: that a run failed may be told at any moment."""
    return {table: rows for table, rows in every_row(settings).items() if table != "notices"}
