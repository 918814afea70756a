"""Whether a topic falls behind: one rule, for what the ticks of `backlog_sensor` say and for what people are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sensor_pipeline.offsets import OffsetRange, PartitionBacklog, intersect, subtract, total


@dataclass(frozen=True)
class Pace:
    """A topic's offsets over the time `within` until now.

    `arrived` came in and `ingested` were done; of the `lag`, which is all that is left, `waiting` came in before that.
    """

    within: timedelta
    arrived: int
    ingested: int
    waiting: int
    lag: int

    @property
    def falls_behind(self) -> bool:
        """Whether messages have waited for longer than `within`, in which no more were ingested than came in.

        So a long backlog that is being caught up is no falling behind.
        """
        return self.waiting > 0 and self.ingested <= self.arrived

    def __str__(self) -> str:
        seconds = self.within.total_seconds()
        return f"{self.arrived / seconds:,.1f} readings/s in, {self.ingested / seconds:,.1f} out"


def measure(partitions: Sequence[PartitionBacklog], then: Mapping[int, int], ingested: int, within: timedelta) -> Pace:
    """The pace of a topic. Gaps are left out of what waits: they wait for a person.

    Args:
        partitions: its backlog now.
        then: for each partition its first offset that is not older than `within`.
        ingested: offsets done since then.
        within: how far to look back.
    """
    return Pace(
        within=within,
        arrived=sum(max(0, p.end - max(then.get(p.partition, p.first), p.first)) for p in partitions),
        ingested=ingested,
        waiting=sum(total(_old_enough(p, then.get(p.partition, p.first))) for p in partitions),
        lag=sum(p.lag for p in partitions),
    )


def _old_enough(partition: PartitionBacklog, then: int) -> list[OffsetRange]:
    known = OffsetRange(partition.partition, partition.first, max(partition.first, then))
    return subtract(intersect(partition.unread, [known]), partition.gap)
