"""Partitions of `readings`: one for all before the horizon, then one a day, made before a batch needs it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

import sqlalchemy as sa

from sensor_pipeline.postgres.database import Database

# A lock on `readings` is not waited for longer, so that a long query on it holds up the batches no longer either.
_LOCK_TIMEOUT = sa.text("SET LOCAL lock_timeout = '5s'")

_EXISTING = sa.text("""
    SELECT child.relname FROM pg_inherits
    JOIN pg_class child ON child.oid = pg_inherits.inhrelid
    WHERE pg_inherits.inhparent = 'readings'::regclass
""")
_HORIZON = sa.text("SELECT horizon FROM readings_horizon")
# With the rights of its owner: who writes need not own `readings`.
_MAKE = sa.text("SELECT make_readings_day(:day)")


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
            connection.execute(_LOCK_TIMEOUT)
            connection.execute(_MAKE, {"day": day})
    return missing


def _missing(connection: sa.Connection, wanted: set[date]) -> list[date]:
    horizon: date = connection.scalars(_HORIZON).one()
    existing = set(connection.scalars(_EXISTING))
    return sorted(day for day in wanted if day >= horizon and _table(day) not in existing)


def _table(day: date) -> str:
    return "readings_" + day.isoformat().replace("-", "")
