"""Falling behind is told from the rhythm of batches."""

from __future__ import annotations

from itertools import accumulate

from sensor_pipeline.pace import Pace, PaceWatch


def seen(arrivals: list[int], done: list[int], seconds: int = 5) -> Pace | None:
    """What a watch says last, with so many offsets coming in and ingested between two looks."""
    watch, pace = PaceWatch(), None
    for at, (end, ingested) in enumerate(zip(accumulate(arrivals), accumulate(done), strict=True)):
        pace = watch.see(float(at * seconds), end, end - ingested)
    return pace


def test_nothing_is_said_before_a_minute_was_seen() -> None:
    assert seen([5000] * 12, [0] * 12) is None
    assert seen([5000] * 13, [0] * 13) is not None


def test_a_lag_that_grows_is_falling_behind_and_by_how_much() -> None:
    pace = seen([5000] * 60, [2500] * 60)
    assert pace is not None
    assert (pace.arriving, pace.ingested, pace.lag) == (1000, 500, 150_000)
    assert pace.falls_behind


def test_batches_that_come_in_their_rhythm_are_not() -> None:
    pace = seen([5000] * 60, [0, 10_000] * 30)
    assert pace is not None
    assert not pace.falls_behind


def test_a_backlog_that_shrinks_is_not() -> None:
    pace = seen([1_000_000] + [5000] * 59, [7000] * 60)
    assert pace is not None
    assert not pace.falls_behind


def test_only_the_last_minutes_count() -> None:
    pace = seen([5000] * 60 + [0] * 60, [0] * 60 + [2500] * 60)
    assert pace is not None
    assert (pace.arriving, pace.ingested) == (0, 500)
    assert not pace.falls_behind


def test_a_clock_that_jumps_leaves_what_was_seen_last() -> None:
    watch = PaceWatch()
    watch.see(0.0, 0, 0)
    pace = watch.see(10_000.0, 1_000_000, 0)
    assert pace is not None
    assert pace.arriving == 100
