"""Rows of `rejected_messages`: a message that can never become a reading, whole."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from sensor_pipeline.drained import Headers, Records, RejectedMessage

_ADD = sa.text("""
    INSERT INTO rejected_messages
        (topic_id, kafka_partition, kafka_offset, kafka_timestamp_ms, key, payload, headers, reason, detail)
    SELECT :topic_id, new.* FROM unnest(
        CAST(:partitions AS integer[]), CAST(:offsets AS bigint[]), CAST(:timestamps AS bigint[]),
        CAST(:keys AS bytea[]), CAST(:payloads AS bytea[]), CAST(:headers AS jsonb[]), CAST(:reasons AS text[]),
        CAST(:details AS text[])
    ) AS new
""")
# What a message is decoded from. One that was rejected before its record's timestamp was kept is held against the time
# at which it was rejected.
RECORD = """kafka_partition, kafka_offset, payload,
    coalesce(kafka_timestamp_ms, floor(extract(epoch FROM first_seen) * 1000)::bigint) AS timestamp_ms"""
# The first and the last place let the planner read that part of the primary key, however large the table is.
_AT = """topic_id = :topic_id
    AND (kafka_partition, kafka_offset) >= (:first_partition, :first_offset)
    AND (kafka_partition, kafka_offset) <= (:last_partition, :last_offset)
    AND (kafka_partition, kafka_offset) IN (
        SELECT * FROM unnest(CAST(:partitions AS integer[]), CAST(:offsets AS bigint[]))
    )"""
_LOCK = sa.text(f"""
    SELECT {RECORD} FROM rejected_messages WHERE {_AT} ORDER BY kafka_partition, kafka_offset FOR UPDATE
""")
_REMOVE = sa.text(f"DELETE FROM rejected_messages WHERE {_AT} RETURNING kafka_partition")
# A statement may not be larger than 1 GB, and the driver sends bytes as hexadecimal text.
_MESSAGES_A_STATEMENT = 1_000
_BYTES_A_STATEMENT = 4_000_000


def add_rejected(connection: sa.Connection, topic_id: int, messages: Sequence[RejectedMessage]) -> int:
    """Insert messages of one topic; returns how many rows the database took."""
    added = 0
    for part in _parts(messages):
        arguments = {
            "topic_id": topic_id,
            "partitions": [m.partition for m in part],
            "offsets": [m.offset for m in part],
            "timestamps": [m.timestamp_ms for m in part],
            "keys": [m.key for m in part],
            "payloads": [m.payload for m in part],
            "headers": [_headers_json(m.headers) for m in part],
            "reasons": [m.reason for m in part],
            "details": [m.detail for m in part],
        }
        added += connection.execute(_ADD, arguments).rowcount
    return added


def lock(connection: sa.Connection, topic_id: int, places: Sequence[tuple[int, int]]) -> Records:
    """Lock messages of one topic, by partition and offset, in that order; returns those that are still there."""
    return records(connection.execute(_LOCK, _at(topic_id, places)))


def remove(connection: sa.Connection, topic_id: int, places: Sequence[tuple[int, int]]) -> Counter[int]:
    """Remove messages of one topic; returns how many rows the database removed, by partition."""
    return Counter(connection.scalars(_REMOVE, _at(topic_id, places)))


def records(rows: Iterable[Any]) -> Records:
    """Rows of `RECORD` as Kafka delivered them, to be decoded; their keys and headers stay where they are."""
    found = list(rows)
    return Records(
        partition=np.array([row.kafka_partition for row in found], np.int32),
        offset=np.array([row.kafka_offset for row in found], np.int64),
        timestamp_ms=np.array([row.timestamp_ms for row in found], np.int64),
        value=[None if row.payload is None else bytes(row.payload) for row in found],
        key_and_headers=lambda at: (None, ()),
    )


def _at(topic_id: int, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
    (first_partition, first_offset), (last_partition, last_offset) = min(places), max(places)
    return {
        "topic_id": topic_id,
        "first_partition": first_partition,
        "first_offset": first_offset,
        "last_partition": last_partition,
        "last_offset": last_offset,
        "partitions": [partition for partition, _ in places],
        "offsets": [offset for _, offset in places],
    }


def _parts(messages: Sequence[RejectedMessage]) -> Iterator[list[RejectedMessage]]:
    """Messages in parts of at most a statement's size; a larger one stands alone."""
    part: list[RejectedMessage] = []
    size = 0
    for message in messages:
        own = len(message.payload or b"") + len(message.key or b"") + sum(len(v or b"") for _, v in message.headers)
        if part and (len(part) == _MESSAGES_A_STATEMENT or size + own > _BYTES_A_STATEMENT):
            yield part
            part, size = [], 0
        part.append(message)
        size += own
    if part:
        yield part


def _headers_json(headers: Headers) -> str:
    """Headers as a JSON array; a name or value that text in PostgreSQL cannot hold stands as base64."""
    return json.dumps([_text("key", name.encode()) | _text("value", value) for name, value in headers])


def headers_from_json(stored: Sequence[Mapping[str, str | None]]) -> Headers:
    """Headers as they came, from what `add_rejected` made of them."""
    return [((_content("key", header) or b"").decode(), _content("value", header)) for header in stored]


def _content(field_name: str, header: Mapping[str, str | None]) -> bytes | None:
    encoded = header.get(f"{field_name}_base64")
    if encoded is not None:
        return base64.b64decode(encoded)
    text = header[field_name]
    return None if text is None else text.encode()


def _text(field_name: str, value: bytes | None) -> dict[str, Any]:
    if value is None:
        return {field_name: None}
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\x00"
    if "\x00" in text:
        return {f"{field_name}_base64": base64.b64encode(value).decode()}
    return {field_name: text}
