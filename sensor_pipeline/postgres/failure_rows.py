"""Rows of `failures` as frames, read and written; what they should be, `episodes` and `recompute` say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
from numpy.typing import NDArray

from sensor_pipeline.failures import NONE
from sensor_pipeline.postgres.arrays import array, time_array

UTC_MICROSECONDS = "datetime64[us, UTC]"

# The columns that `failure_frame` takes.
FAILURE = "id, machine_id, start_time, last_failing_time, end_time"

_NEW_IDS = sa.text("""
    SELECT nextval(pg_get_serial_sequence('failures', 'id')) FROM generate_series(1, CAST(:count AS bigint))
""")
_COLUMNS = """unnest(
        CAST(:ids AS bigint[]), CAST(:machines AS bigint[]), CAST(:starts AS timestamptz[]),
        CAST(:lasts AS timestamptz[]), CAST(:ends AS timestamptz[])
    ) AS new (id, machine_id, start_time, last_failing_time, end_time)"""
_INSERT = sa.text(f"""
    INSERT INTO failures (id, machine_id, start_time, last_failing_time, end_time, is_active)
    SELECT new.*, new.end_time IS NULL FROM {_COLUMNS}
""")
_UPDATE = sa.text(f"""
    UPDATE failures SET start_time = new.start_time, last_failing_time = new.last_failing_time,
        end_time = new.end_time, is_active = new.end_time IS NULL
    FROM {_COLUMNS} WHERE failures.id = new.id
""")
_DELETE = sa.text("DELETE FROM failures WHERE id = ANY (CAST(:ids AS bigint[]))")


@dataclass(frozen=True)
class Stored:
    """What became of failures: for each row of `episodes` whether it is new, was there and changed, or was active.

    `episodes` is as it was given, with an id for each.
    """

    episodes: pd.DataFrame
    is_new: NDArray[np.bool_]
    is_changed: NDArray[np.bool_]
    was_active: NDArray[np.bool_]


def read_failures(connection: sa.Connection, statement: sa.TextClause, **arguments: Any) -> pd.DataFrame:
    """The rows of a statement that selects `FAILURE`, as `failure_frame` describes them."""
    return failure_frame(connection.execute(statement, arguments).all())


def failure_frame(rows: Iterable[Any]) -> pd.DataFrame:
    """`id`, `machine` (int64), `start`, `last`, `end` (datetime64[us, UTC]; NaT while active)."""
    times = dict.fromkeys(("start", "last", "end"), UTC_MICROSECONDS)
    return to_frame(rows, {"id": "int64", "machine": "int64", **times})


def store_failures(
    connection: sa.Connection, episodes: pd.DataFrame, known: pd.DataFrame, vanished: list[int]
) -> Stored:
    """Write failures as they are now, the machines being locked.

    Args:
        connection: in a transaction.
        episodes: `machine`, `start`, `last`, `end`, and `id`, that of the stored failure or `NONE` for a new one.
        known: the stored failures, as `failure_frame` describes them.
        vanished: ids of stored failures that are none any more.
    """
    is_new = (episodes["id"] == NONE).to_numpy()
    if is_new.any():
        episodes = episodes.copy()
        episodes.loc[is_new, "id"] = connection.scalars(_NEW_IDS, {"count": int(is_new.sum())}).all()
    before = known.set_index("id").reindex(episodes["id"])
    same = np.ones(len(episodes), np.bool_)
    for edge in ("start", "last", "end"):
        old, new = before[edge].reset_index(drop=True), episodes[edge].reset_index(drop=True)
        same &= ((old == new) | (old.isna() & new.isna())).to_numpy()
    if vanished:
        connection.execute(_DELETE, {"ids": array(vanished)})
    is_changed = ~is_new & ~same
    if is_changed.any():
        connection.execute(_UPDATE, _arguments(episodes[is_changed]))
    if is_new.any():
        connection.execute(_INSERT, _arguments(episodes[is_new]))
    return Stored(episodes, is_new, is_changed, was_active=before["end"].isna().to_numpy() & ~is_new)


def to_frame(rows: Iterable[Any], columns: Mapping[str, str]) -> pd.DataFrame:
    """Rows as a frame of these columns and dtypes, also where there is none."""
    transposed = list(zip(*rows, strict=True)) or [()] * len(columns)
    return pd.DataFrame(
        {
            name: pd.Series(list(values), dtype="object").astype(kind)  # type: ignore[call-overload]
            for (name, kind), values in zip(columns.items(), transposed, strict=True)
        }
    )


def datetimes(column: pd.Series[pd.Timestamp]) -> list[datetime | None]:
    """Timestamps as the driver takes them one by one; NaT becomes None."""
    moments: NDArray[np.object_] = column.dt.to_pydatetime().to_numpy(dtype=object)
    return [None if moment is pd.NaT else moment for moment in moments]


def _arguments(episodes: pd.DataFrame) -> dict[str, Any]:
    return {
        "ids": array(episodes["id"]),
        "machines": array(episodes["machine"]),
        "starts": time_array(episodes["start"]),
        "lasts": time_array(episodes["last"]),
        "ends": time_array(episodes["end"]),
    }
