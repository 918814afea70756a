"""`sensor-pipeline bench` as a user runs it, on little work: no speed is asserted, only that it measures and checks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import sqlalchemy as sa

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.bench import naive
from sensor_pipeline.bench.processes import environment
from sensor_pipeline.bench.work import Work
from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.cli.bench import command as bench
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.errors import DataError
from sensor_pipeline.publish import Publisher
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect


def run(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sensor_pipeline", "bench", *arguments],
        env=environment(settings),
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_measures_on_the_servers_of_the_environment_and_leaves_nothing_there(
    database_settings: Settings, broker: KafkaBroker
) -> None:
    settings = replace(database_settings, kafka_bootstrap_servers=broker.bootstrap_servers)
    ended = run(settings, "throughput", "late", "--rounds", "1", "--readings", "10000", "--json")
    assert ended.returncode in (0, 1), ended.stderr
    lines = json.loads(ended.stdout)
    assert [line["figure"] for line in lines] == [
        "catch-up, one lane",
        "catch-up, two lanes",
        "a batch with 1 % a day late",
    ]
    assert all(line["median"] > 0 and len(line["values"]) == 1 for line in lines)
    assert lines[0]["microseconds_by_stage"].keys() == {"drain", "detect", "write", "copy"}
    assert ended.returncode == int(not all(line["reaches"] for line in lines))
    with connect(settings).connect() as connection:
        left = connection.scalars(sa.text("SELECT datname FROM pg_database WHERE datname LIKE 'bench%'")).all()
    assert left == []


def test_every_figure_is_listed_with_what_it_measures(database_settings: Settings) -> None:
    ended = run(database_settings, "--list")
    assert ended.returncode == 0
    assert all(len(line.split(maxsplit=1)) == 2 for line in ended.stdout.splitlines())
    assert run(database_settings, "no-such-figure").returncode == 2
    assert bench.help


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM readings WHERE kafka_offset = 7 AND kafka_partition = 1", "is stored, not"),
        ("UPDATE readings SET \"values\" = '{}' WHERE kafka_offset = 7 AND kafka_partition = 1", "is stored, not"),
        ("UPDATE failures SET start_time = start_time - interval '1 us'", "is stored, not"),
        ("INSERT INTO readings SELECT * FROM readings WHERE kafka_offset = 999", "was never published|is stored, not"),
    ],
)
def test_a_result_that_is_not_the_naive_one_ends_the_benchmark(settings: Settings, damage: str, said: str) -> None:
    work = Work(4_000, machines=5, failure_rate=0.1)
    with Publisher(settings, settings.kafka_topics[0]) as publisher:
        for reading in work.messages():
            publisher.send(reading.message)
    runner = CatchUp(Pipeline(settings), lambda *_: None)
    runner.run(runner.backlog())
    engine = connect(settings)
    raw = engine.raw_connection()
    try:
        naive.check(work, raw.driver_connection)  # type: ignore[arg-type]
        with engine.begin() as connection:
            connection.execute(sa.text(damage))
        with pytest.raises(DataError, match=said):
            naive.check(work, raw.driver_connection)  # type: ignore[arg-type]
    finally:
        raw.close()
        engine.dispose()
