"""Ticks of `backlog_sensor`, each against a real Kafka, a real PostgreSQL and a Dagster instance of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from dagster import (
    DagsterInstance,
    DagsterRunStatus,
    DefaultSensorStatus,
    RunRequest,
    SensorResult,
    SkipReason,
    build_sensor_context,
)

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.offsets import Batch
from sensor_pipeline.orchestration import tags
from sensor_pipeline.orchestration.config import of_run, to_run_config
from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.orchestration.sensor import build_sensor
from sensor_pipeline.postgres.transaction import Origin
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.producing import add_partitions, group_offsets
from sensor_pipeline_tests.oracle import expected, stored
from sensor_pipeline_tests.publishing import Publisher, message


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


def publish(settings: Settings, count: int, partitions: int = 4) -> Publisher:
    publisher = Publisher(settings)
    for at in range(count):
        publisher.send(at % partitions, message(f"machine-{at % 3}", at, at % 7 == 0))
    return publisher.flush()


def tick(settings: Settings, instance: DagsterInstance) -> tuple[list[RunRequest], str]:
    """What one tick launches, and what it says."""
    result = build_sensor(settings, build_job(settings))(build_sensor_context(instance=instance))
    assert isinstance(result, SensorResult)
    said = result.cursor or ""
    skipped = result.skip_reason
    assert (skipped is None) == bool(result.run_requests)
    assert skipped is None or (isinstance(skipped, SkipReason) and skipped.skip_message == said)
    return list(result.run_requests or ()), said


def record(instance: DagsterInstance, settings: Settings, request: RunRequest, status: DagsterRunStatus) -> None:
    """Let the instance know a run of the request's batch in some state."""
    instance.create_run_for_job(build_job(settings), run_config=request.run_config, status=status, tags=request.tags)


def test_it_is_on_from_the_start_and_runs_as_often_as_set(settings: Settings) -> None:
    sensor = build_sensor(replace(settings, commit_interval_ms=7000), build_job(settings))
    assert sensor.name == "backlog_sensor"
    assert sensor.default_status == DefaultSensorStatus.RUNNING
    assert sensor.minimum_interval_seconds == 7


def test_a_backlog_becomes_one_batch_a_lane_and_the_runs_ingest_it(
    settings: Settings, instance: DagsterInstance
) -> None:
    settings = replace(settings, lanes=2)
    published = publish(settings, 60).published
    requests, said = tick(settings, instance)
    topic = settings.kafka_topics[0]
    assert said == ("lag 60 (lane 0: 30, lane 1: 30), 0 in flight; 2 batches launched (lane 0: 30, lane 1: 30)")
    assert [r.tags[tags.LANE] for r in requests] == [f"0@{topic}", f"1@{topic}"]
    assert [r.tags[tags.RANGES] for r in requests] == ["0:0-15 2:0-15", "1:0-15 3:0-15"]
    assert all(r.run_key is None for r in requests)
    for request in requests:
        assert build_job(settings).execute_in_process(request.run_config, instance=instance).success
    assert stored(settings) == expected(published)
    assert tick(settings, instance)[0] == []


def test_what_a_run_in_flight_owns_is_not_planned_again_and_a_fifth_batch_of_a_lane_waits(
    settings: Settings, instance: DagsterInstance
) -> None:
    settings = replace(settings, batch_size=20)
    publish(settings, 100)
    first = tick(settings, instance)[0]
    batches = [of_run(r.run_config) for r in first]
    assert [str(r) for b in batches if b for r in b.ranges] == [
        *("0:0-5", "1:0-5", "2:0-5", "3:0-5"),
        *("0:5-10", "1:5-10", "2:5-10", "3:5-10"),
        *("0:10-15", "1:10-15", "2:10-15", "3:10-15"),
        *("0:15-20", "1:15-20", "2:15-20", "3:15-20"),
    ]
    for request in first:
        record(instance, settings, request, DagsterRunStatus.STARTED)
    requests, said = tick(settings, instance)
    assert requests == []
    assert "lane 0 has 4 batches in flight" in said
    assert "lag 100, 4 in flight (0:0-5 1:0-5 2:0-5 3:0-5; " in said


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_lanes_changed_and_partitions_added_while_runs_are_in_flight_end_in_the_oracles_rows(
    settings: Settings, instance: DagsterInstance, before: int, after: int
) -> None:
    """A run keeps the lane's tag with which it was launched, so that Dagster may let old and new ones run together."""
    settings = replace(settings, batch_size=12)
    published = publish(settings, 40).published
    old = tick(replace(settings, lanes=before), instance)[0]
    for request in old:
        record(instance, settings, request, DagsterRunStatus.STARTED)
    add_partitions(settings, settings.kafka_topics[0], 5)
    published += publish(settings, 60, partitions=5).published
    changed = replace(settings, lanes=after)

    flying = batches_of(old)
    while batches := flying + batches_of(tick(changed, instance)[0]):
        ranges = sorted(r for batch in batches for r in batch.ranges)
        assert all(a.partition != b.partition or a.end <= b.start for a, b in pairwise(ranges))
        with ThreadPoolExecutor(len(batches)) as lanes:
            assert sum(lanes.map(lambda b: Pipeline(settings).run(b).batch_id is not None, batches)) == len(batches)
        for run in instance.get_runs():
            instance.delete_run(run.run_id)
        flying = []
    assert stored(settings) == expected(published)


