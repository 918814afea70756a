"""Readings in event-time order → failures.

A failure is an unbroken run of a machine's failing readings: it starts at the first of them, and ends at the
first healthy reading after the last. Readings of a machine are ordered by timestamp and, where that is
equal, by the topic's rank (name, then Kafka topic id), partition and offset (`ORDER`).

A batch meets failures that are stored already. `recompute` puts both together without reading the machine's
history: it takes the batch's readings and those *stored readings that can matter*, which are

- all at the first, the last failing and the ending timestamp of each failure that the batch touches,
- all at the timestamps next to a late reading where that reading starts, splits or joins something.

A stored reading that is left out lies inside a failure and between failing ones, or among healthy ones that
separate nothing, so the runs found are those of the whole history. `probes` says where to look.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

ORDER = ["machine", "timestamp", "topic_rank", "partition", "offset"]

# The id of no failure.
NONE = 0


def detect(readings: pd.DataFrame) -> pd.DataFrame:
    """Sort a batch's readings into event-time order and mark where its failing runs begin and end.

    Args:
        readings: `machine` (int or categorical), `timestamp` (datetime64[us, UTC]), `topic_rank`,
            `partition`, `offset` (ints), `has_failure` (bool), and any other columns.

    Returns:
        The same rows in `ORDER`, with two bool columns more: `starts` on the first failing reading of each
        run, `ends` on the first healthy reading after it; and `first` on the first reading of each machine.
    """
    keys = [_codes(readings[column]) for column in reversed(ORDER)]
    ordered = readings.take(np.lexsort(keys)).reset_index(drop=True)
    machine = _codes(ordered["machine"])
    failing = ordered["has_failure"].to_numpy(np.bool_)
    first = np.ones(len(ordered), np.bool_)
    first[1:] = machine[1:] != machine[:-1]
    before = np.zeros(len(ordered), np.bool_)
    before[1:] = failing[:-1] & ~first[1:]
    return ordered.assign(starts=failing & ~before, ends=~failing & before, first=first)


@dataclass(frozen=True)
class Probes:
    """Where to look for stored readings, each a frame of `machine` and `timestamp`.

    `at`: all readings at this timestamp; `after` and `before`: all at the next timestamp on that side that has
    a reading of the machine.
    """

    at: pd.DataFrame
    after: pd.DataFrame
    before: pd.DataFrame


def probes(late: pd.DataFrame, failures: pd.DataFrame) -> Probes:
    """Where to look for the stored readings that late readings need.

    Args:
        late: `machine`, `timestamp`, `has_failure` of readings not after what is stored of their machine.
        failures: `machine`, `start`, `last`, `end` (NaT while active) of each stored failure from the last
            one that starts before a machine's first late reading on.
    """
    late = late[["machine", "timestamp", "has_failure"]].drop_duplicates().sort_values("timestamp")
    # Of failures that start together all but one have zero length: the long one is the one to be inside of.
    spans = failures.sort_values(["start", "end"], na_position="last")
    spans = spans[["machine", "start", "last", "end"]].drop_duplicates(["machine", "start"], keep="last")
    beside = pd.merge_asof(late, spans, left_on="timestamp", right_on="start", by="machine")
    moment = beside["timestamp"]
    failing = beside["has_failure"]
    in_failing_part = moment <= beside["last"]
    in_failure = beside["start"].notna() & (beside["end"].isna() | (moment < beside["end"]))
    splits = beside.loc[~failing & in_failing_part, ["machine", "timestamp"]]
    begins = beside.loc[failing & ~in_failure, ["machine", "timestamp"]]
    both = pd.concat([splits, begins]).drop_duplicates()
    return Probes(at=pd.concat([both, edges(failures)]).drop_duplicates(), after=both, before=splits)


def edges(failures: pd.DataFrame) -> pd.DataFrame:
    """Each failure's first, last failing and ending timestamps, as a frame of `machine` and `timestamp`."""
    parts = [failures[["machine", edge]].rename(columns={edge: "timestamp"}) for edge in ("start", "last", "end")]
    return pd.concat(parts).dropna().drop_duplicates()


@dataclass(frozen=True)
class Recomputed:
    """What a batch makes of the failures that it touches.

    `episodes` has a row for each failure as it is now, in order of machine and start: `machine`, `start`,
    `last`, `end`, and `id`, the stored failure that it goes on as, or `NONE` for a new one. `vanished` are the
    ids that none goes on as. `batch_episode` is, for each failing reading of the batch by its index, the
    row of its failure in `episodes`; `stored_episode` the same for stored failing readings, by reading id.
    """

    episodes: pd.DataFrame
    vanished: list[int]
    batch_episode: pd.Series[int]
    stored_episode: pd.Series[int]


def recompute(batch: pd.DataFrame, stored: pd.DataFrame) -> Recomputed:
    """Failures from a batch's readings and the stored ones that can matter.

    Args:
        batch: readings with the columns of `ORDER` and `has_failure`; healthy ones that can neither end nor
            split anything may be left out.
        stored: the same columns, with `failure_id` (`NONE` for a healthy one) and, as index, the reading's id
            (negative where a failure's own row stands in for its readings).
    """
    rows = pd.concat(
        [
            batch[[*ORDER, "has_failure"]].assign(failure_id=NONE, stored=False, key=batch.index),
            stored[[*ORDER, "has_failure", "failure_id"]].assign(stored=True, key=stored.index),
        ],
        ignore_index=True,
    )
    rows = detect(rows)
    rows["episode"] = rows["starts"].cumsum() - 1
    failing = rows[rows["has_failure"]]
    grouped = failing.groupby("episode", sort=True)
    episodes = pd.DataFrame(
        {
            "machine": grouped["machine"].first(),
            "start": grouped["timestamp"].first(),
            "last": grouped["timestamp"].last(),
        }
    )
    ends = rows[rows["ends"]]
    episodes["end"] = pd.Series(ends["timestamp"].array, index=ends["episode"].to_numpy()).reindex(episodes.index)
    shared = failing.loc[failing["failure_id"] != NONE, ["episode", "failure_id"]].drop_duplicates()
    episodes["id"] = pd.Series(keep_ids(shared), dtype="int64").reindex(episodes.index, fill_value=NONE)
    kept = set(episodes["id"])
    of_stored = failing[failing["stored"]]
    of_batch = failing[~failing["stored"]]
    return Recomputed(
        episodes=episodes,
        vanished=sorted(set(shared["failure_id"]) - kept),
        batch_episode=of_batch.set_index("key")["episode"],
        stored_episode=of_stored.set_index("key")["episode"],
    )


def keep_ids(shared: pd.DataFrame) -> dict[int, int]:
    """Episode → id: in order of start, the smallest id not yet taken among those it shares a reading with.

    Args:
        shared: `episode` (ascending in order of start) and `failure_id`, a row for each pair with a reading in common.
    """
    taken: set[int] = set()
    kept: dict[int, int] = {}
    ordered = shared.sort_values(["episode", "failure_id"])
    for episode, failure_id in zip(ordered["episode"].tolist(), ordered["failure_id"].tolist(), strict=True):
        if episode not in kept and failure_id not in taken:
            kept[episode] = failure_id
            taken.add(failure_id)
    return kept


def _codes(column: pd.Series[int]) -> NDArray[np.generic]:
    """Integers that sort and compare as the column does within one frame."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return np.asarray(column.cat.codes)
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        return column.to_numpy("datetime64[us]").view(np.int64)
    return column.to_numpy()
