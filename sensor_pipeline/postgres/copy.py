"""Readings as PostgreSQL's binary COPY format, which needs no escaping and is exact.

Every field has its length before it as int32 (-1 for null), all big-endian; `values` comes last, so that what
precedes it has one width and is encoded by numpy for all rows at once.
Format: the PostgreSQL documentation of COPY, "Binary Format".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

_COPY = """
COPY readings (machine_id, "timestamp", has_failure, failure_id, topic_id, kafka_partition, kafka_offset, "values")
FROM STDIN (FORMAT binary)
"""
_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_TRAILER = b"\xff\xff"
_EPOCH = np.datetime64("2000-01-01", "us")
_JSONB_VERSION = 1
_ROWS_A_CHUNK = 2_000


def _layout(fields: Sequence[tuple[str, str]]) -> np.dtype[np.void]:
    layout = [("fields", ">i2")]
    for name, kind in fields:
        layout.append((f"{name}_length", ">i4"))
        if kind:
            layout.append((name, kind))
    return np.dtype([*layout, ("values_length", ">i4"), ("version", "i1")])


def _fields(failure_id: str) -> list[tuple[str, str]]:
    return [
        ("machine_id", ">i8"),
        ("timestamp", ">i8"),
        ("has_failure", "i1"),
        ("failure_id", failure_id),
        ("topic_id", ">i2"),
        ("kafka_partition", ">i4"),
        ("kafka_offset", ">i8"),
    ]


_FAILING = _layout(_fields(">i8"))
_HEALTHY = _layout(_fields(""))


def copy_readings(
    connection: sa.Connection,
    *,
    topic_id: int,
    machine_id: NDArray[np.int64],
    timestamp: NDArray[np.datetime64],
    partition: NDArray[np.int32],
    offset: NDArray[np.int64],
    values: Sequence[bytes],
    failure_id: NDArray[np.int64] | None = None,
) -> int:
    """Copy readings in: failing ones with their failures' ids, or healthy ones.

    Args:
        connection: in the transaction that the rows belong to.
        topic_id: of all rows.
        machine_id: `machines.id` of each row.
        timestamp: datetime64[us] in UTC.
        partition: Kafka partition.
        offset: Kafka offset.
        values: the JSON text of each row's object.
        failure_id: `failures.id` of each row; none where all rows are healthy.

    Returns:
        How many rows the database says it took.
    """
    if not len(values):
        return 0
    heads = np.zeros(len(values), _HEALTHY if failure_id is None else _FAILING)
    heads["fields"] = 8
    for name in ("machine_id", "timestamp", "has_failure", "failure_id", "topic_id", "kafka_partition", "kafka_offset"):
        heads[f"{name}_length"] = heads.dtype[name].itemsize if name in heads.dtype.names else -1  # type: ignore[operator]
    heads["machine_id"] = machine_id
    heads["timestamp"] = (timestamp - _EPOCH).astype(np.int64)
    heads["has_failure"] = failure_id is not None
    if failure_id is not None:
        heads["failure_id"] = failure_id
    heads["topic_id"] = topic_id
    heads["kafka_partition"] = partition
    heads["kafka_offset"] = offset
    heads["values_length"] = np.fromiter(map(len, values), np.int64, len(values)) + 1
    heads["version"] = _JSONB_VERSION
    cursor = connection.connection.cursor()
    try:
        cursor.copy_expert(_COPY, _Stream(_chunks(heads, values)))
        copied: int = cursor.rowcount
    finally:
        cursor.close()
    return copied


def _chunks(heads: NDArray[np.void], values: Sequence[bytes]) -> Iterator[bytes]:
    yield _HEADER
    pieces = heads.view(f"V{heads.dtype.itemsize}")
    for at in range(0, len(values), _ROWS_A_CHUNK):
        part = values[at : at + _ROWS_A_CHUNK]
        both = [b""] * (2 * len(part))
        both[::2] = pieces[at : at + _ROWS_A_CHUNK].tolist()
        both[1::2] = part
        yield b"".join(both)
    yield _TRAILER


class _Stream:
    """What psycopg2 reads COPY's data from; it takes pieces of any size."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, size: int) -> bytes:
        return next(self._chunks, b"")
