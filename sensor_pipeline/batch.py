"""One batch from Kafka to PostgreSQL, in the order that makes it durable. No Dagster.

1. `drain`: ask the ledger what is left of the batch, read that from Kafka, decode it
2. `detect`: sort it into event-time order and find where failures start and end
3. `write`: all of it and the ledger in one transaction of PostgreSQL
4. `commit`: only then mirror the ledger to the consumer group's offsets

Whatever ends a batch early, running it again brings everything to the same end: what the ledger holds is done,
and what it does not hold was not written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from functools import partial
from typing import TypeVar

import pandas as pd

from sensor_pipeline.backlog import register_topic
from sensor_pipeline.drained import Drained, FrameBuilder, Records
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.failures import detect
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.offsets import Batch, OffsetRange, contiguous_prefix, subtract
from sensor_pipeline.postgres import ledger
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.days import look_kept_from
from sensor_pipeline.postgres.refused import Refused, RowsRefusedError
from sensor_pipeline.postgres.transaction import Origin, Written, write
from sensor_pipeline.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

# A deadlock, a lock not had in time, a restarting server: the pauses before the write is tried again, in seconds.
RETRY_PAUSES = (0.5, 1.0, 2.0, 4.0)


def retried(attempt: Callable[[], T], *, what: str, sleep: Callable[[float], None]) -> T:
    """Do what writes to the database; where that was only busy or away, try again after pauses.

    Raises:
        UnavailableError: it still was, after all tries.
    """
    pauses = iter(RETRY_PAUSES)
    while True:
        try:
            return attempt()
        except UnavailableError as error:
            pause = next(pauses, None)
            if pause is None:
                raise
            log.warning("%s: %s (next try in %s s)", what, error, pause)
            sleep(pause)


@dataclass
class Stopwatch:
    """Seconds by stage, for the batch log and the run's page."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's duration to the stage's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)


@dataclass(frozen=True)
class Prepared:
    """A batch that was drained and in which failures were found; nothing of it is written yet."""

    drained: Drained
    detected: pd.DataFrame
    origin: Origin


