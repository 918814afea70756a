"""The ledger: which offsets of which topic are done. It is the truth; Kafka's group offsets only mirror it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from sensor_pipeline.offsets import OffsetRange, subtract, total

_TOPICS = sa.text("SELECT id, name, kafka_topic_id FROM topics ORDER BY id")
# The lock lets two first starts of one topic run one after the other, without burning ids on conflicts.
_LOCK_TOPICS = sa.text("LOCK TABLE topics IN SHARE ROW EXCLUSIVE MODE")
_ADD_TOPIC = sa.text("INSERT INTO topics (name, kafka_topic_id) VALUES (:name, :kafka_topic_id) RETURNING id")
_INGESTED = sa.text("""
    SELECT kafka_partition, lower(span), upper(span)
    FROM ingested_offsets, unnest(offsets) AS span
    WHERE topic_id = :topic_id
    ORDER BY kafka_partition, span
""")
_MAKE_ROWS = sa.text("""
    INSERT INTO ingested_offsets (topic_id, kafka_partition)
    SELECT :topic_id, partition FROM unnest(CAST(:partitions AS integer[])) AS partition ORDER BY partition
    ON CONFLICT DO NOTHING
""")
_LOCK_ROWS = sa.text("""
    SELECT kafka_partition FROM ingested_offsets
    WHERE topic_id = :topic_id AND kafka_partition = ANY (CAST(:partitions AS integer[]))
    ORDER BY kafka_partition FOR UPDATE
""")
_ADD = sa.text("""
    UPDATE ingested_offsets SET
        offsets = offsets + int8multirange(int8range(:start, :end)),
        readings = readings + :readings,
        rejected = rejected + :rejected,
        no_record = no_record + :no_record,
        lost = lost + :lost
    WHERE topic_id = :topic_id AND kafka_partition = :partition
""")
_MOVE = sa.text("""
    UPDATE ingested_offsets SET readings = readings + moved.messages, rejected = rejected - moved.messages
    FROM unnest(CAST(:partitions AS integer[]), CAST(:messages AS bigint[])) AS moved (partition, messages)
    WHERE topic_id = :topic_id AND kafka_partition = moved.partition AND rejected >= moved.messages
""")
_ACCEPT = sa.text("""
    INSERT INTO accepted_gaps (topic_id, kafka_partition, offsets, who, why)
    VALUES (:topic_id, :partition, int8range(:start, :end), :who, :why)
""")


@dataclass(frozen=True)
class StoredTopic:
    """A topic that the ledger knows.

    `rank` is its place among all topics in order of name and Kafka topic id, by which equal timestamps of a
    machine are ordered.
    """

    id: int
    name: str
    kafka_topic_id: str
    rank: int


@dataclass(frozen=True)
class FirstStart:
    """Where a partition begins that was never ingested: all before `offset` is accepted as lost, for `reason`."""

    offset: int
    reason: str


def topics(connection: sa.Connection) -> list[StoredTopic]:
    """All topics, in order of rank."""
    rows = sorted(connection.execute(_TOPICS), key=lambda row: (row.name, row.kafka_topic_id))
    return [StoredTopic(row.id, row.name, row.kafka_topic_id, rank) for rank, row in enumerate(rows)]


def find_topic(connection: sa.Connection, kafka_topic_id: str) -> StoredTopic | None:
    """The topic with this Kafka topic id, if the ledger knows it."""
    return next((t for t in topics(connection) if t.kafka_topic_id == kafka_topic_id), None)


def ingested(connection: sa.Connection, topic_id: int) -> dict[int, list[OffsetRange]]:
    """For each partition of a topic, the ranges that are done (ingested, rejected, empty or accepted as lost)."""
    done: dict[int, list[OffsetRange]] = {}
    for partition, start, end in connection.execute(_INGESTED, {"topic_id": topic_id}):
        done.setdefault(partition, []).append(OffsetRange(partition, start, end))
    return done


def add_topic(connection: sa.Connection, name: str, kafka_topic_id: str, starts: Mapping[int, FirstStart]) -> None:
    """Make a topic known, unless it is; `starts` says where its partitions begin (elsewhere: at 0)."""
    connection.execute(_LOCK_TOPICS)
    if find_topic(connection, kafka_topic_id) is not None:
        return
    topic_id = connection.scalars(_ADD_TOPIC, {"name": name, "kafka_topic_id": kafka_topic_id}).one()
    lock(connection, topic_id, list(starts))
    for partition, start in starts.items():
        if start.offset:
            accept_gap(
                connection, topic_id, [OffsetRange(partition, 0, start.offset)], who="START_FROM", why=start.reason
            )


def lock(connection: sa.Connection, topic_id: int, partitions: Sequence[int]) -> None:
    """Lock the partitions' rows in order, made if missing: whoever has them is alone with these offsets."""
    arguments = {"topic_id": topic_id, "partitions": list(partitions)}
    connection.execute(_MAKE_ROWS, arguments)
    connection.execute(_LOCK_ROWS, arguments)


def accept_gap(
    connection: sa.Connection, topic_id: int, lost: Sequence[OffsetRange], *, who: str, why: str
) -> list[OffsetRange]:
    """Record offsets as lost and accepted; the partitions' rows are locked.

    Returns:
        What was recorded: not what another one ingested or accepted meanwhile.
    """
    done = ingested(connection, topic_id)
    left = subtract(lost, [span for spans in done.values() for span in spans])
    for span in left:
        common = {"topic_id": topic_id, "partition": span.partition, "start": span.start, "end": span.end}
        connection.execute(_ACCEPT, {**common, "who": who, "why": why})
        connection.execute(_ADD, {**common, "readings": 0, "rejected": 0, "no_record": 0, "lost": len(span)})
    return left


def add(
    connection: sa.Connection,
    topic_id: int,
    done: Iterable[OffsetRange],
    *,
    readings: Mapping[int, int],
    rejected: Mapping[int, int],
    no_record: Sequence[OffsetRange],
) -> None:
    """Record ranges as done; the totals are counts for each partition, and its rows are locked."""
    counted = set()
    for span in done:
        # A partition's counts go with its first range.
        first = span.partition not in counted
        counted.add(span.partition)
        empty = total(r for r in no_record if r.partition == span.partition)
        connection.execute(
            _ADD,
            {
                "topic_id": topic_id,
                "partition": span.partition,
                "start": span.start,
                "end": span.end,
                "readings": readings.get(span.partition, 0) if first else 0,
                "rejected": rejected.get(span.partition, 0) if first else 0,
                "no_record": empty if first else 0,
                "lost": 0,
            },
        )


def move_to_readings(connection: sa.Connection, topic_id: int, messages: Mapping[int, int]) -> int:
    """Count rejected messages, so many for each partition, as readings; its rows are locked, its offsets stay.

    Returns:
        For how many partitions that was done: not where fewer were rejected.
    """
    arguments = {"topic_id": topic_id, "partitions": list(messages), "messages": list(messages.values())}
    return connection.execute(_MOVE, arguments).rowcount
