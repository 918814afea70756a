"""What the tests of this package share: histories, one try of a write, every row of every table, locks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from random import Random
from typing import TypeVar

import sqlalchemy as sa

from sensor_pipeline.drained import Drained
from sensor_pipeline.failures import detect
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.transaction import Origin, Written, write
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Rows, connect, expected
from sensor_pipeline_tests.test_any_history import Log, message

T = TypeVar("T")


def dated(machine: str, moment: datetime, failing: bool) -> bytes:
    """A message of this time."""
    inner = {"readings": {"a": 1}, "has_failure": failing}
    return json.dumps({"machine_id": machine, "timestamp": moment.isoformat(), "readings": inner}).encode()


def want(*logs: Log) -> Rows:
    """The rows that all messages of these logs must become."""
    return expected([message for log in logs for messages in log.partitions.values() for message in messages])


def busy_history(settings: Settings, *, seed: int = 1, readings: int = 240) -> Log:
    """A topic of four partitions: few machines, late readings, equal times, failures of all kinds, poison."""
    random = Random(seed)
    log = Log(settings, "busy", "busy-id")
    for at in range(readings):
        # The last machine comes late.
        machine = random.randrange(3 + (at > readings * 3 // 4))
        second = at // 4 - (random.randrange(40) if random.random() < 0.3 else 0)
        failing = (second // 5 + machine) % 3 == 0 if random.random() < 0.9 else random.random() < 0.5
        log.publish(random.randrange(4), message(f"m{machine}", second, failing))
        if random.random() < 0.05:
            log.publish(random.randrange(4), b"poison", bad="not_json")
    return log


def first_half(log: Log) -> list[OffsetRange]:
    """The older half of each partition."""
    return [OffsetRange(p, 0, len(messages) // 2) for p, messages in log.partitions.items()]


def batch_of(log: Log, *ranges: OffsetRange) -> Batch:
    """A batch of these ranges, or of all that was published."""
    everything = tuple(OffsetRange(p, 0, len(messages)) for p, messages in log.partitions.items())
    return Batch(log.topic, log.topic_id, ranges or everything)


def write_once(settings: Settings, batch: Batch, drained: Drained) -> Written:
    """One try: nothing is tried again, and a row that the database refuses is an error."""
    return write(Database(settings), batch, drained, detect(drained.readings), Origin(datetime.now(UTC)))


def ingest_once(settings: Settings, log: Log, *ranges: OffsetRange) -> Written:
    """Drain from memory and write, in one try."""
    batch = batch_of(log, *ranges)
    return write_once(settings, batch, log.drain(list(batch.ranges)))


def every_row(settings: Settings) -> dict[str, list[tuple[str, ...]]]:
    """All rows of all tables, each with its place and the transaction that wrote it: a row written anew differs."""
    with connect(settings).connect() as connection:
        tables = connection.scalars(sa.text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
        rows = {}
        for table in tables:
            found = connection.execute(sa.text(f"SELECT ctid::text, xmin::text, t::text FROM {table} t"))
            rows[table] = sorted(tuple(row) for row in found)
        return rows


def counts(settings: Settings) -> dict[str, int]:
    """How many rows each table has."""
    return {table: len(rows) for table, rows in every_row(settings).items()}


def until(found: Callable[[], T]) -> T:
    """Wait for something that comes sooner or later; returns it."""
    deadline = time.monotonic() + 60
    while not (result := found()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
    return result


def sessions(settings: Settings, *, waiting: bool = False) -> list[int]:
    """The server processes of other sessions in the database: all, or those that wait for a lock."""
    with connect(settings).connect() as connection:
        return list(
            connection.scalars(
                sa.text("""
                    SELECT pid FROM pg_stat_activity
                    WHERE datname = current_database() AND pid != pg_backend_pid() AND backend_type = 'client backend'
                      AND (NOT :waiting OR wait_event_type = 'Lock')
                    ORDER BY pid
                """),
                {"waiting": waiting},
            )
        )


@contextmanager
def other_session(settings: Settings, statement: str) -> Iterator[sa.Connection]:
    """A transaction of somebody else's that has run this statement and goes on until the block ends."""
    with connect(settings).connect() as connection:
        connection.execute(sa.text(statement))
        yield connection
        connection.rollback()
