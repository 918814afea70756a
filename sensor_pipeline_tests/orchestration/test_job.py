"""Runs of `ingest_batch` as Dagster makes them, against a real Kafka and a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterInstance, JobDefinition, ReexecutionOptions, execute_job, reconstructable

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.offsets import Batch
from sensor_pipeline.orchestration.config import to_run_config
from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import expected, stored
from sensor_pipeline_tests.orchestration.jobs import job_from_environment, use
from sensor_pipeline_tests.publishing import Publisher, message


def whole_backlog(pipeline: Pipeline) -> Batch:
    """One batch of all that is there."""
    name = pipeline.settings.kafka_topics[0]
    backlog = read_backlog(pipeline.settings, pipeline.kafka, pipeline.database, name)
    ranges = tuple(r for p in backlog.partitions if (r := p.next_range))
    return Batch(name, backlog.topic.kafka_topic_id, ranges)


def publish_some(settings: Settings) -> Publisher:
    """Two machines with failures over four partitions, and a poison message."""
    publisher = Publisher(settings)
    for second in range(40):
        failing = second % 10 in (3, 4)
        publisher.send(second % 4, message(f"machine-{second % 2}", second, failing))
    publisher.send(1, b"poison", bad="not_json")
    return publisher.flush()


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    """A Dagster instance that keeps its runs in a folder."""
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def job(settings: Settings) -> JobDefinition:
    return build_job(settings)


def metadata(result: Any, op: str) -> dict[str, Any]:
    """What an op's output says of itself, as plain values."""
    events = [e for e in result.all_node_events if e.event_type == DagsterEventType.STEP_OUTPUT and e.step_key == op]
    return {name: value.value for name, value in events[0].event_specific_data.metadata.items()}


def test_a_run_brings_its_batch_to_the_oracles_rows_and_says_what_it_did(
    settings: Settings, pipeline: Pipeline, job: JobDefinition, instance: DagsterInstance
) -> None:
    published = publish_some(settings).published
    batch = whole_backlog(pipeline)
    result = job.execute_in_process(to_run_config(batch), instance=instance)
    assert result.success
    assert stored(settings) == expected(published)
    said = metadata(result, "write")
    assert (said["inserted"], said["rejected"], said["rejected by reason"]) == (40, 1, {"not_json": 1})
    assert said["failures started"] == len(expected(published).failures)
    ended = [end for end, _ in expected(published).failures.values() if end is not None]
    assert ended
    assert said["failures ended"] == len(ended)
    assert {r.data["machine"] for r in said["failures"].records} == {"machine-0", "machine-1"}
    assert said["lag left"] == 0
    assert pipeline.kafka.committed_offsets(pipeline.kafka.topic(batch.topic)) == {
        r.partition: r.end for r in batch.ranges
    }
    with pipeline.database.begin() as connection:
        logged = connection.exec_driver_sql("SELECT dagster_run_id FROM batches").scalars().all()
    assert logged == [result.run_id]


def test_the_same_batch_again_is_a_success_that_changes_no_row_and_says_so(
    settings: Settings, pipeline: Pipeline, job: JobDefinition, instance: DagsterInstance
) -> None:
    publish_some(settings)
    run_config = to_run_config(whole_backlog(pipeline))
    assert job.execute_in_process(run_config, instance=instance).success
    before = every_row(pipeline)
    again = job.execute_in_process(run_config, instance=instance)
    assert again.success
    assert metadata(again, "write")["outcome"] == "already ingested, nothing written"
    assert metadata(again, "drain")["drained"] == 0
    assert every_row(pipeline) == before


def failed_run(settings: Settings, pipeline: Pipeline, instance: DagsterInstance, run_config: Any) -> Any:
    """A run that failed in `write`, and a database that has been mended since."""
    with pipeline.database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE batches ADD CONSTRAINT none CHECK (false)")
    failed = execute_job(reconstructable(job_from_environment), instance, run_config=run_config)
    assert [e.step_key for e in failed.all_node_events if e.is_step_failure] == ["write"]
    with pipeline.database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE batches DROP CONSTRAINT none")
    return failed


@pytest.mark.parametrize("selection", [["drain"], ["write"], ["detect", "write"], ["commit"], ["write", "commit"]])
def test_selected_ops_are_re_executed_with_what_they_need_drained_again(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance, selection: list[str], monkeypatch: Any
) -> None:
    published = publish_some(settings).published
    run_config = to_run_config(whole_backlog(pipeline))
    use(monkeypatch, settings)
    failed = failed_run(settings, pipeline, instance, run_config)
    options = ReexecutionOptions(parent_run_id=failed.run_id, step_selection=selection)
    job = reconstructable(job_from_environment)
    again = execute_job(job, instance, run_config=run_config, reexecution_options=options)
    assert again.success
    assert {e.step_key for e in again.all_node_events if e.is_step_success} == set(selection)
    if "write" in selection:
        assert stored(settings) == expected(published)


def test_a_failed_run_is_re_executed_from_failure(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance, monkeypatch: Any
) -> None:
    published = publish_some(settings).published
    run_config = to_run_config(whole_backlog(pipeline))
    use(monkeypatch, settings)
    failed = failed_run(settings, pipeline, instance, run_config)
    options = ReexecutionOptions.from_failure(failed.run_id, instance)
    job = reconstructable(job_from_environment)
    again = execute_job(job, instance, run_config=run_config, reexecution_options=options)
    assert again.success
    assert {e.step_key for e in again.all_node_events if e.is_step_success} == {"write", "commit"}
    assert stored(settings) == expected(published)


def test_a_failed_run_says_in_one_line_what_was_wrong_and_what_to_do(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    publish_some(settings)
    run_config = to_run_config(whole_backlog(pipeline))
    job = build_job(replace(settings, postgres_password="wrong"))
    result = job.execute_in_process(run_config, instance=instance, raise_on_error=False)
    assert not result.success
    failure = next(e for e in result.all_node_events if e.is_step_failure).event_specific_data
    said = failure.user_failure_data.description
    assert "\n" not in said
    assert "POSTGRES_HOST" in said
    assert settings.postgres_password not in said


def test_a_run_config_with_two_ranges_of_one_partition_is_refused(
    settings: Settings, pipeline: Pipeline, job: JobDefinition, instance: DagsterInstance
) -> None:
    publish_some(settings)
    run_config = to_run_config(whole_backlog(pipeline))
    ranges = run_config["resources"]["batch"]["config"]["ranges"]
    ranges.append(dict(ranges[0]))
    result = job.execute_in_process(run_config, instance=instance, raise_on_error=False)
    assert not result.success


def every_row(pipeline: Pipeline) -> dict[str, list[Any]]:
    """Every row of every table, with the transaction that wrote it."""
    tables = ("topics", "machines", "failures", "readings", "rejected_messages", "ingested_offsets", "batches")
    with pipeline.database.begin() as connection:
        return {
            table: sorted(map(str, connection.exec_driver_sql(f"SELECT xmin, t::text FROM {table} t").all()))
            for table in tables
        }
