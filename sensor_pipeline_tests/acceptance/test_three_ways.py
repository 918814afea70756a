"""The same readings ingested in three ways end in the same rows: those that the oracle says."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import daemon, run, wait_until
from sensor_pipeline_tests.data import needs_data, valve_files
from sensor_pipeline_tests.oracle import Published, Rows, expected, stored
from sensor_pipeline_tests.publishing import Publisher, message

Way = Callable[[Settings, Path], None]


def by_catch_up(settings: Settings, folder: Path) -> None:
    done = run(settings, "sensor-pipeline", "catch-up")
    assert done.returncode == 0, done.stderr


def by_small_batches_in_three_lanes(settings: Settings, folder: Path) -> None:
    done = run(settings, "sensor-pipeline", "catch-up", BATCH_SIZE="97", LANES="3")
    assert done.returncode == 0, done.stderr


def by_the_daemon(settings: Settings, folder: Path) -> None:
    run_database = replace(settings, postgres_db=f"{settings.postgres_db}_dagster")
    with daemon(settings, folder / "dagster", DAGSTER_POSTGRES_DB=run_database.postgres_db):
        wait_until("no lag", lambda: lag(settings) == 0, log=folder / "dagster" / "daemon.log")


def lag(settings: Settings) -> int:
    pipeline = Pipeline(settings)
    return read_backlog(settings, pipeline.kafka, pipeline.database, settings.kafka_topics[0]).lag


WAYS = [by_catch_up, by_small_batches_in_three_lanes, by_the_daemon]


@pytest.fixture
def dagster_database(settings: Settings, administer: Callable[[str], None]) -> Iterator[None]:
    """A database for Dagster's own storage beside the test's."""
    name = f"{settings.postgres_db}_dagster"
    administer(f"CREATE DATABASE {name}")
    yield
    administer(f"DROP DATABASE {name} WITH (FORCE)")


def publish_fleet(settings: Settings) -> list[Published]:
    """Readings of five machines with all that makes failures hard, spread over the partitions without keys."""
    dice = random.Random(7)
    sent: list[bytes] = []
    for number in range(5):
        machine, failing = f"machine-{number}", False
        for second in range(300):
            if dice.random() < 0.08:
                failing = not failing
            sent.append(message(machine, second, failing, {"Sensor 1": second / 7, "Sensor 2": None, "mode": "ü"}))
            if dice.random() < 0.1:  # the same moment again, with either flag: also failures of zero length
                sent.append(message(machine, second, dice.random() < 0.5))
        if number % 2:
            sent.append(message(machine, 300, True))  # still active at the end
    order = sorted(range(len(sent)), key=lambda at: at % 300 + (dice.randrange(150) if dice.random() < 0.1 else 0))
    publisher = Publisher(settings)
    for place, at in enumerate(order):
        publisher.send(place % 4, sent[at])
        if dice.random() < 0.05:
            publisher.send((place + 1) % 4, sent[at])  # published twice: two readings
        if dice.random() < 0.01:
            publisher.send(place % 4, b"\xff", bad="not_utf8")
    return publisher.flush().published


@pytest.mark.usefixtures("dagster_database")
@pytest.mark.parametrize("way", WAYS)
def test_a_fleet_ends_in_the_oracles_rows(way: Way, settings: Settings, tmp_path: Path) -> None:
    published = publish_fleet(settings)
    want = expected(published)
    # What makes it hard is there.
    assert any(end is None for end, _ in want.failures.values())
    assert any(end == start for (_, start, _), (end, _) in want.failures.items())
    assert len(want.failures) > 50
    way(settings, tmp_path)
    assert stored(settings) == want
    check_group_offsets(settings)
    state = json.loads(run(settings, "sensor-pipeline", "status", "--json").stdout)
    assert (state["readings"], state["machines"], state["failures"], state["rejected"], state["lag"]) == (
        len(want.readings),
        len(want.machines),
        len(want.failures),
        len(want.rejected),
        0,
    )
    assert state["active_failures"] == sum(end is None for end, _ in want.failures.values())


def check_group_offsets(settings: Settings) -> None:
    """Kafka's group stands where Kafka's partitions end."""
    kafka = Pipeline(settings).kafka
    topic = kafka.topic(settings.kafka_topics[0])
    assert kafka.committed_offsets(topic) == kafka.end_offsets(topic)


@needs_data
@pytest.mark.usefixtures("dagster_database")
@pytest.mark.parametrize("way", WAYS)
def test_the_labelled_files_end_in_their_own_failures(way: Way, settings: Settings, tmp_path: Path) -> None:
    options = ["--time-column", "datetime", "--failure-column", "anomaly", "--exclude", "changepoint"]
    sent = run(settings, "sensor-pipeline", "publish-csv", *map(str, valve_files()), *options)
    assert sent.returncode == 0, sent.stderr
    way(settings, tmp_path)
    got = stored(settings)
    assert (len(got.machines), len(got.readings), len(got.rejected)) == (16, 18160, 0)
    assert failures_of(got) == failures_of_the_files()


def failures_of(rows: Rows) -> dict[str, list[tuple[datetime, datetime | None, list[datetime]]]]:
    """Each machine's failures: start, end, and the times of the readings in each."""
    found: dict[str, list[tuple[datetime, datetime | None, list[datetime]]]] = {}
    for (machine, start, _), (end, places) in sorted(rows.failures.items()):
        found.setdefault(machine, []).append((start, end, sorted(rows.readings[place][1] for place in places)))
    return found


def failures_of_the_files() -> dict[str, list[tuple[datetime, datetime | None, list[datetime]]]]:
    """The maximal stretches of `anomaly == 1.0` in time order, counted from the files."""
    found: dict[str, list[tuple[datetime, datetime | None, list[datetime]]]] = {}
    for path in valve_files():
        with path.open(newline="") as file:
            rows = sorted(
                (datetime.fromisoformat(row["datetime"]).replace(tzinfo=UTC), float(row["anomaly"]) == 1.0)
                for row in csv.DictReader(file, delimiter=";")
            )
        stretch: list[datetime] = []
        for moment, failing in rows:
            if failing:
                stretch.append(moment)
            elif stretch:
                found.setdefault(path.stem, []).append((stretch[0], moment, stretch))
                stretch = []
        if stretch:
            found.setdefault(path.stem, []).append((stretch[0], None, stretch))
    return found
