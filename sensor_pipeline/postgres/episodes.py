"""A batch's readings meet the stored failures: what is read for that, and what is written back.

Runs inside the one transaction, after the machines are locked, so that no other batch can change what is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from sensor_pipeline.failures import NONE, ORDER, Probes, Recomputed, edges, probes, recompute
from sensor_pipeline.notices import changes
from sensor_pipeline.postgres.arrays import array, time_array
from sensor_pipeline.postgres.failure_rows import (
    FAILURE,
    UTC_MICROSECONDS,
    datetimes,
    failure_frame,
    read_failures,
    store_failures,
    to_frame,
)

_ACTIVE = sa.text(f"""
    SELECT {FAILURE} FROM failures WHERE is_active AND machine_id = ANY (CAST(:machines AS bigint[]))
""")
# From the last failure that starts before the batch's first reading on. Those that start together with it are of
# zero length and end before that reading.
_TOUCHED = sa.text(f"""
    SELECT {FAILURE} FROM unnest(
        CAST(:machines AS bigint[]), CAST(:earliest AS timestamptz[]), CAST(:latest AS timestamptz[])
    ) AS batch (machine, earliest, latest)
    CROSS JOIN LATERAL (
        (SELECT {FAILURE} FROM failures
         WHERE machine_id = batch.machine AND start_time < batch.earliest
         ORDER BY start_time DESC, end_time DESC NULLS FIRST LIMIT 1)
        UNION ALL
        SELECT {FAILURE} FROM failures
        WHERE machine_id = batch.machine AND start_time BETWEEN batch.earliest AND batch.latest
    ) AS touched
""")
_BY_ID = sa.text(f"SELECT {FAILURE} FROM failures WHERE id = ANY (CAST(:ids AS bigint[]))")

# The bounds of all probes together let the planner leave the other days out: each partition of a statement costs
# two locks, and the server has few for one that is years old.
_PROBE = "unnest(CAST(:machines AS bigint[]), CAST(:moments AS timestamptz[])) AS probe (machine, moment)"
_AT = sa.text(f"""
    SELECT found.* FROM {_PROBE} CROSS JOIN LATERAL (
        SELECT id, machine_id, "timestamp", topic_id, kafka_partition, kafka_offset, has_failure, failure_id
        FROM readings WHERE machine_id = probe.machine AND "timestamp" = probe.moment
            AND "timestamp" BETWEEN :first AND :last OFFSET 0
    ) AS found
""")
_AFTER = sa.text(f"""
    SELECT probe.machine, next.moment FROM {_PROBE} CROSS JOIN LATERAL (
        SELECT "timestamp" AS moment FROM readings
        WHERE machine_id = probe.machine AND "timestamp" > probe.moment
            AND "timestamp" BETWEEN :first AND :until ORDER BY "timestamp" LIMIT 1
    ) AS next
""")
_BEFORE = sa.text(f"""
    SELECT probe.machine, next.moment FROM {_PROBE} CROSS JOIN LATERAL (
        SELECT "timestamp" AS moment FROM readings
        WHERE machine_id = probe.machine AND "timestamp" < probe.moment
            AND "timestamp" BETWEEN :since AND :last ORDER BY "timestamp" DESC LIMIT 1
    ) AS next
""")

_REPOINT_ONE = sa.text("""
    UPDATE readings SET failure_id = new.failure_id
    FROM unnest(
        CAST(:ids AS bigint[]), CAST(:machines AS bigint[]), CAST(:moments AS timestamptz[]),
        CAST(:failures AS bigint[])
    ) AS new (id, machine, moment, failure_id)
    WHERE readings.machine_id = new.machine AND readings."timestamp" = new.moment AND readings.id = new.id
        AND readings."timestamp" BETWEEN :first AND :last
""")
_REPOINT_BETWEEN = sa.text("""
    UPDATE readings SET failure_id = :new
    WHERE machine_id = :machine AND "timestamp" > :start AND "timestamp" < :last AND failure_id = :old
