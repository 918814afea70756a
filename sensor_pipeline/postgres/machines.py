"""Rows of `machines`: found by name, made, locked, and seen, within the one transaction of a batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

import pandas as pd
import sqlalchemy as sa

from sensor_pipeline.postgres.arrays import array, time_array

_KNOWN = sa.text("SELECT id, machine_id FROM machines WHERE machine_id = ANY (CAST(:names AS text[]))")
_ADD = sa.text("""
    INSERT INTO machines (machine_id, first_seen, last_seen)
    SELECT name, first, last FROM unnest(
        CAST(:names AS text[]), CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[])
    ) WITH ORDINALITY AS new (name, first, last, place)
    ORDER BY place ON CONFLICT (machine_id) DO NOTHING RETURNING id
""")
_LOCK = sa.text("""
    SELECT id FROM machines WHERE id = ANY (CAST(:ids AS bigint[])) ORDER BY id FOR NO KEY UPDATE
""")
_LAST_SEEN = sa.text("""
    SELECT id, last_seen FROM machines WHERE id = ANY (CAST(:ids AS bigint[]))
""")
_SEE = sa.text("""
    UPDATE machines SET first_seen = least(first_seen, new.first), last_seen = greatest(last_seen, new.last)
    FROM unnest(CAST(:ids AS bigint[]), CAST(:firsts AS timestamptz[]), CAST(:lasts AS timestamptz[]))
        AS new (id, first, last)
    WHERE machines.id = new.id
""")


def known(connection: sa.Connection, names: Sequence[str]) -> dict[str, int]:
    """`machines.id` by name, of those that are there."""
    return {name: machine for machine, name in connection.execute(_KNOWN, {"names": array(names)})}


def spans(readings: pd.DataFrame) -> pd.DataFrame:
    """The first and the last time (`min`, `max`) of each machine, by the frame's `machine`."""
    return readings.groupby("machine", observed=True)["timestamp"].agg(["min", "max"])


def add(connection: sa.Connection, spans: pd.DataFrame) -> set[int]:
    """Make machines, by name in order of name; returns the ids of those that another batch has not made meanwhile."""
    return set(connection.scalars(_ADD, {"names": array(spans.index)} | _ends(spans)))


def lock(connection: sa.Connection, ids: Sequence[int]) -> None:
    """Lock machines in order of id: whoever has them is alone with their failures."""
    connection.execute(_LOCK, {"ids": array(ids)})


def last_seen(connection: sa.Connection, ids: Sequence[int], *, made: Collection[int]) -> dict[int, datetime]:
    """The latest event time of each machine before this batch; those that it has `made` had none."""
    rows = connection.execute(_LAST_SEEN, {"ids": array(ids)})
    return {machine: moment for machine, moment in rows if machine not in made}


def see(connection: sa.Connection, spans: pd.DataFrame) -> None:
    """Widen when machines, by id, were first and last seen."""
    connection.execute(_SEE, {"ids": array(spans.index)} | _ends(spans))


def _ends(spans: pd.DataFrame) -> dict[str, str]:
    return {
        "firsts": time_array(spans["min"]),
        "lasts": time_array(spans["max"]),
    }
