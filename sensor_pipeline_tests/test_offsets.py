"""Ranges behave as sets of offsets do, and a plan is exact, fair and never stuck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline import offsets
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.offsets import (
    MAX_OFFSET,
    Batch,
    OffsetRange,
    PartitionBacklog,
    Plan,
    contiguous_prefix,
    intersect,
    lane_of,
    pause,
    plan,
    subtract,
    total,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TICK = timedelta(seconds=5)

# A machine that others use too may take any time.
untimed = hypothesis_settings(deadline=None)
few = hypothesis_settings(untimed, max_examples=40)

Place = tuple[int, int]


def places(ranges: Iterable[OffsetRange]) -> set[Place]:
    return {(r.partition, offset) for r in ranges for offset in range(r.start, r.end)}


def ranges_of(found: Iterable[Place]) -> tuple[OffsetRange, ...]:
    """The longest ranges that hold exactly these places."""
    ranges: list[OffsetRange] = []
    for partition, offset in sorted(found):
        if ranges and (ranges[-1].partition, ranges[-1].end) == (partition, offset):
            ranges[-1] = replace(ranges[-1], end=offset + 1)
        else:
            ranges.append(OffsetRange(partition, offset, offset + 1))
    return tuple(ranges)


# Overlapping, empty, in any order.
any_ranges = st.lists(
    st.builds(
        lambda partition, start, length: OffsetRange(partition, start, start + length),
        st.integers(0, 1),
        st.integers(0, 12),
        st.integers(0, 6),
    ),
    max_size=6,
)
place_sets = st.sets(st.tuples(st.integers(0, 1), st.integers(0, 14)))


@untimed
@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 30))))
def test_places_are_held_by_the_longest_ranges_and_nothing_else_is(found: set[Place]) -> None:
    ranges = offsets.ranges_of([*found, *found])
    assert places(ranges) == found
    assert all(a.partition < b.partition or a.end < b.start for a, b in pairwise(ranges))


@untimed
@given(any_ranges, any_ranges)
def test_subtract_is_the_difference_of_sets(ranges: list[OffsetRange], taken: list[OffsetRange]) -> None:
    assert places(subtract(ranges, taken)) == places(ranges) - places(taken)


@untimed
@given(place_sets, place_sets)
def test_what_subtract_leaves_is_in_order_and_as_long_as_can_be(wanted: set[Place], taken: set[Place]) -> None:
    assert subtract(ranges_of(wanted)[::-1], ranges_of(taken)[::-1]) == list(ranges_of(wanted - taken))


@untimed
@given(any_ranges, any_ranges)
def test_intersect_is_the_intersection_of_sets(ranges: list[OffsetRange], others: list[OffsetRange]) -> None:
    assert places(intersect(ranges, others)) == places(ranges) & places(others)


@untimed
@given(place_sets, place_sets)
def test_intersect_counts_no_offset_twice(ranges: set[Place], others: set[Place]) -> None:
    both = intersect(ranges_of(ranges), ranges_of(others))
    assert total(both) == len(ranges & others)
    assert both == sorted(both)


@untimed
@given(st.sets(st.integers(0, 14)), st.randoms())
def test_the_contiguous_prefix_ends_at_the_first_offset_missing(done: set[int], random: object) -> None:
    ingested = [*ranges_of((0, offset) for offset in done), *(OffsetRange(0, o, o + 1) for o in done)]
    random.shuffle(ingested)  # type: ignore[attr-defined]
    assert contiguous_prefix(ingested) == next(offset for offset in range(16) if offset not in done)


@untimed
@given(any_ranges)
def test_the_total_of_ranges_is_the_sum_of_their_lengths(ranges: list[OffsetRange]) -> None:
    assert total(ranges) == sum(r.end - r.start for r in ranges)


@pytest.mark.parametrize(
    ("partition", "start", "end"), [(-1, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, MAX_OFFSET + 1), (2**31, 0, 1)]
)
def test_a_range_that_cannot_be_is_refused(partition: int, start: int, end: int) -> None:
    with pytest.raises(ConfigurationError, match="wrong offset range"):
        OffsetRange(partition, start, end)


@pytest.mark.parametrize("ranges", [(), (OffsetRange(0, 0, 1), OffsetRange(0, 5, 6))])
def test_a_batch_has_one_range_for_each_of_its_partitions(ranges: tuple[OffsetRange, ...]) -> None:
    with pytest.raises(ConfigurationError, match="wrong batch"):
        Batch("topic", "id", ranges)


def test_a_batch_puts_its_ranges_in_order_of_partition() -> None:
    batch = Batch("topic", "id", (OffsetRange(2, 0, 5), OffsetRange(0, 3, 4)))
    assert batch.partitions == (0, 2)
    assert len(batch) == 6
    assert str(batch) == "topic 0:3-4 2:0-5"


@st.composite
def backlogs(draw: st.DrawFn, partition: int) -> PartitionBacklog:
    """Any state that a partition can be in: a gap, holes in the ledger, batches in flight, failed ones."""
    end = draw(st.integers(0, 20))
    first = draw(st.one_of(st.just(0), st.integers(0, end)))
    owner = draw(st.lists(st.sampled_from("....id"), min_size=end, max_size=end))
    failed = draw(
        st.lists(
            st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(-700, 0) | st.integers(-15, 0)),
            max_size=draw(st.sampled_from([0, 3])),
        )
    )
    return PartitionBacklog(
        partition=partition,
        first=first,
        end=end,
        ingested=ranges_of((partition, offset) for offset, who in enumerate(owner) if who == "d"),
        in_flight=ranges_of((partition, offset) for offset, who in enumerate(owner) if who == "i"),
        failed=tuple(
            (OffsetRange(partition, start, start + length), NOW + timedelta(seconds=age))
            for start, length, age in failed
        ),
    )


@st.composite
def topics(draw: st.DrawFn) -> list[PartitionBacklog]:
    return [draw(backlogs(partition)) for partition in range(draw(st.integers(1, 6)))]


@untimed
@given(
    topics(),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 3),
    st.dictionaries(st.integers(0, 3), st.integers(0, 4)),
)
def test_a_plan_is_exact(
    partitions: list[PartitionBacklog], lanes: int, batch_size: int, limit: int, in_flight: dict[int, int]
) -> None:
    """Never what is done or owned, never too much, each lane its own, and trouble alone."""
    planned = plan(
        partitions, lanes=lanes, batch_size=batch_size, in_flight_limit=limit, in_flight=in_flight, now=NOW
    ).batches

    free = {
        (p.partition, offset)
        for p in partitions
        for offset in set(range(p.end)) - {o for _, o in places((*p.ingested, *p.in_flight))}
    }
    owned: set[Place] = set()
    for batch in planned:
        mine = places(batch.ranges)
        assert 0 < len(mine) <= batch_size
        assert len(mine) == total(batch.ranges)
        assert all(len(r) for r in batch.ranges)
        assert mine <= free - owned
        owned |= mine
        assert len({r.partition for r in batch.ranges}) == len(batch.ranges)
        assert {r.partition % lanes for r in batch.ranges} == {batch.lane}
        for r in batch.ranges:
            state = partitions[r.partition]
            failures = [ended for tried, ended in state.failed if tried.start <= r.start < tried.end]
            assert len(batch.ranges) == 1 or not (state.gap or failures)
            assert not failures or max(failures) + pause(len(failures)) <= NOW
    for lane, count in Counter(batch.lane for batch in planned).items():
        assert count + in_flight.get(lane, 0) <= limit
    # Whoever has room, and something to do that need not wait, does something.
    for lane in range(lanes):
        ready = [p for p in partitions if lane_of(p.partition, lanes) == lane and p.next_range and not p.retry_at()]
        if ready and in_flight.get(lane, 0) < limit:
            assert lane in {batch.lane for batch in planned}


@pytest.mark.parametrize(
    ("backlog", "in_flight", "sizes"),
    [
        (1_000, 0, [100, 100, 100, 100]),
        (1_000, 2, [100, 100]),
        (1_000, 4, []),
        (250, 0, [100, 100]),
        (150, 0, [100, 50]),
        (50, 2, []),
    ],
)
def test_only_full_batches_are_planned_beyond_those_in_flight(backlog: int, in_flight: int, sizes: list[int]) -> None:
    """What is less than a batch grows while it waits: under a trickle runs would only get smaller and more."""
    partition = PartitionBacklog(partition=0, first=0, end=backlog)
    planned = plan(
        [partition], lanes=1, batch_size=100, in_flight_limit=2, planned_limit=4, in_flight={0: in_flight}, now=NOW
    )
    assert [total(batch.ranges) for batch in planned.batches] == sizes


@pytest.mark.parametrize("trouble", ["gap", "failed"])
def test_a_partition_that_is_tried_alone_is_not_kept_waiting_by_what_is_planned_ahead(trouble: str) -> None:
    """The others have full batches for ever: nothing more is planned ahead until it has had its turn."""
    failed = ((OffsetRange(0, 0, 100), NOW - timedelta(days=1)),) if trouble == "failed" else ()
    troubled = PartitionBacklog(partition=0, first=10 if trouble == "gap" else 0, end=1_000, failed=failed)
    endless = PartitionBacklog(partition=1, first=0, end=100_000)
    for busy, turn in ((4, False), (2, False), (1, True), (0, True)):
        planned = plan(
            [troubled, endless],
            lanes=1,
            batch_size=100,
            in_flight_limit=2,
            planned_limit=4,
            in_flight={0: busy},
            now=NOW,
        )
        partitions = [r.partition for batch in planned.batches for r in batch.ranges]
        assert (0 in partitions) is turn
        assert len(planned.batches) == max(0, 2 - busy)


@untimed
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(1, 60),
)
def test_a_batch_is_full_and_shared_evenly(lengths: list[int], batch_size: int) -> None:
    """What one partition does not need the others get; none gets more than one that was cut short."""
    partitions = [PartitionBacklog(partition=p, first=0, end=length) for p, length in enumerate(lengths)]

    planned = plan(partitions, lanes=1, batch_size=batch_size, in_flight_limit=1, in_flight={}, now=NOW).batches

    got = {r.partition: len(r) for batch in planned for r in batch.ranges}
    assert sum(got.values()) == min(batch_size, sum(lengths))
    cut_short = [got.get(p, 0) for p, length in enumerate(lengths) if got.get(p, 0) < length]
    if cut_short:
        assert max(got.values()) <= min(cut_short) + 1


@dataclass
class Simulation:
    """A topic without servers: each tick plans, and what was launched the tick before has ended.

    A batch that touches a place of `poison` fails, as does one that touches a gap.
    """

    ends: list[int]
    lanes: int
    batch_size: int
    limit: int
    first: dict[int, int] = field(default_factory=dict)
    poison: set[Place] = field(default_factory=set)
    now: datetime = NOW
    done: set[Place] = field(default_factory=set)
    failed: list[tuple[OffsetRange, datetime]] = field(default_factory=list)
    tries: Counter[int] = field(default_factory=Counter)

    def backlogs(self) -> list[PartitionBacklog]:
        return [
            PartitionBacklog(
                partition=p,
                first=self.first.get(p, 0),
                end=end,
                ingested=ranges_of(place for place in self.done if place[0] == p),
                failed=tuple((tried, ended) for tried, ended in self.failed if tried.partition == p),
            )
            for p, end in enumerate(self.ends)
        ]

    def tick(self) -> Plan:
        planned = plan(
            self.backlogs(),
            lanes=self.lanes,
            batch_size=self.batch_size,
            in_flight_limit=self.limit,
            in_flight={},
            now=self.now,
        )
        self.now += TICK
        for batch in planned.batches:
            mine = places(batch.ranges)
            lost = {place for place in mine if place[1] < self.first.get(place[0], 0)}
            self.tries.update(r.partition for r in batch.ranges)
            if mine & self.poison or lost:
                self.failed += [(r, self.now) for r in batch.ranges]
            else:
                self.done |= mine
        return planned

    def healthy(self) -> set[Place]:
        sick = {p for p, _ in self.poison} | {p for p, offset in self.first.items() if offset}
        return {(p, offset) for p, end in enumerate(self.ends) if p not in sick for offset in range(end)}


@untimed
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
def test_everything_is_planned_in_the_end(ends: list[int], lanes: int, batch_size: int, limit: int) -> None:
    simulation = Simulation(ends, lanes, batch_size, limit)
    for _ in range(sum(ends)):
        simulation.tick()
    assert simulation.done == simulation.healthy()
    assert simulation.tick() == Plan((), ())


@untimed
@given(
    st.lists(st.integers(1, 8), min_size=2, max_size=6),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sets(st.integers(0, 5), min_size=1, max_size=3),
    st.sets(st.integers(0, 5), max_size=2),
)
def test_a_gap_or_a_failed_batch_holds_up_no_other_partition(
    ends: list[int], lanes: int, batch_size: int, limit: int, failing: set[int], gaps: set[int]
) -> None:
    poison = {(p, 0) for p in failing if p < len(ends)}
    first = {p: 1 for p in gaps if p < len(ends)}
    simulation = Simulation(ends, lanes, batch_size, limit, first=first, poison=poison)
    for _ in range(120):
        simulation.tick()
    assert simulation.done >= simulation.healthy()
    # And each of the others is tried again and again.
    assert all(simulation.tries[p] > 1 for p in {p for p, _ in poison} | first.keys())


@untimed
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))
def test_a_partition_in_trouble_is_tried_however_much_the_others_have(others: int, batch_size: int, limit: int) -> None:
    """More comes in for them at every tick than the limits allow."""
    simulation = Simulation([5, 5] + [0] * others, lanes=1, batch_size=batch_size, limit=limit, first={1: 2})
    simulation.poison = {(0, 0)}
    simulation.failed = [(OffsetRange(0, 0, 5), NOW)]
    for _ in range(16):
        simulation.ends = [5, 5, *(end + batch_size * limit for end in simulation.ends[2:])]
        simulation.tick()
    assert simulation.tries[0] > 1
    assert simulation.tries[1] > 1
    # Most ticks are theirs all the same.
    assert len(simulation.done) >= 6 * batch_size * limit


def test_a_partition_whose_log_was_cut_is_not_planned_and_holds_up_no_other() -> None:
    """What lies at its offsets now is not what was counted there."""
    cut = PartitionBacklog(partition=0, first=0, end=4, ingested=(OffsetRange(0, 3, 6),))
    sound = PartitionBacklog(partition=1, first=0, end=4)

    planned = plan([cut, sound], lanes=1, batch_size=100, in_flight_limit=2, in_flight={}, now=NOW)

    assert [batch.ranges for batch in planned.batches] == [(OffsetRange(1, 0, 4),)]
    assert len(planned.waiting) == 1
    assert "partition 0 was ingested up to offset 6" in planned.waiting[0]


def test_a_partition_with_a_gap_is_planned_alone() -> None:
    partitions = [PartitionBacklog(partition=p, first=5 if p == 1 else 0, end=10) for p in range(3)]

    planned = plan(partitions, lanes=1, batch_size=100, in_flight_limit=2, in_flight={}, now=NOW).batches

    assert [batch.ranges for batch in planned] == [
        (OffsetRange(0, 0, 10), OffsetRange(2, 0, 10)),
        (OffsetRange(1, 0, 10),),
    ]


def test_a_failed_batch_waits_longer_each_time_and_says_until_when() -> None:
    simulation = Simulation([3], lanes=1, batch_size=10, limit=1, poison={(0, 0)})
    launched = []
    for _ in range(2000):
        planned = simulation.tick()
        if planned.batches:
            launched.append(simulation.now)
        else:
            assert planned.waiting
            assert planned.waiting[0].startswith("partition 0 failed and is tried again at ")
    waited = [later - earlier for earlier, later in pairwise(launched)]
    assert waited[0] >= timedelta(seconds=10)
    assert all(second > first for first, second in pairwise(waited) if first < timedelta(minutes=10))
    assert max(waited) <= timedelta(minutes=10) + TICK


@untimed
@given(st.integers(1, 10_000))
def test_pauses_grow_up_to_ten_minutes(attempts: int) -> None:
    assert timedelta(0) < pause(attempts) <= pause(attempts + 1) <= timedelta(minutes=10)
    assert pause(attempts) < pause(attempts + 1) or pause(attempts) == timedelta(minutes=10)


def test_a_full_lane_says_so() -> None:
    partitions = [PartitionBacklog(partition=p, first=0, end=10) for p in range(2)]

    planned = plan(partitions, lanes=2, batch_size=10, in_flight_limit=2, in_flight={1: 2}, now=NOW)

    assert [batch.lane for batch in planned.batches] == [0]
    assert planned.waiting == ("lane 1 has 2 batches in flight",)


@untimed
@given(st.integers(2, 8), st.data())
def test_with_fewer_offsets_than_partitions_all_move_on_at_the_same_pace(partitions: int, data: st.DataObject) -> None:
    simulation = Simulation([30] * partitions, lanes=1, batch_size=data.draw(st.integers(1, partitions - 1)), limit=1)
    for _ in range(4 * partitions):
        simulation.tick()
        moved = Counter(p for p, _ in simulation.done)
        assert max(moved.values()) - min(moved[p] for p in range(partitions)) <= 1


@untimed
@given(st.lists(st.sampled_from([0, 1, 9]), min_size=2, max_size=7), st.integers(1, 6), st.integers(1, 3))
def test_with_fewer_offsets_than_partitions_each_has_its_turn_whatever_the_others_have(
    incoming: list[int], batch_size: int, limit: int
) -> None:
    """However much comes in for some at each tick, and only once for others: within one round each was planned."""
    partitions = len(incoming)
    simulation = Simulation([1] * partitions, lanes=1, batch_size=min(batch_size, partitions - 1), limit=limit)
    waited = [0] * partitions
    for _ in range(3 * partitions):
        simulation.ends = [end + more for end, more in zip(simulation.ends, incoming, strict=True)]
        waits = [bool(backlog.next_range) for backlog in simulation.backlogs()]
        planned = {r.partition for batch in simulation.tick().batches for r in batch.ranges}
        waited = [waited[p] + 1 if waits[p] and p not in planned else 0 for p in range(partitions)]
        assert max(waited) <= partitions // simulation.batch_size + 1


@few
@given(st.lists(st.integers(0, 60), min_size=64, max_size=64), st.integers(1, 100), st.integers(0, 2))
def test_a_topic_of_64_partitions_in_16_lanes_is_planned_fairly_and_the_oldest_unread_first(
    ends: list[int], batch_size: int, busy: int
) -> None:
    partitions = [PartitionBacklog(partition=p, first=0, end=end) for p, end in enumerate(ends)]

    planned = plan(
        partitions,
        lanes=16,
        batch_size=batch_size,
        in_flight_limit=2,
        planned_limit=4,
        in_flight=dict.fromkeys(range(0, 16, 2), busy),
        now=NOW,
    ).batches

    owned = ranges_of(place for batch in planned for place in places(batch.ranges))
    # Of each partition the oldest, without a hole.
    assert all(r.start == 0 for r in owned)
    for lane in range(16):
        mine = [batch for batch in planned if batch.lane == lane]
        left = sum(ends[lane::16])
        free_slots = 2 - (busy if lane % 2 == 0 else 0)
        assert bool(mine) == bool((left and free_slots > 0) or left >= batch_size)
        if not mine:
            continue
        assert total(mine[0].ranges) == min(batch_size, left)
        sizes = [sum(len(r) for r in mine[0].ranges if r.partition == p) for p in range(lane, 64, 16)]
        cut_short = [size for p, size in zip(range(lane, 64, 16), sizes, strict=True) if size < ends[p]]
        assert not cut_short or max(sizes) <= min(cut_short) + 1


@few
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.data())
def test_lanes_and_partitions_may_change_at_any_time(ends: list[int], data: st.DataObject) -> None:
    """Nothing is planned twice while it is in flight, nothing is left out in the end."""
    state = {p: (0, end) for p, end in enumerate(ends)}  # next offset to plan, end
    flying: list[tuple[OffsetRange, ...]] = []
    done: set[Place] = set()
    for _ in range(200):
        lanes = data.draw(st.integers(1, 5)) if len(state) < 10 else 3
        if data.draw(st.booleans()) and len(state) < 10:
            state[len(state)] = (0, data.draw(st.integers(0, 6)))
        partitions = [
            PartitionBacklog(
                partition=p,
                first=0,
                end=end,
                ingested=ranges_of(place for place in done if place[0] == p),
                in_flight=tuple(r for ranges in flying for r in ranges if r.partition == p),
            )
            for p, (_, end) in state.items()
        ]
        busy = Counter(lane for ranges in flying for lane in {lane_of(r.partition, lanes) for r in ranges})
        planned = plan(partitions, lanes=lanes, batch_size=4, in_flight_limit=2, in_flight=busy, now=NOW).batches
        for batch in planned:
            mine = places(batch.ranges)
            assert not mine & (done | {place for ranges in flying for place in places(ranges)})
            flying.append(batch.ranges)
        if flying:
            done |= places(flying.pop(data.draw(st.integers(0, len(flying) - 1))))
        elif len(state) >= 10 and not planned:
            break
    assert done == {(p, offset) for p, (_, end) in state.items() for offset in range(end)}


@untimed
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.sets(st.tuples(st.integers(0, 3), st.integers(0, 25))))
def test_the_gap_is_what_kafka_no_longer_has_and_the_ledger_does_not_hold(
    firsts: Sequence[int], done: set[Place]
) -> None:
    for partition, first in enumerate(firsts):
        mine = {offset for p, offset in done if p == partition}
        backlog = PartitionBacklog(
            partition=partition, first=first, end=max(first, 20), ingested=ranges_of((partition, o) for o in mine)
        )
        assert places(backlog.gap) == {(partition, o) for o in set(range(first)) - mine}
        assert places(backlog.unread) == {(partition, o) for o in set(range(backlog.end)) - mine}
        assert backlog.lag == len(set(range(backlog.end)) - mine)


def test_a_batch_that_failed_is_tried_again_half_as_large_each_time() -> None:
    sizes = []
    for tries in range(6):
        failed = tuple((OffsetRange(0, 0, 100), NOW) for _ in range(tries))
        backlog = PartitionBacklog(partition=0, first=0, end=1000, failed=failed)
        planned = plan([backlog], lanes=1, batch_size=8, in_flight_limit=1, in_flight={}, now=NOW + timedelta(days=1))
        sizes.append(sum(map(len, planned.batches[0].ranges)))
    assert sizes == [8, 4, 2, 1, 1, 1]
