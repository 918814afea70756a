"""What is left to ingest: the ledger against Kafka's offsets. Offsets only, never a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from sensor_pipeline.kafka import Kafka, Topic
from sensor_pipeline.offsets import OffsetRange, PartitionBacklog, subtract
from sensor_pipeline.postgres import ledger
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.ledger import FirstStart
from sensor_pipeline.settings import Settings


@dataclass(frozen=True)
class TopicBacklog:
    """A topic's partitions and what is left of each."""

    topic: Topic
    partitions: tuple[PartitionBacklog, ...]

    @property
    def lag(self) -> int:
        """How many offsets are not in the ledger."""
        return sum(partition.lag for partition in self.partitions)


def read_backlog(
    settings: Settings, kafka: Kafka, database: Database, name: str, *, register: bool = False
) -> TopicBacklog:
    """A topic's backlog.

    A topic that the ledger does not know is made known first where `register` says so: only by what ingests it, since
    its `START_FROM` is decided with that for good. For others it is what it would be.

    Raises:
        ConfigurationError: there is no such topic, or the schema is not this code's.
    """
    topic = kafka.topic(name)
    # Before the ledger: an offset that is ingested meanwhile is then counted as done, never as lost.
    first = kafka.first_offsets(topic)
    end = kafka.end_offsets(topic)
    done = _ingested(database, topic)
    if done is None:
        if register:
            register_topic(settings, kafka, database, topic)
            done = _ingested(database, topic) or {}
        else:
            starts = _starts(settings, kafka, database, topic)
            done = {p: [OffsetRange(p, 0, start.offset)] for p, start in starts.items()}
    backlog = _combine(topic, first, end, done)
    if any(partition.cut_off for partition in backlog.partitions):
        # A batch may have been ingested between the two looks, or an older consumer have read into a transaction that
        # is still open; now Kafka's look is the later one, and at all that it has.
        log_ends = kafka.high_watermarks(topic)
        partitions = tuple(replace(p, log_end=log_ends[p.partition]) for p in backlog.partitions)
        backlog = replace(backlog, partitions=partitions)
    return backlog


def oldest_unread(kafka: Kafka, backlog: TopicBacklog) -> dict[int, datetime]:
    """For each partition the timestamp of the oldest record that is not ingested, by its first one.

    A partition is left out where there is none, where it has no time, or where its offsets are used again (`cut_off`).
    """
    # A gap has no record to ask for.
    left = {p.partition: subtract(p.unread, p.gap) for p in backlog.partitions if not p.cut_off}
    return kafka.record_times(backlog.topic, {p: spans[0].start for p, spans in left.items() if spans})


def register_topic(settings: Settings, kafka: Kafka, database: Database, topic: Topic) -> None:
    """Make a topic known to the ledger.

    A name never seen before starts at `START_FROM`, and what lies before that is accepted as lost. A known name
    with a new topic id was deleted and created again: all of it is new, so it starts at offset 0.
    """
    starts = _starts(settings, kafka, database, topic)
    with database.begin() as connection:
        ledger.add_topic(connection, topic.name, topic.kafka_topic_id, starts)


def _starts(settings: Settings, kafka: Kafka, database: Database, topic: Topic) -> Mapping[int, FirstStart]:
    with database.begin() as connection:
        database.check_schema(connection)
        known_name = any(t.name == topic.name for t in ledger.topics(connection))
    return {} if known_name else _first_starts(settings, kafka, topic)


def _combine(
    topic: Topic, first: Mapping[int, int], end: Mapping[int, int], done: Mapping[int, list[OffsetRange]]
) -> TopicBacklog:
    partitions = tuple(
        PartitionBacklog(partition=p, first=first[p], end=end[p], ingested=tuple(done.get(p, ())))
        for p in topic.partitions
    )
    return TopicBacklog(topic, partitions)


def _first_starts(settings: Settings, kafka: Kafka, topic: Topic) -> Mapping[int, FirstStart]:
    first = kafka.first_offsets(topic)
    start_from = settings.start_from
    if start_from == "earliest":
        wanted = first
    elif start_from == "latest":
        wanted = kafka.end_offsets(topic)
    elif start_from == "group":
        # Of all records: an older consumer may have read those of a transaction that is still open.
        end = kafka.high_watermarks(topic)
        # A committed offset past the end was another topic's; it would skip what this one holds.
        # One that mirrors a ledger was for another database, or for this one before it was restored from a backup.
        wanted = {p: offset for p, offset in kafka.consumed_offsets(topic).items() if offset <= end[p]}
    else:
        wanted = kafka.offsets_at(topic, start_from)
    named = start_from.isoformat() if isinstance(start_from, datetime) else start_from
    starts = {}
    for partition in topic.partitions:
        offset = wanted.get(partition, first[partition])
        reason = f"first start with START_FROM={named}"
        if offset < first[partition]:
            reason += f"; the group was at {offset}, Kafka's first offset is {first[partition]}"
        starts[partition] = FirstStart(max(offset, first[partition]), reason)
    return starts


def _ingested(database: Database, topic: Topic) -> Mapping[int, list[OffsetRange]] | None:
    with database.begin() as connection:
        database.check_schema(connection)
        stored = ledger.find_topic(connection, topic.kafka_topic_id)
        return None if stored is None else ledger.ingested(connection, stored.id)
