"""What is too old is deleted, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from itertools import product
from typing import Any

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus, JobDefinition
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, TickData, TickStatus
from dagster._utils.error import SerializableErrorInfo

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.orchestration import house
from sensor_pipeline.orchestration.config import to_run_config
from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.postgres import batch_log
from sensor_pipeline.postgres.verify import CHECKS, ask
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect, expected, stored
from sensor_pipeline_tests.orchestration.test_job import metadata, publish_some, whole_backlog
from sensor_pipeline_tests.postgres.tables import dated
from sensor_pipeline_tests.publishing import Publisher


@pytest.fixture
def instance(tmp_path: Any) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def job(settings: Settings) -> JobDefinition:
    return build_job(settings)


def soon() -> datetime:
    """A time before which all lies that has been."""
    return datetime.now(UTC) + timedelta(hours=1)


def test_runs_that_ended_go_with_their_events_and_those_that_have_not_stay(
    settings: Settings, pipeline: Pipeline, job: JobDefinition, instance: DagsterInstance
) -> None:
    publish_some(settings)
    ended = job.execute_in_process(to_run_config(whole_backlog(pipeline)), instance=instance).run_id
    failed = instance.create_run_for_job(job, status=DagsterRunStatus.FAILURE).run_id
    running = instance.create_run_for_job(job, status=DagsterRunStatus.STARTED).run_id
    others = instance.create_run_for_job(house.build_job(settings, []), status=DagsterRunStatus.SUCCESS).run_id
    assert instance.all_logs(ended)
    assert house.forget_runs(instance, [job.name], datetime.now(UTC) - timedelta(hours=1), 60) == 0
    assert house.forget_runs(instance, [job.name], soon(), 60) == 2
    assert {run.run_id for run in instance.get_runs()} == {running, others}
    assert not instance.all_logs(ended)
    assert not instance.has_run(failed)


def test_more_than_a_piece_is_deleted_piece_by_piece_and_no_longer_than_asked(
    job: JobDefinition, instance: DagsterInstance, monkeypatch: Any
) -> None:
    monkeypatch.setattr(house, "_RUNS_A_PIECE", 2)
    for _ in range(5):
        instance.create_run_for_job(job, status=DagsterRunStatus.CANCELED)
    assert house.forget_runs(instance, [job.name], soon(), 0) == 0
    assert house.forget_runs(instance, [job.name], soon(), 60) == 5


def test_old_rows_of_the_batch_log_go_and_everything_still_adds_up(
    settings: Settings, pipeline: Pipeline, monkeypatch: Any
) -> None:
    monkeypatch.setattr(batch_log, "_ROWS_A_PIECE", 1)
    published = publish_some(settings).published
    batch = whole_backlog(pipeline)
    for part in batch.ranges:
        pipeline.run(type(batch)(batch.topic, batch.kafka_topic_id, (part,)))
    database = pipeline.database
    assert batch_log.forget_batches(database, datetime.now(UTC) - timedelta(hours=1)) == 0
    assert batch_log.forget_batches(database, soon()) == 4
    assert stored(settings) == expected(published)
    with database.begin() as connection:
        assert all(ask(connection, check).wrong == 0 for check in CHECKS)


def test_the_job_drops_the_readings_of_old_days_and_late_ones_are_rejected(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    today = datetime.now(UTC).date()
    begin_days_ago(pipeline, 3)
    publisher = Publisher(settings)
    for at, (days_ago, failing) in enumerate([(9, True), (9, True), (2, True), (1, True), (0, False)]):
        moment = datetime.combine(today, time(minute=at), UTC) - timedelta(days=days_ago)
        publisher.send(0, dated("m", moment, failing))
    publisher.flush()
    pipeline.run(whole_backlog(pipeline))
    job = house.build_job(replace(settings, readings_kept_days=1), [])
    result = job.execute_in_process(instance=instance)
    yesterday = (today - timedelta(days=1)).isoformat()
    # The failure's first reading, and its last one before yesterday, stay.
    assert metadata(result, "drop_old_readings") == {"readings dropped": 1, "kept from": yesterday}
    publisher.send(
        1, dated("m", datetime.combine(today, time(), UTC) - timedelta(days=2), False), bad="timestamp_too_old"
    )
    publisher.flush()
    written = pipeline.run(whole_backlog(pipeline))
    assert written.rejected_by_reason == {"timestamp_too_old": 1}
    with pipeline.database.begin() as connection:
        assert all(ask(connection, check).wrong == 0 for check in CHECKS)
    again = job.execute_in_process(instance=instance)
    assert metadata(again, "drop_old_readings") == {"readings dropped": 0, "kept from": yesterday}


def begin_days_ago(pipeline: Pipeline, days: int) -> None:
    """Let a fresh database be as one that was made some days ago."""
    with pipeline.database.begin() as connection:
        statement = sa.text("UPDATE readings_horizon SET horizon = horizon - :days RETURNING horizon")
        horizon = connection.scalars(statement, {"days": days}).one()
        connection.execute(sa.text("ALTER TABLE readings DETACH PARTITION readings_before_horizon"))
        connection.execute(
            sa.text(f"""
                ALTER TABLE readings ATTACH PARTITION readings_before_horizon
                FOR VALUES FROM (MINVALUE) TO ('{horizon} 00:00+00')
            """)
        )


def test_the_job_makes_the_coming_days_and_says_what_it_deleted(settings: Settings, instance: DagsterInstance) -> None:
    job = house.build_job(settings, [])
    result = job.execute_in_process(instance=instance)
    said = {
        e.step_key: {name: value.value for name, value in e.event_specific_data.metadata.items()}  # type: ignore[union-attr]
        for e in result.all_node_events
        if e.is_successful_output
    }
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    assert tomorrow.isoformat() in said["make_days"]["days made"]
    assert (said["delete_batches"]["batches deleted"], said["delete_runs"]["runs deleted"]) == (0, 0)
    with connect(settings).connect() as connection:
        name = f"readings_{tomorrow:%Y%m%d}"
        assert connection.scalars(sa.text("SELECT to_regclass(:name) IS NOT NULL"), {"name": name}).one()
    again = job.execute_in_process(instance=instance)
    assert again.success


def test_old_ticks_of_the_pipelines_own_sensors_go_and_others_stay(
    job: JobDefinition, instance: DagsterInstance
) -> None:
    now = datetime.now(UTC)
    here, elsewhere = (
        RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(name), "__repository__") for name in ("ours", "others")
    )
    for location in (here, elsewhere):
        sensor = location.get_instigator_origin("backlog_sensor")
        state = InstigatorState(sensor, InstigatorType.SENSOR, InstigatorStatus.DECLARED_IN_CODE)
        instance.add_instigator_state(state)
        about: dict[TickStatus, dict[str, Any]] = {
            TickStatus.SKIPPED: {},
            TickStatus.SUCCESS: {"run_ids": []},
            TickStatus.FAILURE: {"error": SerializableErrorInfo("no", [], None)},
        }
        for status, days in product(about, (0, 2, 8)):
            made = (now - timedelta(days=days)).timestamp()
            of_tick = {"timestamp": made, "selector_id": state.selector_id, "status": status, **about[status]}
            instance.create_tick(
                TickData(
                    instigator_origin_id=state.instigator_origin_id,
                    instigator_name=state.name,
                    instigator_type=InstigatorType.SENSOR,
                    **of_tick,
                )
            )
    run = instance.create_run_for_job(job, remote_job_origin=here.get_job_origin(job.name), job_code_origin=None)
    house.forget_ticks(instance, run, now)
    left = instance.get_ticks(*ids(here))
    kept = {(tick.status, (now - datetime.fromtimestamp(tick.timestamp, UTC)).days) for tick in left}
    failed = {(TickStatus.FAILURE, 0), (TickStatus.FAILURE, 2)}
    assert kept == {(TickStatus.SKIPPED, 0), (TickStatus.SUCCESS, 0)} | failed
    assert len(left) == len(kept)
    assert len(instance.get_ticks(*ids(elsewhere))) == 9


def ids(location: RemoteRepositoryOrigin) -> tuple[str, str]:
    sensor = location.get_instigator_origin("backlog_sensor")
    return sensor.get_id(), sensor.get_selector().get_id()
