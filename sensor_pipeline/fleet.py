"""A simulated fleet: machines whose sensors drift, cycle and jitter, and now and then fail for a while.

Pure and seeded: the same arguments give the same messages. Values are computed with numpy for a block of
readings at a time, so that benchmarks are not held up by their own load.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

# Readings computed at a time: enough to make numpy's overhead small, little enough to stay in the cache.
BLOCK_READINGS = 4_096
SHORTEST_FAILURE = 3
MEAN_FAILURE = 20
# A healthy stretch is at least one reading long, which bounds the share of failing ones.
MAX_FAILURE_RATE = 0.9

_DAY_SECONDS = 86_400
_DECIMALS = 4
_SCALES = (1.0, 10.0, 100.0)  # sensors differ in size, as currents, temperatures and voltages do
_NEVER = np.iinfo(np.int64).max // 2


class FleetReading(NamedTuple):
    """One message of a machine; `starts_failure` marks the first failing reading of a failure."""

    machine_id: str
    timestamp: datetime  # naive, in UTC
    has_failure: bool
    starts_failure: bool
    message: bytes


class Fleet:
    """Machines that take turns, in another order each round, so that none meets always the same partition.

    Args:
        machines: how many there are.
        sensors: how many each of them has.
        failure_rate: the share of readings that are failing, on average over a long time; all start healthy.
        seed: makes the machines' names, their sensors and their failures.
        start: event time of the first reading, with a time zone.
        rate: readings a second of event time, over the whole fleet.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        machines: int = 20,
        sensors: int = 20,
        failure_rate: float = 0.02,
        seed: int = 1,
        start: datetime,
        rate: float = 200.0,
    ) -> None:
        if machines < 1 or sensors < 0 or seed < 0 or rate <= 0 or start.tzinfo is None:
            raise ValueError("machines and rate must be above 0, sensors and seed not below, start with a time zone")
        if not 0 <= failure_rate <= MAX_FAILURE_RATE:
            raise ValueError(f"failure_rate must be from 0 to {MAX_FAILURE_RATE}")
        self._sensor_count = sensors
        self._failure_rate = failure_rate
        self._seed = seed
        self._start = np.datetime64(start.astimezone(UTC).replace(tzinfo=None), "us")
        self._interval_us = 1e6 / rate
        self.machine_ids = _machine_ids(machines, seed)
        self._template = _template(sensors)

    def readings(self) -> Iterator[FleetReading]:
        """The readings in order of event time, without end; the same ones each time this is called."""
        machines = len(self.machine_ids)
        rng = np.random.default_rng(self._seed)
        sensors = _Sensors(rng, machines, self._sensor_count)
        failures = _Failures(rng, machines, self._failure_rate)
        rounds = max(1, BLOCK_READINGS // machines)
        for first_round in count(step=rounds):
            order = rng.permuted(np.tile(np.arange(machines), (rounds, 1)), axis=1)
            severities, starting = failures.rounds(first_round, rounds)
            severity = np.take_along_axis(severities, order, axis=1).ravel()
            starts = np.take_along_axis(starting, order, axis=1).ravel()
            machine = order.ravel()
            # A round of a large fleet is longer than a block should be.
            for at in range(0, len(machine), BLOCK_READINGS):
                part = slice(at, at + BLOCK_READINGS)
                times = self._times(first_round * machines + at, len(machine[part]))
                values = sensors.values(machine[part], times, severity[part])
                yield from self._encode(machine[part], times, severity[part] > 0, starts[part], values)

    def _times(self, first: int, number: int) -> NDArray[np.datetime64]:
        elapsed_us = (first + np.arange(number)) * self._interval_us
        return self._start + elapsed_us.astype("timedelta64[us]")

    def _encode(
        self,
        machine: NDArray[np.int64],
        times: NDArray[np.datetime64],
        failing: NDArray[np.bool_],
        starts: NDArray[np.bool_],
        values: NDArray[np.float64],
    ) -> Iterator[FleetReading]:
        texts = _number_texts(values)
        rows = zip(
            machine.tolist(),
            times.tolist(),
            np.datetime_as_string(times, unit="us").astype("S").tolist(),
            failing.tolist(),
            starts.tolist(),
            strict=True,
        )
        at = 0
        for number, moment, moment_text, has_failure, starts_failure in rows:
            name = self.machine_ids[number]
            here = texts[at : at + self._sensor_count]
            at += self._sensor_count
            flag = b"true" if has_failure else b"false"
            message = self._template % (name.encode(), moment_text, *here, flag)
            yield FleetReading(name, moment, has_failure, starts_failure, message)


class _Sensors:
    """Every sensor of every machine: a level of its own, a daily cycle, a slow drift, noise, and what failures do."""

    def __init__(self, rng: np.random.Generator, machines: int, sensors: int) -> None:
        shape = (machines, sensors)
        self._rng = rng
        scale = np.resize(_SCALES, sensors)
        self._level = scale * rng.uniform(-0.5, 2, shape)
        self._cycle = scale * rng.uniform(0.02, 0.1, shape)
        self._cycle_phase = rng.uniform(0, 2 * np.pi, shape)
        self._drift = scale * rng.uniform(0.05, 0.2, shape)
        self._drift_frequency = 2 * np.pi / (_DAY_SECONDS * rng.uniform(3, 15, shape))
        self._noise = scale * rng.uniform(0.005, 0.02, shape)
        # A failure shows in about a third of a machine's sensors: by 10 to 30 times their noise, up or down.
        sensitive = rng.random(shape) < 1 / 3
        sensitive[:, :1] = True
        self._shift = self._noise * rng.uniform(10, 30, shape) * rng.choice([-1, 1], shape) * sensitive

    def values(
        self, machine: NDArray[np.int64], times: NDArray[np.datetime64], severity: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """A row for each reading, rounded."""
        seconds = (times.astype(np.int64) / 1e6)[:, np.newaxis]
        values = self._level[machine]
        values += self._cycle[machine] * np.sin(2 * np.pi / _DAY_SECONDS * seconds + self._cycle_phase[machine])
        values += self._drift[machine] * np.sin(self._drift_frequency[machine] * seconds)
        failing = np.flatnonzero(severity)
        values[failing] += self._shift[machine[failing]] * severity[failing, np.newaxis]
        # A failing machine also runs less steadily.
        noise = self._rng.standard_normal(values.shape) * self._noise[machine]
        values += noise * (1 + severity[:, np.newaxis])
        # Adding 0 turns -0.0 into 0.0.
        rounded: NDArray[np.float64] = np.round(values, _DECIMALS) + 0.0
        return rounded


class _Failures:
    """Each machine's failures, as rounds: it always has one, running or to come, and the next follows from it."""

    def __init__(self, rng: np.random.Generator, machines: int, failure_rate: float) -> None:
        self._rng = rng
        self._mean_healthy = MEAN_FAILURE * (1 - failure_rate) / failure_rate if failure_rate else np.inf
        self._start = np.zeros(machines, np.int64)
        self._end = np.zeros(machines, np.int64)
        for machine in range(machines):
            self._plan_next(machine)

    def rounds(self, first: int, number: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """For `number` rounds (rows) and every machine: the severity, 0 when healthy, and where a failure starts."""
        severity = np.zeros((number, len(self._start)))
        starts = np.zeros(severity.shape, np.bool_)
        for machine in np.flatnonzero(self._start < first + number).tolist():
            while self._start[machine] < first + number:
                start, end = int(self._start[machine]), int(self._end[machine])
                here = np.arange(max(start, first), min(end, first + number))
                # It begins with a jump that can be seen and grows from there.
                severity[here - first, machine] = 0.5 + 0.5 * (here - start) / (end - start)
                if start >= first:
                    starts[start - first, machine] = True
                if end > first + number:
                    break
                self._plan_next(machine)
        return severity, starts

    def _plan_next(self, machine: int) -> None:
        """Geometric lengths: at every reading a stretch is as likely to end as at any other."""
        healthy = self._rng.geometric(1 / self._mean_healthy) if self._mean_healthy < _NEVER else _NEVER
        failing = SHORTEST_FAILURE - 1 + self._rng.geometric(1 / (MEAN_FAILURE - SHORTEST_FAILURE + 1))
        self._start[machine] = self._end[machine] + min(healthy, _NEVER)
        self._end[machine] = self._start[machine] + failing


def _machine_ids(machines: int, seed: int) -> list[str]:
    """Eight hexadecimal digits each: an odd step visits every 32-bit number once, so none comes twice."""
    first = int(np.random.default_rng(seed).integers(2**32))
    return [f"{(first + machine * 0x9E3779B1) % 2**32:08x}" for machine in range(machines)]


def _template(sensors: int) -> bytes:
    values = ", ".join(f'"Sensor {number}": %b' for number in range(1, sensors + 1))
    return (
        '{"machine_id": "%b", "timestamp": "%b", "readings": {"readings": {' + values + '}, "has_failure": %b}}'
    ).encode()


def _number_texts(values: NDArray[np.float64]) -> list[bytes]:
    """The shortest JSON text of every value, row after row; one call for all is three times as fast as repr."""
    return msgspec.json.encode(values.ravel().tolist())[1:-1].split(b",")
