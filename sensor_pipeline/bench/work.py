"""The work of a benchmark: seeded messages of a fleet, spread over partitions without keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from itertools import islice
from typing import NamedTuple

import numpy as np

from sensor_pipeline.fleet import Fleet

PARTITIONS = 4
SENSORS = 20
# Readings a second of event time: 5 million stay within a day.
_RATE = 1_000
_DAY = timedelta(days=1)
# A late reading lies between two stored ones, not on one of them.
_BESIDE = timedelta(microseconds=300)


class WorkReading(NamedTuple):
    """One message of the work, with what it says and where it will lie in Kafka."""

    partition: int
    offset: int
    machine_id: str
    timestamp: datetime  # naive, in UTC
    has_failure: bool
    message: bytes


@dataclass(frozen=True)
class Work:
    """Readings of a fleet, the same ones each time on one day.

    Args:
        readings: how many.
        machines: of how many machines, taking turns.
        failure_rate: the share that is failing.
        late_share: the share that is a day late.
        history: so many of the same fleet come first, from the day before.
    """

    readings: int
    machines: int = 50
    failure_rate: float = 0.02
    late_share: float = 0.0
    history: int = 0

    @property
    def total(self) -> int:
        """Messages in all."""
        return self.history + self.readings

    def messages(self) -> Iterator[WorkReading]:
        """Every message in the order in which it is published: to the partitions in turn."""
        start = datetime.combine(datetime.now(UTC).date(), time(6), UTC)
        late = np.random.default_rng(7).random(self.readings) < self.late_share
        parts = ((start - _DAY, np.zeros(self.history, np.bool_)), (start, late))
        place = 0
        for begin, shifted in parts:
            fleet = Fleet(
                machines=self.machines, sensors=SENSORS, failure_rate=self.failure_rate, start=begin, rate=_RATE
            )
            for reading, is_late in zip(islice(fleet.readings(), len(shifted)), shifted.tolist(), strict=True):
                moment, message = reading.timestamp, reading.message
                if is_late:
                    moment = moment - _DAY + _BESIDE
                    before = reading.timestamp.isoformat(timespec="microseconds").encode()
                    message = message.replace(before, moment.isoformat(timespec="microseconds").encode(), 1)
                partition, offset = place % PARTITIONS, place // PARTITIONS
                yield WorkReading(partition, offset, reading.machine_id, moment, reading.has_failure, message)
                place += 1