def batches_of(requests: Sequence[RunRequest]) -> list[Batch]:
    return [batch for request in requests if (batch := of_run(request.run_config))]


def test_a_failed_batch_is_planned_again_after_a_pause_one_partition_at_a_time(
    settings: Settings, instance: DagsterInstance
) -> None:
    publish(settings, 40)
    record(instance, settings, tick(settings, instance)[0][0], DagsterRunStatus.FAILURE)
    requests, said = tick(settings, instance)
    assert requests == []
    assert "failed and is tried again at" in said


def test_a_mirror_that_a_killed_run_left_behind_is_mended_though_nothing_more_comes(
    settings: Settings, instance: DagsterInstance, pipeline: Pipeline
) -> None:
    published = publish(settings, 40).published
    (request,) = tick(settings, instance)[0]
    batch = of_run(request.run_config)
    assert batch is not None
    drained = pipeline.drain(batch)
    pipeline.write(batch, drained, pipeline.detect(drained), Origin(datetime.now(UTC)))
    assert group_offsets(settings) == {}

    (request,) = tick(settings, instance)[0]
    record(instance, settings, request, DagsterRunStatus.STARTED)
    assert tick(settings, instance)[0] == []
    instance.delete_run(instance.get_runs()[0].run_id)
    record(instance, settings, request, DagsterRunStatus.FAILURE)
    assert tick(settings, instance) == ([], f"{IDLE}; {BEHIND}")
    instance.delete_run(instance.get_runs()[0].run_id)
    assert build_job(settings).execute_in_process(request.run_config, instance=instance).success
    assert group_offsets(settings) == dict.fromkeys(range(4), 10)
    assert tick(settings, instance)[0] == []
    assert stored(settings) == expected(published)


IDLE = "lag 0, 0 in flight; nothing to launch"
BEHIND = "the group's offsets are behind the ledger, and mending them has failed just now"


def test_a_partition_with_a_gap_is_planned_alone(
    settings: Settings, instance: DagsterInstance, pipeline: Pipeline
) -> None:
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    publish(settings, 40)
    assert tick(settings, instance)[0]  # the topic is known from here on, and starts at 0
    topic = settings.kafka_topics[0]
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    for future in admin.delete_records([TopicPartition(topic, 2, 4)]).values():
        future.result(20)
    requests, _ = tick(settings, instance)
    assert [r.tags[tags.RANGES] for r in requests] == ["0:0-10 1:0-10 3:0-10", "2:0-10"]


def test_one_topic_that_is_not_there_does_not_hold_up_the_others(settings: Settings, instance: DagsterInstance) -> None:
    publish(settings, 8)
    both = replace(settings, kafka_topics=("there-is-none", *settings.kafka_topics))
    assert len(tick(both, instance)[0]) == 1
    none = replace(settings, kafka_topics=("there-is-none",))
    requests, said = tick(none, instance)
    assert requests == []
    assert "there is no topic there-is-none" in said
    assert "\n" not in said


def test_a_tick_says_when_more_comes_in_than_is_ingested(settings: Settings, instance: DagsterInstance) -> None:
    seconds = iter((0.0, 100.0))
    sensor = build_sensor(settings, build_job(settings), clock=lambda: next(seconds))
    for batch in range(2):
        publish(settings, 200 * (1 + batch))
        result = sensor(build_sensor_context(instance=instance))
        assert isinstance(result, SensorResult)
        assert ("falling behind: 4 readings/s in, 0 out" in (result.cursor or "")) == (batch == 1)


def test_a_batch_size_that_holds_a_lane_back_is_said(settings: Settings, instance: DagsterInstance) -> None:
    _, said = tick(replace(settings, batch_size=100), instance)
    assert "BATCH_SIZE=100, LANES=1 and COMMIT_INTERVAL_MS=5000 allow at most 80 readings/s" in said


def test_a_batch_survives_the_way_through_run_config(settings: Settings, instance: DagsterInstance) -> None:
    publish(settings, 8)
    request = tick(settings, instance)[0][0]
    batch = of_run(request.run_config)
    assert batch is not None
    assert to_run_config(batch) == request.run_config
    assert of_run({"ops": {}}) is None
