"""Where failures start and end in a frame, against a loop that a person can check by reading."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from sensor_pipeline.failures import NONE, ORDER, detect, recompute

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)

# The machine may be slow; nothing here is timed.
unhurried = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Row(NamedTuple):
    """A reading: these fields, in this order, are the order in which readings of all machines stand."""

    machine: Any
    timestamp: datetime
    topic_rank: int
    partition: int
    offset: int
    has_failure: bool


def frame(rows: list[Row]) -> pd.DataFrame:
    """As the package's functions take it; machines are numbers."""
    columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
    kinds = ["int64", "datetime64[us, UTC]", "int16", "int32", "int64", "bool"]
    data = {
        name: pd.Series(list(column), dtype="object").astype(kind)
        for name, column, kind in zip(Row._fields, columns, kinds, strict=True)
    }
    return pd.DataFrame(data)


def marked(rows: list[Row]) -> list[tuple[Row, bool, bool, bool]]:
    """Rows in order, each with: a failure starts here, one ends here, the machine's first."""
    result = []
    failing: dict[Any, bool] = {}
    for row in sorted(rows, key=lambda row: row[:5]):
        before = failing.get(row.machine)
        result.append((row, row.has_failure and not before, bool(before) and not row.has_failure, before is None))
        failing[row.machine] = row.has_failure
    return result


def detected(readings: pd.DataFrame) -> list[tuple[Row, bool, bool, bool]]:
    found = detect(readings)
    assert list(found.columns[-3:]) == ["starts", "ends", "first"]
    assert list(found.index) == list(range(len(readings)))
    assert [str(found[mark].dtype) for mark in ("starts", "ends", "first")] == ["bool"] * 3
    rows = found[list(Row._fields)].itertuples(index=False)
    marks = found[["starts", "ends", "first"]].itertuples(index=False)
    return [
        (Row(row[0], row[1].to_pydatetime(), *map(int, row[2:5]), bool(row[5])), *map(bool, mark))
        for row, mark in zip(rows, marks, strict=True)
    ]


NUMBERS = st.integers(1, 3)
NAMES = st.text("ab\u00fc\U0001f529", min_size=1, max_size=3)


@st.composite
def rows(draw: st.DrawFn, machines: st.SearchStrategy[Any] = NUMBERS) -> list[Row]:
    """Readings of few machines at few times; no two have the same place in Kafka."""
    readings = draw(
        st.lists(
            st.tuples(machines, st.integers(0, 5), st.integers(0, 1), st.integers(0, 2), st.booleans()), max_size=40
        )
    )
    offsets = draw(st.permutations(range(len(readings))))
    return [
        Row(machine, NOON + timedelta(microseconds=at), rank, partition, offset, failing)
        for (machine, at, rank, partition, failing), offset in zip(readings, offsets, strict=True)
    ]


@unhurried
@given(rows())
def test_starts_and_ends_are_those_of_a_loop_over_the_rows(readings: list[Row]) -> None:
    assert detected(frame(readings)) == marked(readings)


@unhurried
@given(rows(NAMES))
def test_machines_may_be_names(readings: list[Row]) -> None:
    named = frame([row._replace(machine=0) for row in readings])
    named["machine"] = pd.Categorical(np.array([row.machine for row in readings], object))
    assert detected(named) == marked(readings)


@unhurried
@given(rows(), st.randoms())
def test_the_order_of_the_rows_does_not_matter(readings: list[Row], random: Random) -> None:
    ordered = frame(readings).assign(values=[str(row.offset).encode() for row in readings])
    shuffled = ordered.iloc[random.sample(range(len(readings)), len(readings))]
    assert_frame_equal(detect(shuffled), detect(ordered))


@unhurried
@given(rows())
def test_the_frame_that_is_given_stays_as_it_is(readings: list[Row]) -> None:
    given_frame = frame(readings)
    detect(given_frame)
    assert_frame_equal(given_frame, frame(readings))


def test_a_failure_may_begin_with_the_first_and_go_on_past_the_last_reading() -> None:
    readings = [Row(1, NOON + timedelta(seconds=at), 0, 0, at, True) for at in range(3)]
    assert [marks for _, *marks in detected(frame(readings))] == [
        [True, False, True],
        [False, False, False],
        [False, False, False],
    ]


