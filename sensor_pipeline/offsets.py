"""Offsets, ranges, batches, and the plan that turns a backlog into batches.

An offset always means the next one to read; every range is half-open, `[start, end)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sensor_pipeline.errors import ConfigurationError

MAX_OFFSET = 2**63 - 1
_FIRST_PAUSE = timedelta(seconds=10)
_LONGEST_PAUSE = timedelta(minutes=10)


@dataclass(frozen=True, order=True)
class OffsetRange:
    """Offsets `[start, end)` of one partition; empty when they are equal."""

    partition: int
    start: int
    end: int

    def __post_init__(self) -> None:
        if not (0 <= self.partition < 2**31 and 0 <= self.start <= self.end <= MAX_OFFSET):
            raise ConfigurationError(
                f"wrong offset range {self}: partition and start must be at least 0, and end not before start"
            )

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.partition}:{self.start}-{self.end}"


@dataclass(frozen=True)
class Batch:
    """The offset ranges that one run owns, at most one a partition, in order of partition."""

    topic: str
    kafka_topic_id: str
    ranges: tuple[OffsetRange, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", tuple(sorted(self.ranges)))
        partitions = [r.partition for r in self.ranges]
        if not partitions or len(set(partitions)) != len(partitions):
            raise ConfigurationError(f"wrong batch {self}: it must have one range for each of its partitions")

    def __len__(self) -> int:
        return total(self.ranges)

    def __str__(self) -> str:
        return f"{self.topic} {' '.join(map(str, self.ranges))}"

    @property
    def partitions(self) -> tuple[int, ...]:
        """Its partitions, ascending."""
        return tuple(r.partition for r in self.ranges)


def total(ranges: Iterable[OffsetRange]) -> int:
    """How many offsets the ranges hold."""
    return sum(len(r) for r in ranges)


def subtract(ranges: Iterable[OffsetRange], taken: Iterable[OffsetRange]) -> list[OffsetRange]:
    """What of `ranges` is in none of `taken`, in order."""
    by_partition = _by_partition(taken)
    left = []
    for wanted in sorted(ranges):
        at = wanted.start
        for other in by_partition.get(wanted.partition, ()):
            if other.end <= at or other.start >= wanted.end:
                continue
            if other.start > at:
                left.append(OffsetRange(wanted.partition, at, other.start))
            at = other.end
        if at < wanted.end:
            left.append(OffsetRange(wanted.partition, at, wanted.end))
    return left


def intersect(ranges: Iterable[OffsetRange], others: Iterable[OffsetRange]) -> list[OffsetRange]:
    """What is in `ranges` and in `others`, in order; the ranges of each side do not overlap."""
    ranges = list(ranges)
    return subtract(ranges, subtract(ranges, others))


def ranges_of(places: Iterable[tuple[int, int]]) -> list[OffsetRange]:
    """The ranges that hold these partitions and offsets, and nothing else, in order."""
    ranges: list[OffsetRange] = []
    for partition, offset in sorted(set(places)):
        last = ranges[-1] if ranges else None
        if last and (last.partition, last.end) == (partition, offset):
            ranges[-1] = replace(last, end=offset + 1)
        else:
            ranges.append(OffsetRange(partition, offset, offset + 1))
    return ranges


def hull(ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
    """For each partition the one range that holds all of its ranges and what lies between them."""
    return [OffsetRange(p, spans[0].start, max(s.end for s in spans)) for p, spans in _by_partition(ranges).items()]


def contiguous_prefix(ingested: Iterable[OffsetRange]) -> int:
    """The end of the unbroken run of one partition's offsets that begins at 0: what a group may commit."""
    end = 0
    for span in sorted(ingested):
        if span.start > end:
            break
        end = max(end, span.end)
    return end