""")


@dataclass(frozen=True)
class FailureEvent:
    """A failure that a batch started or ended."""

    failure_id: int
    machine_id: int
    at: datetime


@dataclass(frozen=True)
class Settled:
    """What a batch did to the failures.

    `failure_id` holds, for each failing reading of the batch by its index, the id of its failure. `told` are the
    notices that follow, as `notices.changes` gives them.
    """

    failure_id: pd.Series[int]
    started: list[FailureEvent]
    ended: list[FailureEvent]
    told: pd.DataFrame


def settle(
    connection: sa.Connection,
    batch: pd.DataFrame,
    last_seen: Mapping[int, datetime],
    topic_ranks: Mapping[int, int],
) -> Settled:
    """Recompute and store the failures that a batch touches.

    Args:
        connection: in the one transaction; the batch's machines are locked, its healthy readings copied in.
        batch: as `failures.detect` returns it, with `machine` as `machines.id`.
        last_seen: for each machine its latest event time before this batch (missing: it is new).
        topic_ranks: rank by `topics.id`.
    """
    machine = batch["machine"]
    is_late = batch["timestamp"] <= pd.Series(last_seen, dtype=UTC_MICROSECONDS).reindex(machine).array
    late_machines = machine[is_late].unique()
    matters = batch["has_failure"] | batch["ends"] | batch["first"] | machine.isin(late_machines)
    in_order = np.setdiff1d(machine.unique(), late_machines)
    active = read_failures(connection, _ACTIVE, machines=array(in_order))
    known, stored = active, _stand_ins(active)
    if len(late_machines):
        spans = batch[machine.isin(late_machines)].groupby("machine")["timestamp"].agg(["min", "max"])
        until = max(last_seen[m] for m in late_machines)
        late_failures, late_readings = _late(connection, batch[is_late], spans, topic_ranks, until)
        known = pd.concat([active, late_failures], ignore_index=True)
        stored = pd.concat([stored, late_readings])
    recomputed = recompute(batch[matters], stored)
    return _store(connection, recomputed, known, stored)


def _late(
    connection: sa.Connection,
    late: pd.DataFrame,
    spans: pd.DataFrame,
    topic_ranks: Mapping[int, int],
    until: datetime,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The failures that a late machine's batch touches, and the stored readings that can matter (see `failures`).

    `spans` has the first and last timestamp in the batch of each machine with late readings: what comes after its
    last seen reading touches a failure too, the active one. No stored reading of theirs comes after `until`.
    """
    known = read_failures(
        connection,
        _TOUCHED,
        machines=array(spans.index),
        earliest=time_array(spans["min"]),
        latest=time_array(spans["max"]),
    )
    moments = _neighbours(connection, probes(late, known), known, until)
    readings = _reading_frame([], topic_ranks)
    while not moments.empty:
        readings = pd.concat([readings, _readings_at(connection, moments, topic_ranks)])
        readings = readings[~readings.index.duplicated()]
        # A neighbour may belong to a failure that no late reading lies in: it is needed whole.
        found = set(readings["failure_id"]) - {NONE} - set(known["id"])
        joined = read_failures(connection, _BY_ID, ids=array(found)) if found else failure_frame([])
        known = pd.concat([known, joined], ignore_index=True)
        moments = edges(joined)
    return known, readings


def _neighbours(connection: sa.Connection, where: Probes, known: pd.DataFrame, until: datetime) -> pd.DataFrame:
    """All timestamps at which readings are to be read."""
    found = [where.at]
    # What comes before a reading is asked only inside of a failure.
    since = known["start"].min().to_pydatetime() if not where.before.empty else None
    for statement, frame in ((_AFTER, where.after), (_BEFORE, where.before)):
        if not frame.empty:
            rows = connection.execute(statement, _probe_arguments(frame) | {"since": since, "until": until}).all()
            found.append(to_frame(rows, {"machine": "int64", "timestamp": UTC_MICROSECONDS}))
    return pd.concat(found).drop_duplicates()


def _readings_at(connection: sa.Connection, moments: pd.DataFrame, topic_ranks: Mapping[int, int]) -> pd.DataFrame:
    return _reading_frame(connection.execute(_AT, _probe_arguments(moments)).all(), topic_ranks)


