"""Rows of `rejected_messages`: a message that can never become a reading, whole."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from sensor_pipeline.drained import Headers, RejectedMessage

_ADD = sa.text("""
    INSERT INTO rejected_messages
        (topic_id, kafka_partition, kafka_offset, key, payload, headers, reason, detail)
    SELECT :topic_id, new.* FROM unnest(
        CAST(:partitions AS integer[]), CAST(:offsets AS bigint[]), CAST(:keys AS bytea[]),
        CAST(:payloads AS bytea[]), CAST(:headers AS jsonb[]), CAST(:reasons AS text[]), CAST(:details AS text[])
    ) AS new
""")
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
            "keys": [m.key for m in part],
            "payloads": [m.payload for m in part],
            "headers": [_headers_json(m.headers) for m in part],
            "reasons": [m.reason for m in part],
            "details": [m.detail for m in part],
        }
        added += connection.execute(_ADD, arguments).rowcount
    return added


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
