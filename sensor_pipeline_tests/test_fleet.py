"""The simulated fleet: its messages, its machines and its failures."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from sensor_pipeline.fleet import SHORTEST_FAILURE, Fleet, FleetReading
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.rules import Reading

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def readings(number: int, **arguments: Any) -> list[FleetReading]:
    return list(islice(Fleet(**{"start": START, **arguments}).readings(), number))


def by_machine(fleet: list[FleetReading]) -> dict[str, list[FleetReading]]:
    machines = defaultdict(list)
    for reading in fleet:
        machines[reading.machine_id].append(reading)
    return machines


def values(reading: FleetReading) -> list[float]:
    return list(json.loads(reading.message)["readings"]["readings"].values())


def test_the_same_arguments_give_the_same_messages() -> None:
    fleet = Fleet(start=START)
    assert readings(10_000) == readings(10_000) == list(islice(fleet.readings(), 10_000))
    assert list(islice(fleet.readings(), 100)) == readings(100)


def test_another_seed_gives_other_machines_and_values() -> None:
    first, second = readings(20, seed=1), readings(20, seed=2)
    assert not by_machine(first).keys() & by_machine(second).keys()
    assert [values(r) for r in first] != [values(r) for r in second]


def test_a_message_is_written_as_json_dumps_writes_it_and_says_what_the_reading_says() -> None:
    for reading in readings(5_000, failure_rate=0.3):
        document = json.loads(reading.message)
        assert reading.message == json.dumps(document).encode()
        assert document == {
            "machine_id": reading.machine_id,
            "timestamp": reading.timestamp.isoformat(timespec="microseconds"),
            "readings": {
                "readings": dict(zip([f"Sensor {n}" for n in range(1, 21)], values(reading), strict=True)),
                "has_failure": reading.has_failure,
            },
        }
        assert all(round(value, 4) == value for value in values(reading))


@pytest.mark.parametrize("sensors", [0, 1, 20])
def test_the_pipeline_takes_every_message(sensors: int) -> None:
    decoder = MessageDecoder(timedelta(days=1), ZoneInfo("UTC"), 1_048_576)
    for reading in readings(5_000, sensors=sensors):
        decoded = decoder.decode_one(reading.message)
        assert isinstance(decoded, Reading)
        assert decoded[:3] == reading[:3]


def test_a_message_of_twenty_sensors_has_about_500_to_650_bytes() -> None:
    sizes = [len(reading.message) for reading in readings(5_000)]
    assert 500 < min(sizes) <= max(sizes) < 650


def test_event_times_start_at_the_start_and_keep_the_rate() -> None:
    start = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    times = [reading.timestamp for reading in readings(10_000, start=start, rate=300)]
    assert times[0] == datetime(2026, 1, 1, 10)
    assert times[3_000] == datetime(2026, 1, 1, 10, 0, 10)
    assert {(later - earlier) // timedelta(microseconds=1) for earlier, later in pairwise(times)} == {3_333, 3_334}


@pytest.mark.parametrize("machines", [1, 3, 20, 5_000])
def test_each_round_every_machine_publishes_once(machines: int) -> None:
    fleet = readings(machines * 3, machines=machines)
    for at in range(0, len(fleet), machines):
        assert len({reading.machine_id for reading in fleet[at : at + machines]}) == machines


def test_readings_sent_to_four_partitions_in_turn_spread_every_machine_over_all_of_them() -> None:
    partitions = defaultdict(set)
    for number, reading in enumerate(readings(2_000)):
        partitions[reading.machine_id].add(number % 4)
    assert all(len(seen) == 4 for seen in partitions.values())


@pytest.mark.parametrize(("failure_rate", "tolerance"), [(0.0, 0.0), (0.02, 0.004), (0.3, 0.03), (0.9, 0.03)])
def test_the_share_of_failing_readings_is_the_failure_rate(failure_rate: float, tolerance: float) -> None:
    number = 200_000
    failing = sum(reading.has_failure for reading in readings(number, failure_rate=failure_rate, sensors=1))
    assert failing / number == pytest.approx(failure_rate, abs=tolerance)


def test_failures_last_several_readings_and_their_first_is_marked() -> None:
    lengths = []
    for machine in by_machine(readings(100_000, sensors=1)).values():
        assert not machine[0].has_failure
        for before, reading in pairwise(machine):
            assert reading.starts_failure == (reading.has_failure and not before.has_failure)
            if reading.starts_failure:
                lengths.append(0)
            if reading.has_failure:
                lengths[-1] += 1
        if machine[-1].has_failure:
            lengths.pop()  # it goes on
    assert min(lengths) >= SHORTEST_FAILURE
    assert len(set(lengths)) > 10


def test_a_failure_can_be_seen_in_the_sensors() -> None:
    for machine in by_machine(readings(100_000, failure_rate=0.1)).values():
        failing = np.array([values(reading) for reading in machine if reading.has_failure])
        healthy = np.array([values(reading) for reading in machine if not reading.has_failure])
        shift = np.abs(failing.mean(axis=0) - healthy.mean(axis=0)) / healthy.std(axis=0)
        assert 1 <= (shift > 5).sum() < 20


def test_sensors_keep_their_own_level_and_change_slowly_over_a_day() -> None:
    # One machine, one reading a minute, for four days.
    machine = np.array([values(reading) for reading in readings(5_760, machines=1, rate=1 / 60, failure_rate=0)])
    step = np.abs(np.diff(machine, axis=0)).mean(axis=0)
    assert ((machine.max(axis=0) - machine.min(axis=0)) > 4 * step).all()
    assert len(set(np.round(machine.mean(axis=0), 3))) == 20


def test_no_two_machines_have_the_same_name() -> None:
    names = Fleet(machines=100_000, start=START).machine_ids
    assert len(set(names)) == 100_000
    assert all(len(name) == 8 for name in names)


@pytest.mark.parametrize(
    "wrong",
    [
        {"machines": 0},
        {"sensors": -1},
        {"seed": -1},
        {"rate": 0},
        {"start": datetime(2026, 1, 1)},
        {"failure_rate": -0.1},
        {"failure_rate": 0.95},
        {"failure_rate": float("nan")},
    ],
)
def test_what_makes_no_fleet_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Fleet(**{"start": START, **wrong})