@dataclass(frozen=True, kw_only=True)
class PartitionBacklog:
    """What is known of one partition when a plan is made.

    `first` is the first offset that Kafka still has and `end` its last stable one; `in_flight` are the ranges
    of runs that have not ended; `log_end` is where the log ends with its open transactions, where that was asked;
    `failed` are the ranges of failed runs with the time when each ended.
    """

    partition: int
    first: int
    end: int
    log_end: int | None = None
    ingested: tuple[OffsetRange, ...] = ()
    in_flight: tuple[OffsetRange, ...] = ()
    failed: tuple[tuple[OffsetRange, datetime], ...] = ()

    @property
    def unread(self) -> list[OffsetRange]:
        """Offsets that are not in the ledger, gaps included."""
        return subtract([OffsetRange(self.partition, 0, max(self.end, self.first))], self.ingested)

    @property
    def lag(self) -> int:
        """How many offsets are not in the ledger."""
        return total(self.unread)

    @property
    def gap(self) -> list[OffsetRange]:
        """Offsets that Kafka no longer has and the ledger never ingested."""
        return intersect(self.unread, [OffsetRange(self.partition, 0, self.first)])

    @property
    def cut_off(self) -> str | None:
        """What is wrong where Kafka's log ends before what was ingested from it: its offsets are being used again.

        A broker that was restored from a backup, lost its disk or elected an unclean leader. What is published below
        the ledger's end would pass for ingested.
        """
        ingested_to = max((span.end for span in self.ingested), default=0)
        log_end = self.end if self.log_end is None else self.log_end
        if ingested_to <= log_end:
            return None
        return (
            f"partition {self.partition} was ingested up to offset {ingested_to}, but Kafka's log ends at {log_end}: "
            "it lost records and uses their offsets again. Nothing of it is ingested: restore the log, or publish to "
            "a topic that is created anew"
        )

    @property
    def next_range(self) -> OffsetRange | None:
        """The first unread range that no run owns."""
        free = subtract(self.unread, self.in_flight)
        return free[0] if free else None

    @property
    def tries(self) -> list[datetime]:
        """When the tries ended that failed on the next range."""
        wanted = self.next_range
        return [ended for tried, ended in self.failed if wanted and tried.start <= wanted.start < tried.end]

    def retry_at(self) -> datetime | None:
        """When the next range may be tried again, if it has failed: after a pause that grows with each try."""
        return max(self.tries) + pause(len(self.tries)) if self.tries else None


def pause(attempts: int) -> timedelta:
    """How long a batch that failed `attempts` times waits for its next try."""
    doublings = min(attempts - 1, 10)
    return min(_FIRST_PAUSE * (1 << doublings), _LONGEST_PAUSE)


@dataclass(frozen=True)
class Planned:
    """One planned batch: its lane and ranges."""

    lane: int
    ranges: tuple[OffsetRange, ...]


@dataclass(frozen=True)
class Plan:
    """The batches to launch now, and for every lane or partition that waits, one sentence why."""

    batches: tuple[Planned, ...]
    waiting: tuple[str, ...]


def lane_of(partition: int, lanes: int) -> int:
    """The lane of a partition."""
    return partition % lanes


def plan(
    backlogs: Sequence[PartitionBacklog],
    *,
    lanes: int,
    batch_size: int,
    in_flight_limit: int,
    in_flight: Mapping[int, int],
    now: datetime,
    planned_limit: int = 0,
) -> Plan:
    """Plan one topic's next batches.

    Args:
        backlogs: one for each partition.
        lanes: how many lanes there are.
        batch_size: the most offsets in a batch.
        in_flight_limit: the most batches of a lane that are planned and not ended.
        in_flight: for each lane, how many batches are planned and not ended.
        now: the time against which pauses are measured.
        planned_limit: the same limit for batches that are full; what is less than a batch grows while it waits.
    """
    batches: list[Planned] = []
    waiting: list[str] = []
    waiting += [sentence for backlog in backlogs if (sentence := backlog.cut_off)]
    sound = [backlog for backlog in backlogs if not backlog.cut_off]
    for lane in range(lanes):
        mine = [backlog for backlog in sound if lane_of(backlog.partition, lanes) == lane]
        busy = in_flight.get(lane, 0)
        slots = in_flight_limit - busy
        if slots <= 0 and any(backlog.next_range for backlog in mine):
            waiting.append(f"lane {lane} has {busy} batches in flight")
        full_slots = max(in_flight_limit, planned_limit) - busy
        batches += [Planned(lane, ranges) for ranges in _plan_lane(mine, slots, full_slots, batch_size, now, waiting)]
    return Plan(tuple(batches), tuple(waiting))