def _store(connection: sa.Connection, recomputed: Recomputed, known: pd.DataFrame, readings: pd.DataFrame) -> Settled:
    stored = store_failures(connection, recomputed.episodes, known, recomputed.vanished)
    episodes = stored.episodes
    _repoint(connection, recomputed, episodes, readings)
    ended = episodes[episodes["end"].notna() & (stored.is_new | stored.was_active)]
    return Settled(
        failure_id=recomputed.batch_episode.map(episodes["id"]).astype(np.int64),
        started=_events(episodes[stored.is_new], "start"),
        ended=_events(ended, "end"),
        told=changes(known, episodes, recomputed.vanished),
    )


def _repoint(connection: sa.Connection, recomputed: Recomputed, episodes: pd.DataFrame, readings: pd.DataFrame) -> None:
    """Let stored failing readings follow their failure: those read one by one, those between them by range."""
    of_stored = recomputed.stored_episode[recomputed.stored_episode.index >= 0]
    if of_stored.empty:
        return
    moved = readings.loc[of_stored.index, ["machine", "timestamp", "failure_id"]].assign(episode=of_stored)
    moved["new"] = moved["episode"].map(episodes["id"])
    moved = moved[moved["new"] != moved["failure_id"]]
    if moved.empty:
        return
    connection.execute(
        _REPOINT_ONE,
        {
            "ids": array(moved.index),
            "machines": array(moved["machine"]),
            "moments": time_array(moved["timestamp"]),
            "first": moved["timestamp"].min().to_pydatetime(),
            "last": moved["timestamp"].max().to_pydatetime(),
            "failures": array(moved["new"]),
        },
    )
    for episode, old in moved[["episode", "failure_id"]].drop_duplicates().itertuples(index=False):
        now = episodes.loc[episode]
        connection.execute(
            _REPOINT_BETWEEN,
            {
                "new": int(now["id"]),
                "old": int(old),
                "machine": int(now["machine"]),
                "start": now["start"].to_pydatetime(),
                "last": now["last"].to_pydatetime(),
            },
        )


def _stand_ins(active: pd.DataFrame) -> pd.DataFrame:
    """An active failure's first and last readings, where all of the batch comes after them.

    Only their order before the batch's readings counts, so partition and offset may be anything.
    """
    both = pd.concat([active.assign(timestamp=active["start"]), active.assign(timestamp=active["last"])])
    both = both.reset_index(drop=True)
    stand_ins = both.assign(topic_rank=0, partition=0, offset=both.index, has_failure=True, failure_id=both["id"])
    stand_ins.index = -1 - stand_ins.index
    return stand_ins[[*ORDER, "has_failure", "failure_id"]]


def _reading_frame(rows: Iterable[Any], topic_ranks: Mapping[int, int]) -> pd.DataFrame:
    """Stored readings as `failures.recompute` takes them."""
    found = to_frame(
        rows,
        {
            "id": "int64",
            "machine": "int64",
            "timestamp": UTC_MICROSECONDS,
            "topic_id": "int64",
            "partition": "int64",
            "offset": "int64",
            "has_failure": "bool",
            "failure_id": "object",
        },
    )
    found["failure_id"] = found["failure_id"].fillna(NONE).astype("int64")
    found["topic_rank"] = found["topic_id"].map(topic_ranks).astype("int64")
    return found.set_index("id")[[*ORDER, "has_failure", "failure_id"]]


def _probe_arguments(frame: pd.DataFrame) -> dict[str, Any]:
    moments = frame["timestamp"]
    return {
        "machines": array(frame["machine"]),
        "moments": time_array(moments),
        "first": moments.min().to_pydatetime(),
        "last": moments.max().to_pydatetime(),
    }


def _events(episodes: pd.DataFrame, edge: str) -> list[FailureEvent]:
    columns = zip(episodes["id"].tolist(), episodes["machine"].tolist(), datetimes(episodes[edge]), strict=True)
    return [FailureEvent(failure_id, machine, at) for failure_id, machine, at in columns if at is not None]
