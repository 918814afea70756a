"""Partitions of `readings`: one for all before the horizon, then one a day, made ahead and dropped when they are old.

Functions of the database make and drop them (migration 0006), so that whoever calls them need not own the table.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta

import sqlalchemy as sa

from sensor_pipeline.postgres.database import Database

# A lock on `readings` is not waited for longer, so that a long query on it holds up the batches no longer either.
_LOCK_TIMEOUT = sa.text("SET LOCAL lock_timeout = '5s'")
# To end what is being written takes seconds; other batches wait meanwhile, and lose nothing by it.
_DROP_TIMEOUT = sa.text("SET LOCAL lock_timeout = '30s'")

_EXISTING = sa.text("""
    SELECT child.relname FROM pg_inherits
    JOIN pg_class child ON child.oid = pg_inherits.inhrelid
    WHERE pg_inherits.inhparent = 'readings'::regclass
""")
_HORIZON = sa.text("SELECT horizon FROM readings_horizon")
_MAKE = sa.text("SELECT make_readings_day(:day)")

_HOLD_KEPT = sa.text("SELECT pg_advisory_xact_lock_shared(7360712917)")
_KEPT_FROM = sa.text("SELECT kept_from FROM readings_horizon")
_IS_TO_DROP = sa.text("SELECT kept_from IS DISTINCT FROM dropped_before FROM readings_horizon")
_KEEP_FROM = sa.text("SELECT keep_readings_from(:day)")
_DROP = sa.text("SELECT drop_readings()")


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
        horizon: date = connection.scalars(_HORIZON).one()
        existing = set(connection.scalars(_EXISTING))
    missing = sorted(day for day in wanted if day >= horizon and _table(day) not in existing)
    for day in missing:
        with database.begin() as connection:
            connection.execute(_LOCK_TIMEOUT)
            connection.execute(_MAKE, {"day": day})
    return missing


def kept_from(connection: sa.Connection) -> date | None:
    """The day (UTC) before which no reading is kept, None where all are; it stays so until the transaction ends."""
    connection.execute(_HOLD_KEPT)
    return look_kept_from(connection)


def look_kept_from(connection: sa.Connection) -> date | None:
    """The same, as it is at this moment."""
    day: date | None = connection.scalars(_KEPT_FROM).one()
    return day


@dataclass(frozen=True)
class Dropped:
    """How many readings were dropped, and the day (UTC) from which on they are kept now (None: all are)."""

    readings: int
    kept_from: date | None


def drop_readings(database: Database, before: date, most_seconds: float) -> Dropped:
    """Drop the readings of all days (UTC) before some day, a day at a time, each in a transaction of its own.

    Only whole partitions are dropped: nothing happens until all that is before the horizon is too old. Readings that
    come later for a dropped day are rejected. Stopped at any time, or after `most_seconds`, the next call goes on.

    Raises:
        UnavailableError: the lock on `readings` was not to be had in time, such as for a long query on it.
    """
    deadline = time.monotonic() + most_seconds
    readings = 0
    for day in (None, *_steps(database, before)):
        if time.monotonic() > deadline:
            break
        if day is None:
            # What an earlier call began.
            with database.begin() as connection:
                is_due = connection.scalars(_IS_TO_DROP).one()
        else:
            with database.begin() as connection:
                connection.execute(_DROP_TIMEOUT)
                is_due = connection.scalars(_KEEP_FROM, {"day": day}).one()
        if is_due:
            with database.begin() as connection:
                connection.execute(_LOCK_TIMEOUT)
                readings += connection.scalars(_DROP).one()
    with database.begin() as connection:
        return Dropped(readings, look_kept_from(connection))


def _steps(database: Database, before: date) -> list[date]:
    """The days to keep readings from, one after the other: each leaves one partition less."""
    with database.begin() as connection:
        horizon: date = connection.scalars(_HORIZON).one()
        existing = set(connection.scalars(_EXISTING))
    if before < horizon:
        return []
    old = [day for day in map(_day, existing) if day and day < before]
    return sorted({horizon, *(day + timedelta(days=1) for day in old), before})


def _table(day: date) -> str:
    return "readings_" + day.isoformat().replace("-", "")


def _day(table: str) -> date | None:
    try:
        return date.fromisoformat(table.removeprefix("readings_"))
    except ValueError:
        return None
