"""What must be in PostgreSQL after the work, by a loop over it and none of the pipeline's code; and whether it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg2.extensions

from sensor_pipeline.bench.work import Work, WorkReading
from sensor_pipeline.errors import DataError

_STORED = """
    SELECT r.kafka_partition, r.kafka_offset, m.machine_id, r."timestamp", r.has_failure, CAST(r."values" AS text),
        f.start_time, f.end_time
    FROM readings r JOIN machines m ON m.id = r.machine_id LEFT JOIN failures f ON f.id = r.failure_id
    ORDER BY r.kafka_offset, r.kafka_partition
"""
_ROWS_A_FETCH = 10_000


@dataclass(frozen=True)
class Episode:
    """A failure; `end` is None while it is active. Naive times in UTC."""

    number: int
    start: datetime
    end: datetime | None


def episodes(work: Work) -> dict[tuple[int, int], Episode]:
    """For each failing reading, by partition and offset, its failure."""
    machines: dict[str, list[tuple[datetime, int, int, bool]]] = {}
    for r in work.messages():
        machines.setdefault(r.machine_id, []).append((r.timestamp, r.partition, r.offset, r.has_failure))
    found: dict[tuple[int, int], Episode] = {}
    number = 0
    for rows in machines.values():
        run: list[tuple[datetime, int, int, bool]] = []
        for row in [*sorted(rows), None]:
            if row is not None and row[3]:
                run.append(row)
            elif run:
                number += 1
                episode = Episode(number, run[0][0], None if row is None else row[0])
                found |= {(partition, offset): episode for _, partition, offset, _ in run}
                run = []
    return found


def check(work: Work, connection: psycopg2.extensions.connection) -> None:
    """Compare every reading of the work with what is stored of it.

    Raises:
        DataError: naming the first difference.
    """
    failures = episodes(work)
    stored = _stored(connection)
    for reading in work.messages():
        expected = _expected(reading, failures.get((reading.partition, reading.offset)))
        if (row := next(stored, None)) != expected:
            raise DataError(f"the result is wrong, so that no speed is reported: {row} is stored, not {expected}")
    if (row := next(stored, None)) is not None:
        raise DataError(f"the result is wrong, so that no speed is reported: {row} was never published")


def _expected(reading: WorkReading, failure: Episode | None) -> tuple[Any, ...]:
    values = msgspec.json.decode(reading.message)["readings"]["readings"]
    return (
        reading.partition,
        reading.offset,
        reading.machine_id,
        reading.timestamp,
        reading.has_failure,
        values,
        failure and failure.start,
        failure and failure.end,
    )


def _stored(connection: psycopg2.extensions.connection) -> Iterator[tuple[Any, ...]]:
    with connection, connection.cursor("stored") as cursor:
        cursor.itersize = _ROWS_A_FETCH
        cursor.execute(_STORED)
        for partition, offset, machine, moment, failing, values, start, end in cursor:
            moments = [at and at.astimezone(UTC).replace(tzinfo=None) for at in (moment, start, end)]
            yield (partition, offset, machine, moments[0], failing, msgspec.json.decode(values), *moments[1:])
