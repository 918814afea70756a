"""Rejected messages, looked for: how many, the newest, one whole, and page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from sensor_pipeline.drained import Headers, Records
from sensor_pipeline.errors import ConfigurationError, DataError
from sensor_pipeline.offsets import OffsetRange, intersect
from sensor_pipeline.postgres import ledger
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.ledger import StoredTopic
from sensor_pipeline.postgres.rejected import RECORD, headers_from_json, records
from sensor_pipeline.rules import Reason
from sensor_pipeline.settings import check_order

_WANTED = """rejected_messages r JOIN topics t ON t.id = r.topic_id
    WHERE (CAST(:reasons AS text[]) IS NULL OR r.reason = ANY (CAST(:reasons AS text[])))
        AND (CAST(:topics AS text[]) IS NULL OR t.name = ANY (CAST(:topics AS text[])))
        AND r.first_seen >= coalesce(CAST(:since AS timestamptz), '-infinity')
        AND r.first_seen <= coalesce(CAST(:until AS timestamptz), 'infinity')"""
_NOW = sa.text("SELECT now()")
_COUNT = sa.text(f"SELECT r.reason, count(*) AS messages FROM {_WANTED} GROUP BY r.reason ORDER BY 2 DESC, 1")
_NEWEST = sa.text(f"""
    SELECT t.name AS topic, r.kafka_partition, r.kafka_offset, r.reason, r.detail, r.first_seen,
           octet_length(r.payload) AS bytes
    FROM {_WANTED}
    ORDER BY r.first_seen DESC, t.name, r.kafka_partition, r.kafka_offset DESC LIMIT :most
""")
_ONE = sa.text("""
    SELECT t.name AS topic, t.kafka_topic_id, r.kafka_partition AS partition, r.kafka_offset AS offset, r.reason,
           r.detail, r.first_seen, r.kafka_timestamp_ms AS timestamp_ms, r.key, r.headers, r.payload
    FROM rejected_messages r JOIN topics t ON t.id = r.topic_id
    WHERE t.name = :topic AND r.kafka_partition = :partition AND r.kafka_offset = :offset ORDER BY t.id
""")
# Sizes are known without the payloads, which stay outside of the table where they are large.
_PAGE = sa.text(f"""
    SELECT {RECORD} FROM (
        SELECT *, row_number() OVER turn AS place, sum(coalesce(octet_length(payload), 0)) OVER turn AS bytes
        FROM (
            SELECT r.* FROM {_WANTED}
                AND r.topic_id = :topic_id AND (r.kafka_partition, r.kafka_offset) > (:partition, :offset)
            ORDER BY r.kafka_partition, r.kafka_offset LIMIT :most
        ) AS next
        WINDOW turn AS (ORDER BY kafka_partition, kafka_offset)
    ) AS measured
    WHERE place = 1 OR bytes <= :most_bytes
    ORDER BY kafka_partition, kafka_offset
""")


@dataclass(frozen=True)
class Filter:
    """Which rejected messages: of these reasons and topics (none: of all), first seen from `since` up to `until`."""

    reasons: Sequence[str] = ()
    topics: Sequence[str] = ()
    since: datetime | None = None
    until: datetime | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As the statements take them."""
        return {
            "reasons": list(self.reasons) or None,
            "topics": list(self.topics) or None,
            "since": self.since,
            "until": self.until,
        }


def find_topics(connection: sa.Connection, wanted: Filter) -> list[StoredTopic]:
    """The topics of which messages are wanted.

    Raises:
        ConfigurationError: there is no such reason or topic, or the time ends before it begins.
    """
    check_order(wanted.since, wanted.until)
    if unknown := sorted(set(wanted.reasons) - set(Reason)):
        raise ConfigurationError(f"there is no reason {', '.join(unknown)}; the reasons are {', '.join(Reason)}")
    topics = ledger.topics(connection)
    names = {topic.name for topic in topics}
    if unknown := sorted(set(wanted.topics) - names):
        raise ConfigurationError(
            f"there is no topic {', '.join(unknown)} in the database; it has "
            f"{', '.join(sorted(names)) or 'none, since nothing was ingested yet'}"
        )
    return [topic for topic in topics if not wanted.topics or topic.name in wanted.topics]


def until_now(connection: sa.Connection, wanted: Filter) -> Filter:
    """The same messages, without those that will be rejected later."""
    now: datetime = connection.scalars(_NOW).one()
    return replace(wanted, until=min(wanted.until or now, now))


def count(connection: sa.Connection, wanted: Filter) -> dict[str, int]:
    """How many there are, by reason, the most frequent first."""
    return {row.reason: row.messages for row in connection.execute(_COUNT, wanted.arguments)}


@dataclass(frozen=True)
class Listed:
    """A rejected message without its content; `bytes` is its payload's size, None for a tombstone."""

    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    first_seen: datetime
    bytes: int | None


def newest(connection: sa.Connection, wanted: Filter, most: int) -> list[Listed]:
    """The newest of them, newest first, at most so many."""
    return [Listed(*row) for row in connection.execute(_NEWEST, wanted.arguments | {"most": most})]


@dataclass(frozen=True)
class Kept:
    """A rejected message, whole.

    `timestamp_ms` is its Kafka record's own in milliseconds since 1970, -1 where it has none, None where the message
    was rejected before that was kept.
    """

    topic: str
    kafka_topic_id: str
    partition: int
    offset: int
    reason: str
    detail: str
    first_seen: datetime
    timestamp_ms: int | None
    key: bytes | None
    headers: Headers
    payload: bytes | None


def find(connection: sa.Connection, topic: str, partition: int, offset: int) -> list[Kept]:
    """The rejected message at a place; several where a topic of this name was deleted and created again.

    Raises:
        ConfigurationError: no topic has this name.
        DataError: there is none.
    """
    topics = find_topics(connection, Filter(topics=[topic]))
    arguments = {"topic": topic, "partition": partition, "offset": offset}
    if found := [_kept(row) for row in connection.execute(_ONE, arguments)]:
        return found
    place = OffsetRange(partition, offset, offset + 1)
    done = any(intersect([place], ledger.ingested(connection, t.id).get(partition, [])) for t in topics)
    why = "it became a reading, held no record, or was accepted as lost" if done else "that offset was not ingested yet"
    raise DataError(
        f"there is no rejected message in topic {topic} partition {partition} offset {offset}: {why}; "
        "`sensor-pipeline rejected list` shows what there is"
    )


def pages(database: Database, topic: StoredTopic, wanted: Filter, most: int, most_bytes: int) -> Iterator[Records]:
    """A topic's, in order of partition and offset, in parts of at most so many messages and bytes of payload.

    A larger message stands alone. What is removed meanwhile is not missed; what is added is met once.
    """
    after = (-1, -1)
    while True:
        arguments = {
            "topic_id": topic.id,
            "partition": after[0],
            "offset": after[1],
            "most": most,
            "most_bytes": most_bytes,
        }
        with database.begin() as connection:
            page = records(connection.execute(_PAGE, wanted.arguments | arguments))
        if not page.value:
            return
        yield page
        after = (int(page.partition[-1]), int(page.offset[-1]))


def _kept(row: sa.Row[Any]) -> Kept:
    values = row._asdict()
    return Kept(
        **values
        | {
            "key": _bytes(row.key),
            "headers": headers_from_json(row.headers),
            "payload": _bytes(row.payload),
        }
    )


def _bytes(value: bytes | None) -> bytes | None:
    """The driver gives a view of memory."""
    return None if value is None else bytes(value)