class Pipeline:
    """What a batch needs, whoever runs it: Dagster's ops, `catch-up`, a test.

    Args:
        settings: validated settings.
        sleep: how to wait between two tries of the write.
    """

    def __init__(self, settings: Settings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings = settings
        self.kafka = Kafka(settings)
        self.database = Database(settings)
        self._decoder = MessageDecoder(settings.max_future, settings.naive_timestamp_tz, settings.max_message_bytes)
        self._sleep = sleep

    def run(self, batch: Batch) -> Written:
        """All four steps."""
        written = self.store(batch, self.prepare(batch))
        self.commit(batch)
        return written

    def prepare(self, batch: Batch) -> Prepared:
        """The two steps that only read: another batch may be written meanwhile."""
        stopwatch = Stopwatch()
        started_at = datetime.now(UTC)
        with stopwatch.stage("drain"):
            drained = self.drain(batch)
        with stopwatch.stage("detect"):
            detected = self.detect(drained)
        return Prepared(drained, detected, Origin(started_at, timings=stopwatch.seconds))

    def store(self, batch: Batch, prepared: Prepared) -> Written:
        """The step that makes it durable; `commit` may then be done at any time."""
        return self.write(batch, prepared.drained, prepared.detected, prepared.origin)

    def drain(self, batch: Batch) -> Drained:
        """Read what the ledger does not hold of the batch; nothing is read where it holds all.

        Raises:
            GapError: Kafka no longer has offsets that the ledger does not hold.
            TopicReplacedError: the topic is not the one that the batch was planned for.
        """
        todo, kept_from = self._not_ingested(batch)
        builder = FrameBuilder()
        no_record: list[OffsetRange] = []
        if todo:
            for part in self.kafka.drain(batch, todo):
                if isinstance(part, Records):
                    builder.add(part, self._decoder.decode(part.value, part.timestamp_ms, kept_from))
                else:
                    no_record = part
        return Drained(builder.frame(), tuple(builder.rejected), tuple(no_record))

    def detect(self, drained: Drained) -> pd.DataFrame:
        """The drained readings in event-time order, with the places where failures start and end."""
        return detect(drained.readings)

    def write(self, batch: Batch, drained: Drained, detected: pd.DataFrame, origin: Origin) -> Written:
        """Write the batch in one transaction; where the database was only busy or away, try again.

        A connection lost during the commit leaves open whether it happened: the next try asks the ledger.
        Readings that the database refuses for their content, or that became too old to be kept since they were drained,
        become rejected messages.
        """
        while True:
            limit = self.settings.max_rejected_share
            attempt = partial(
                write, self.database, batch, drained, detected, origin, limit, self.settings.alert_max_age
            )
            try:
                return retried(attempt, what=f"batch {batch}", sleep=self._sleep)
            except RowsRefusedError as error:
                drained = self._reject(batch, drained, error.refused)
                detected = self.detect(drained)

    def _reject(self, batch: Batch, drained: Drained, refused: Sequence[Refused]) -> Drained:
        """Move refused readings to the rejected messages, whole: they are read again for that."""
        said = {(r.partition, r.offset): r.rejection for r in refused}
        builder = FrameBuilder()
        for part in self.kafka.drain(batch, [OffsetRange(p, o, o + 1) for p, o in sorted(said)]):
            if isinstance(part, Records):
                builder.reject(part, said)
        readings = drained.readings
        places = zip(readings["partition"].tolist(), readings["offset"].tolist(), strict=True)
        left = readings[[place not in said for place in places]].reset_index(drop=True)
        left["machine"] = left["machine"].cat.remove_unused_categories()
        return replace(drained, readings=left, rejected=(*drained.rejected, *builder.rejected))

    def commit(self, batch: Batch) -> dict[int, int]:
        """Mirror the ledger's contiguous prefix to the group, for the batch's partitions; returns the offsets.

        Another batch may commit the same partitions at the same time and be overtaken here, so it is repeated
        until the ledger stayed as it was committed. A topic that was deleted and created again since
        has no group to mirror it.
        """
        topic = self.kafka.topic(batch.topic)
        if topic.kafka_topic_id != batch.kafka_topic_id:
            log.warning("topic %s was deleted and created again: offsets of %s are not committed", batch.topic, batch)
            return {}
        prefixes = self._prefixes(batch)
        mirrored: dict[int, int] = {}
        if 0 in prefixes.values():
            # There a group without an offset is right as it is, and one that was moved by hand is not.
            mirrored = dict.fromkeys(batch.partitions, 0) | self.kafka.committed_offsets(topic)
        while stale := {p: offset for p, offset in prefixes.items() if offset != mirrored.get(p)}:
            self.kafka.commit_offsets(batch.topic, stale)
            mirrored |= stale
            prefixes = self._prefixes(batch)
        return {p: mirrored[p] for p in batch.partitions}

    def _not_ingested(self, batch: Batch) -> tuple[list[OffsetRange], date | None]:
        """What the ledger does not hold of a batch, and the day from which on readings are kept."""
        with self.database.begin() as connection:
            self.database.check_schema(connection)
            topic = ledger.find_topic(connection, batch.kafka_topic_id)
            done = ledger.ingested(connection, topic.id) if topic else {}
            kept_from = look_kept_from(connection)
        if topic is None:
            register_topic(self.settings, self.kafka, self.database, self.kafka.check_topic(batch))
            return self._not_ingested(batch)
        return subtract(batch.ranges, [span for spans in done.values() for span in spans]), kept_from

    def _prefixes(self, batch: Batch) -> dict[int, int]:
        with self.database.begin() as connection:
            topic = ledger.find_topic(connection, batch.kafka_topic_id)
            done = ledger.ingested(connection, topic.id) if topic else {}
        return {p: contiguous_prefix(done.get(p, [])) for p in batch.partitions}
