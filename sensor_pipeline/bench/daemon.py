"""The pipeline as it is deployed: Dagster's daemon, code server and default launcher, on a site's servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from sensor_pipeline.bench.processes import environment
from sensor_pipeline.bench.site import Site
from sensor_pipeline.embedded.screen import PlainScreen
from sensor_pipeline.embedded.stack import Stack
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.settings import Settings

_POLL_SECONDS = 0.25
_STALL_SECONDS = 180

_DONE = "SELECT coalesce(sum(readings + rejected + no_record), 0) FROM ingested_offsets"
_LAST_COMMIT = "SELECT max(committed_at) FROM batches"
_FIRST_RUN = "SELECT min(create_timestamp) FROM runs WHERE pipeline_name = 'ingest_batch'"
_LAUNCHES = """
    SELECT extract(epoch FROM first.op - launched.at) FROM (
        SELECT run_id, min("timestamp") AS at FROM event_logs
        WHERE dagster_event_type = 'PIPELINE_STARTING' GROUP BY run_id
    ) AS launched JOIN (
        SELECT run_id, min("timestamp") AS op FROM event_logs
        WHERE dagster_event_type = 'STEP_START' GROUP BY run_id
    ) AS first USING (run_id)
"""


@dataclass(frozen=True)
class Daemon:
    """What ran: the settings of its database, and those of Dagster's own."""

    site: Site
    settings: Settings
    dagster: Settings

    def done(self) -> int:
        """How many offsets are in the ledger."""
        return int(self._ask(self.settings, _DONE)[0])

    def await_offsets(self, offsets: int) -> None:
        """Wait until so many are in the ledger.

        Raises:
            UnavailableError: nothing was added for minutes.
        """
        last, since = -1, time.monotonic()
        while (now := self.done()) < offsets:
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > _STALL_SECONDS:
                raise UnavailableError(f"the daemon stands still at {now:,} of {offsets:,} offsets")
            time.sleep(_POLL_SECONDS)

    def seconds(self) -> float:
        """From the first run's request to the last batch's commit."""
        first, last = self._ask(self.dagster, _FIRST_RUN)[0], self._ask(self.settings, _LAST_COMMIT)[0]
        assert isinstance(first, datetime)
        assert isinstance(last, datetime)
        return (last - first.replace(tzinfo=UTC)).total_seconds()

    def launch_seconds(self) -> list[float]:
        """From each run's launch to its first op."""
        return [float(seconds) for seconds in self._ask(self.dagster, _LAUNCHES)]

    def _ask(self, settings: Settings, question: str) -> list[Any]:
        with self.site.connection(settings) as connection, connection.cursor() as cursor:
            cursor.execute(question)
            return [row[0] for row in cursor]


@contextmanager
def running(site: Site, settings: Settings) -> Iterator[Daemon]:
    """Dagster without its UI, with these settings, until the end of the block."""
    name = f"{settings.postgres_db}_dagster"
    folder = site.folder / name
    env = environment(settings) | {"DAGSTER_POSTGRES_DB": name}
    try:
        with Stack(folder, env, PlainScreen(Console(quiet=True)), ui=False) as stack:
            stack.start()
            yield Daemon(site, settings, replace(settings, postgres_db=name))
    finally:
        site.drop_database(name)
