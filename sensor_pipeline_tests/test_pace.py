"""What falling behind is."""

from __future__ import annotations

from datetime import timedelta

from sensor_pipeline.offsets import OffsetRange, PartitionBacklog
from sensor_pipeline.pace import measure

QUARTER = timedelta(minutes=15)


def partition(number: int, *, ingested: int, end: int, first: int = 0) -> PartitionBacklog:
    return PartitionBacklog(
        partition=number, first=first, end=end, ingested=(OffsetRange(number, 0, ingested),) if ingested else ()
    )


def test_falling_behind_is_a_backlog_that_waits_while_no_more_is_ingested_than_comes_in() -> None:
    def is_behind(done: int, then: int, *, ingested: int = 50, first: int = 0) -> bool:
        backlog = [partition(0, ingested=ingested, end=200, first=first), partition(1, ingested=10, end=10)]
        return measure(backlog, {0: then, 1: 10}, done, QUARTER).falls_behind

    assert is_behind(done=0, then=200)
    assert is_behind(done=100, then=100)
    assert not is_behind(done=101, then=100), "it is being caught up"
    assert not is_behind(done=0, then=50), "nothing has waited for so long"
    assert not is_behind(done=0, then=200, first=200), "a gap waits for a person"
    assert is_behind(done=0, then=199, first=190)


def test_a_pace_says_how_much_comes_in_and_goes_out() -> None:
    pace = measure([partition(0, ingested=100, end=3_000)], {0: 1_200}, 900, QUARTER)
    assert (pace.arrived, pace.waiting, pace.lag) == (1_800, 1_100, 2_900)
    assert str(pace) == "2.0 readings/s in, 1.0 out"
