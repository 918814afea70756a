"""Partitions of `readings`: one for all before the horizon, then one a day, made before a batch needs it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

import sqlalchemy as sa

from sensor_pipeline.postgres.database import Database

# Two runs make partitions one after the other; any number that no other program uses in this database.
_LOCK = 7_360_712_916
_LOCK_TIMEOUT = "5s"

_EXISTING = sa.text("""
    SELECT child.relname FROM pg_inherits
    JOIN pg_class child ON child.oid = pg_inherits.inhrelid
    WHERE pg_inherits.inhparent = 'readings'::regclass
""")
_HORIZON = sa.text("SELECT horizon FROM readings_horizon")


def ensure_days(database: Database, days: Iterable[date]) -> list[date]:
    """Make the partitions that the days (in UTC) of some readings need; returns the days made.

    Each is made as a table of its own and then attached, which blocks no writer; the wait for the lock is
    bounded, so that a long query on `readings` fails the batch (to be retried) rather than queueing all others.

    Raises:
        UnavailableError: the lock on `readings` was not to be had in time.
    """
    wanted = set(days)
    if not wanted:
        return []
    with database.begin() as connection:
        missing = _missing(connection, wanted)
    for day in missing:
        with database.begin() as connection:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            if _missing(connection, {day}):
                _make(connection, day)
    return missing


def _missing(connection: sa.Connection, wanted: set[date]) -> list[date]:
    horizon: date = connection.scalars(_HORIZON).one()
    existing = set(connection.scalars(_EXISTING))
    return sorted(day for day in wanted if day >= horizon and _table(day) not in existing)


def _make(connection: sa.Connection, day: date) -> None:
    table = _table(day)
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    # The last day that Python can name has no next one.
    end = f"'{start + timedelta(days=1)}'" if day < date.max else "MAXVALUE"
    connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"))
    connection.execute(sa.text(f"CREATE TABLE {table} (LIKE readings INCLUDING ALL)"))
    connection.execute(sa.text(f"ALTER TABLE readings ATTACH PARTITION {table} FOR VALUES FROM ('{start}') TO ({end})"))


def _table(day: date) -> str:
    return "readings_" + day.isoformat().replace("-", "")
