"""Rejected messages, tried again by today's rules and settings.

The whole goes in parts, each in a transaction of its own and bounded in memory: killed between two or within one, what
was done is done, and running it again does the rest.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import pandas as pd

from sensor_pipeline.batch import retried
from sensor_pipeline.drained import Drained, Records
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.days import look_kept_from
from sensor_pipeline.postgres.ledger import StoredTopic
from sensor_pipeline.postgres.refused import RowsRefusedError
from sensor_pipeline.postgres.rejected_search import Filter, count, find_topics, pages, until_now
from sensor_pipeline.postgres.replay import Replayed, decode, places_of, replay
from sensor_pipeline.postgres.transaction import Origin
from sensor_pipeline.settings import Settings

# A part's transaction keeps its lanes waiting for a second or less; its payloads are held about four times over.
_MESSAGES_A_PART = 10_000
_BYTES_A_PART = 16_000_000
# Of each reason, so many messages that are bad again are named.
SAMPLES = 3


@dataclass(frozen=True)
class Sample:
    """A message that is bad again, and what exactly is wrong with it today."""

    topic: str
    partition: int
    offset: int
    detail: str


@dataclass
class Outcome:
    """What became of the messages: `looked_at` = `readings` + `bad_again` + `gone`.

    The `gone` were taken by another replay meanwhile. In a dry run `readings` counts those that would be. `samples` has
    the first few of each reason, `batches` the batch log's ids.
    """

    looked_at: int = 0
    readings: int = 0
    gone: int = 0
    bad_again: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures_started: int = 0
    failures_ended: int = 0
    batches: list[int] = field(default_factory=list)

    def sentence(self, *, dry_run: bool) -> str:
        """The outcome in one line."""
        said = [f"{self.looked_at:,} rejected messages looked at"]
        if dry_run:
            said.append(f"{self.readings:,} would become readings, {self.bad_again.total():,} would be bad again")
        else:
            said.append(
                f"{self.readings:,} became readings ({self.failures_started:,} failures started, "
                f"{self.failures_ended:,} ended), {self.bad_again.total():,} are bad again"
            )
        if self.gone:
            said.append(f"{self.gone:,} were gone, as another replay took them meanwhile")
        return "; ".join(said)


class Replay:
    """Tries again those messages that are rejected now.

    Args:
        settings: with today's rules.
        wanted: which messages.
        dry_run: only look; what the database itself would refuse is not seen then.
        dagster_run_id: for the batch log.
        sleep: how to wait between two tries of a part.

    Raises:
        ConfigurationError: the filter names what is not there, or the schema is not this code's.
    """

    def __init__(
        self,
        settings: Settings,
        wanted: Filter,
        *,
        dry_run: bool = False,
        dagster_run_id: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.outcome = Outcome()
        self._database = Database(settings)
        self._alert_max_age = settings.alert_max_age
        self._decoder = MessageDecoder(settings.max_future, settings.naive_timestamp_tz, settings.max_message_bytes)
        self._dry_run = dry_run
        self._dagster_run_id = dagster_run_id
        self._sleep = sleep
        with self._database.begin() as connection:
            self._database.check_schema(connection)
            self._topics = find_topics(connection, wanted)
            # What is rejected from here on was tried by today's rules, and may never come to an end.
            self._wanted = until_now(connection, wanted)
            self.total = sum(count(connection, self._wanted).values())

    def run(self, on_part: Callable[[int], None]) -> Outcome:
        """Go through all of them; `on_part` is told after each part how many messages it had.

        Raises:
            SensorPipelineError: a part failed and left no trace; those before it are done.
        """
        for topic in self._topics:
            for page in pages(self._database, topic, self._wanted, _MESSAGES_A_PART, _BYTES_A_PART):
                self._part(topic, page)
                on_part(len(page.value))
        return self.outcome

    def _part(self, topic: StoredTopic, page: Records) -> None:
        with self._database.begin() as connection:
            found = decode(self._decoder, page, look_kept_from(connection))
        self.outcome.looked_at += len(page.value)
        self._note_bad(topic, found)
        if self._dry_run:
            self.outcome.readings += len(found.readings)
            return
        readings = found.readings
        while not readings.empty:
            try:
                done = self._write(topic, readings)
            except RowsRefusedError as error:
                for refused in error.refused:
                    reason, detail = refused.rejection
                    self._note(reason, Sample(topic.name, refused.partition, refused.offset, detail))
                bad = {(refused.partition, refused.offset) for refused in error.refused}
                readings = readings[[place not in bad for place in places_of(readings)]]
            else:
                self._note_done(topic, done)
                return

    def _write(self, topic: StoredTopic, readings: pd.DataFrame) -> Replayed:
        origin = Origin(datetime.now(UTC), self._dagster_run_id)
        attempt = partial(replay, self._database, topic, readings, self._decoder, origin, self._alert_max_age)
        return retried(attempt, what=f"replay of topic {topic.name}", sleep=self._sleep)

    def _note_done(self, topic: StoredTopic, done: Replayed) -> None:
        written = done.written
        self.outcome.readings += written.inserted
        self.outcome.gone += done.gone
        self.outcome.failures_started += len(written.failures_started)
        self.outcome.failures_ended += len(written.failures_ended)
        self.outcome.batches += [] if written.batch_id is None else [written.batch_id]
        for message in done.bad_again:
            self._note(message.reason, Sample(topic.name, message.partition, message.offset, message.detail))

    def _note_bad(self, topic: StoredTopic, found: Drained) -> None:
        for message in found.rejected:
            self._note(message.reason, Sample(topic.name, message.partition, message.offset, message.detail))

    def _note(self, reason: str, sample: Sample) -> None:
        self.outcome.bad_again[reason] += 1
        samples = self.outcome.samples.setdefault(reason, [])
        if len(samples) < SAMPLES:
            samples.append(sample)