def test_a_failure_of_one_machine_does_not_end_with_a_reading_of_the_next() -> None:
    readings = [Row(1, NOON, 0, 0, 0, True), Row(2, NOON, 0, 0, 1, False), Row(3, NOON, 0, 0, 2, True)]
    assert [(mark[1], mark[2]) for mark in detected(frame(readings))] == [(True, False), (False, False), (True, False)]


@pytest.mark.parametrize("column", ["topic_rank", "partition", "offset"])
def test_of_readings_at_one_time_the_place_in_kafka_decides(column: str) -> None:
    first = Row(1, NOON, 0, 0, 0, True)
    second = first._replace(**{column: 1, "has_failure": False})
    assert [mark[2] for mark in detected(frame([second, first]))] == [False, True]
    first, second = first._replace(has_failure=False), second._replace(has_failure=True)
    assert [mark[2] for mark in detected(frame([second, first]))] == [False, False]


def test_microseconds_and_the_ends_of_time_are_told_apart() -> None:
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    moments = [last, last - timedelta(microseconds=1), first + timedelta(microseconds=1), first]
    readings = [Row(1, moment, 0, 0, at, at % 2 == 0) for at, moment in enumerate(moments)]
    assert [row.timestamp for row, *_ in detected(frame(readings))] == moments[::-1]


# A batch meets what is stored


class Episode(NamedTuple):
    """A failure, with the readings it holds."""

    machine: int
    start: datetime
    last: datetime
    end: datetime | None
    held: tuple[Row, ...]


def episodes(readings: list[Row]) -> list[Episode]:
    found: list[Episode] = []
    held: list[Row] = []

    def close(end: datetime | None) -> None:
        if held:
            found.append(Episode(held[0].machine, held[0].timestamp, held[-1].timestamp, end, tuple(held)))
            held.clear()

    for row in sorted(readings, key=lambda row: row[:5]):
        if held and held[0].machine != row.machine:
            close(None)
        if row.has_failure:
            held.append(row)
        else:
            close(row.timestamp)
    close(None)
    return found


@unhurried
@given(rows(), st.data())
def test_a_batch_and_the_stored_readings_make_the_failures_of_both_together(
    readings: list[Row], data: st.DataObject
) -> None:
    late = data.draw(st.lists(st.booleans(), min_size=len(readings), max_size=len(readings)))
    batch = [row for row, is_late in zip(readings, late, strict=True) if is_late]
    stored = [row for row, is_late in zip(readings, late, strict=True) if not is_late]
    before = episodes(stored)
    numbers = data.draw(st.permutations(range(7, 7 + len(before))))
    id_of = {row: number for number, episode in zip(numbers, before, strict=True) for row in episode.held}
    # Damaged data, in which a failure holds another's readings, is mended by the same rule.
    for row in data.draw(st.lists(st.sampled_from(sorted(id_of)), max_size=2)) if id_of else []:
        id_of[row] = data.draw(st.sampled_from([5, 20, *numbers]))
    # Reading ids that no batch index is.
    stored_frame = frame(stored).assign(failure_id=[id_of.get(row, NONE) for row in stored])
    stored_frame.index = pd.Index(range(1000, 1000 + len(stored)))

    recomputed = recompute(frame(batch), stored_frame)

    want = episodes(readings)
    got = recomputed.episodes
    assert got["machine"].tolist() == [episode.machine for episode in want]
    assert got["start"].tolist() == [episode.start for episode in want]
    assert got["last"].tolist() == [episode.last for episode in want]
    assert [None if pd.isna(end) else end for end in got["end"]] == [episode.end for episode in want]
    # In order of start, each goes on as the smallest id not yet taken that it shares a reading with.
    taken: list[int] = []
    for episode, failure_id in zip(want, got["id"].tolist(), strict=True):
        candidates = sorted({id_of[row] for row in episode.held if row in id_of} - set(taken))
        assert failure_id == (candidates[0] if candidates else NONE)
        taken.append(failure_id)
    assert recomputed.vanished == sorted(set(id_of.values()) - set(taken))
    in_episode = {row: place for place, episode in enumerate(want) for row in episode.held}
    assert recomputed.batch_episode.to_dict() == {
        at: in_episode[row] for at, row in enumerate(batch) if row.has_failure
    }
    assert recomputed.stored_episode.to_dict() == {
        1000 + at: in_episode[row] for at, row in enumerate(stored) if row.has_failure
    }


def test_readings_are_ordered_by_machine_time_topic_partition_and_offset() -> None:
    assert list(Row._fields[:5]) == ORDER