def _plan_lane(
    backlogs: Sequence[PartitionBacklog],
    slots: int,
    full_slots: int,
    batch_size: int,
    now: datetime,
    waiting: list[str],
) -> list[tuple[OffsetRange, ...]]:
    together = [b for b in backlogs if not b.gap and b.retry_at() is None]
    # A partition with a gap or a failed batch holds up no other: it is tried alone, in a slot of its own.
    alone = [b for b in backlogs if b not in together and _may_be_tried(b, now, waiting)]
    if alone:
        # Nothing is planned ahead before it has had its turn.
        full_slots = slots
    planned: list[tuple[OffsetRange, ...]] = []
    while len(planned) < full_slots:
        last_slot = len(planned) == slots - 1
        if alone and (last_slot or not any(b.next_range for b in together)):
            # Half as large after each try: it may be its size that it failed for.
            tried = alone.pop(0)
            ranges = _fill([tried], max(1, batch_size >> len(tried.tries)))
        else:
            ranges = _fill(together, batch_size)
        if not ranges or (len(planned) >= slots and total(ranges) < batch_size):
            break
        planned.append(ranges)
        taken = {r.partition: r for r in ranges}
        together = [
            replace(b, in_flight=(*b.in_flight, taken[b.partition])) if b.partition in taken else b for b in together
        ]
        # What comes next may have been tried before, by hand.
        together = [b for b in together if b.retry_at() is None]
    return planned


def _may_be_tried(backlog: PartitionBacklog, now: datetime, waiting: list[str]) -> bool:
    retry_at = backlog.retry_at()
    if retry_at is None or retry_at <= now:
        return backlog.next_range is not None
    waiting.append(f"partition {backlog.partition} failed and is tried again at {retry_at:%H:%M:%S} UTC")
    return False


def _fill(backlogs: Sequence[PartitionBacklog], limit: int) -> tuple[OffsetRange, ...]:
    """Cut the next ranges to `limit` offsets in all, sharing it evenly: what one does not need, others get."""
    left = limit
    filled = []
    open_ranges = sorted((r for b in _in_turn(backlogs, limit) if (r := b.next_range)), key=len)
    for position, span in enumerate(open_ranges):
        size = min(len(span), left // (len(open_ranges) - position))
        filled.append(OffsetRange(span.partition, span.start, span.start + size))
        left -= size
    return tuple(sorted(filled))


def _in_turn(backlogs: Sequence[PartitionBacklog], limit: int) -> list[PartitionBacklog]:
    """Those that take part in a batch of `limit` offsets: all, or where it has less than one for each, the next ones.

    The turn goes round by as many partitions as a batch has offsets, and how far it has come is how many offsets were
    ever planned: nothing has to be remembered, and each partition has its turn within one round, whatever comes in.
    """
    waiting = [b for b in backlogs if b.next_range]
    if len(waiting) <= limit:
        return waiting
    turn = sum(total(b.ingested) + total(b.in_flight) for b in backlogs) % len(backlogs)
    order = sorted(range(len(backlogs)), key=lambda place: (place - turn) % len(backlogs))
    return [backlogs[place] for place in order if backlogs[place].next_range][:limit]


def _by_partition(ranges: Iterable[OffsetRange]) -> dict[int, list[OffsetRange]]:
    by_partition: dict[int, list[OffsetRange]] = {}
    for span in sorted(ranges):
        by_partition.setdefault(span.partition, []).append(span)
    return by_partition
