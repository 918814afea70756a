"""Ticks of `run_notice_sensor` and `notice_sensor`, with runs of a real Dagster instance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from dagster import (
    DagsterInstance,
    DefaultSensorStatus,
    SensorEvaluationContext,
    SkipReason,
    build_sensor_context,
    job,
    op,
)

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.orchestration.config import to_run_config
from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.orchestration.notices import build_notice_sensor, build_run_notice_sensor
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import batch, catch_up, query
from sensor_pipeline_tests.kafka.producing import Publisher, delete_records, reading
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.receivers import receiving


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def watch(settings: Settings, instance: DagsterInstance, cursor: str | None) -> tuple[str | None, str]:
    """A tick of `run_notice_sensor`: its cursor after it, and what it says."""
    context = build_sensor_context(instance=instance, cursor=cursor)
    result = build_run_notice_sensor(settings, build_job(settings))(context)
    assert isinstance(context, SensorEvaluationContext)
    assert isinstance(result, SkipReason)
    return context.cursor, result.skip_message or ""


def fail(settings: Settings, instance: DagsterInstance, *, wrong: Settings | None = None, lane: str = "0") -> str:
    """A run of partition 0's first two messages that fails; its id."""
    owned = batch(settings, {0: (0, 2)})
    job = build_job(wrong or replace(settings, postgres_password="wrong"))
    result = job.execute_in_process(
        to_run_config(owned), instance=instance, raise_on_error=False, tags={"lane": f"{lane}@{owned.topic}"}
    )
    assert not result.success
    return result.run_id


def told(settings: Settings) -> list[tuple[str, str, dict[str, object]]]:
    rows = query(settings, "SELECT kind, subject, details FROM notices WHERE subject IS NOT NULL ORDER BY id")
    return [tuple(row) for row in rows]  # type: ignore[misc]


def known_topic(settings: Settings) -> Publisher:
    publisher = Publisher(settings)
    publisher.readings({0: 2, 1: 2})
    catch_up(Pipeline(settings))
    return publisher


def test_both_sensors_are_on_from_the_start_and_the_daemon_ticks_sensors_side_by_side(settings: Settings) -> None:
    sensors = [build_notice_sensor(settings), build_run_notice_sensor(settings, build_job(settings))]
    assert [s.name for s in sensors] == ["notice_sensor", "run_notice_sensor"]
    assert {s.default_status for s in sensors} == {DefaultSensorStatus.RUNNING}
    instance = yaml.safe_load(resources.files("sensor_pipeline.orchestration").joinpath("dagster.yaml").read_text())
    assert instance["sensors"]["use_threads"] is True
    assert instance["sensors"]["num_workers"] > len(sensors)


def test_a_failed_run_is_told_once_with_its_error(settings: Settings, instance: DagsterInstance) -> None:
    Publisher(settings).readings({0: 2})
    run_id = fail(settings, instance)
    cursor, said = watch(settings, instance, None)
    assert said.startswith("failed runs: 1; notices written: 1")
    ((kind, subject, details),) = told(settings)
    topic = settings.kafka_topics[0]
    assert (kind, subject) == ("batch_failed", f"0@{topic} UnavailableError")
    assert (details["run_id"], details["ranges"]) == (run_id, ["0:0-2"])
    text = str(details["text"])
    assert text.startswith(f"Batch {topic} 0:0-2 failed: no connection to PostgreSQL")
    assert settings.postgres_password not in text
    assert watch(settings, instance, cursor) == (cursor, "nothing new to tell")
    assert len(told(settings)) == 1


def test_a_failure_that_lasts_is_told_again_only_after_a_while(settings: Settings, instance: DagsterInstance) -> None:
    Publisher(settings).readings({0: 2})
    fail(settings, instance)
    cursor, _ = watch(settings, instance, None)
    fail(settings, instance)
    fail(settings, instance, lane="1")
    cursor, said = watch(settings, instance, cursor)
    assert said.startswith("failed runs: 2; notices written: 1")
    fail(settings, instance)
    assert "notices written: 1" in watch(replace(settings, alert_repeat=timedelta(0)), instance, cursor)[1]
    assert len(told(settings)) == 3


def test_a_failed_run_is_told_after_postgresql_was_down(settings: Settings, instance: DagsterInstance) -> None:
    Publisher(settings).readings({0: 2})
    cursor, _ = watch(settings, instance, None)
    down = replace(settings, postgres_port=ports.any_free())
    fail(settings, instance, wrong=down)
    context = build_sensor_context(instance=instance, cursor=cursor)
    with pytest.raises(UnavailableError, match="no connection to PostgreSQL"):
        build_run_notice_sensor(down, build_job(down))(context)
    assert isinstance(context, SensorEvaluationContext)
    assert context.cursor == cursor
    watch(settings, instance, context.cursor)
    assert [kind for kind, _, _ in told(settings)] == ["batch_failed"]


@op
def breaks() -> None:
    raise RuntimeError("no")


@job
def other() -> None:
    breaks()


def test_a_success_and_another_jobs_failure_are_nobodys_business(settings: Settings, instance: DagsterInstance) -> None:
    Publisher(settings).readings({0: 2})
    assert (
        build_job(settings).execute_in_process(to_run_config(batch(settings, {0: (0, 2)})), instance=instance).success
    )
    assert not other.execute_in_process(instance=instance, raise_on_error=False).success
    assert watch(settings, instance, None)[1] == "nothing new to tell"
    assert told(settings) == []


def test_what_is_none_of_our_errors_is_told_by_its_name_only(
    settings: Settings, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the value of a reading")

    Publisher(settings).readings({0: 2})
    monkeypatch.setattr(Pipeline, "detect", broken)
    fail(settings, instance, wrong=settings)
    watch(settings, instance, None)
    ((_, subject, details),) = told(settings)
    assert subject.endswith("ValueError")
    assert "the value of a reading" not in str(details)
    assert "failed: ValueError, which the run's page shows" in str(details["text"])


def test_a_gap_is_told_with_its_offsets(settings: Settings, instance: DagsterInstance) -> None:
    publisher = known_topic(settings)
    publisher.readings({0: 6})
    delete_records(settings, publisher.topic, {0: 5})
    owned = batch(settings, {0: (2, 8)})
    assert (
        not build_job(settings)
        .execute_in_process(to_run_config(owned), instance=instance, raise_on_error=False)
        .success
    )
    watch(settings, instance, None)
    ((kind, subject, details),) = told(settings)
    assert (kind, subject) == ("gap", f"{publisher.topic} 0")
    assert "partition 0 offsets [2, 5)" in str(details["text"])
    assert "accept-gap" in str(details["text"])


def test_rejected_messages_over_the_limit_are_told(settings: Settings, instance: DagsterInstance) -> None:
    publisher = known_topic(settings)
    for _ in range(3):
        publisher.send(0, b"poison", bad="not_json")
    catch_up(Pipeline(settings))
    watch(replace(settings, alert_rejected=3), instance, None)
    assert told(settings) == []
    watch(replace(settings, alert_rejected=2), instance, None)
    assert [(kind, details["rejected"]) for kind, _, details in told(settings)] == [("rejected_over_limit", 3)]
    watch(replace(settings, alert_rejected=2), instance, None)
    assert len(told(settings)) == 1


def test_falling_behind_is_told_where_what_waits_is_not_ingested(settings: Settings, instance: DagsterInstance) -> None:
    quick = replace(settings, alert_behind_after=timedelta(seconds=60))
    publisher = known_topic(settings)
    then = datetime.now(UTC) - timedelta(minutes=5)
    for second in range(4):
        publisher.send(3, reading("m", second), timestamp_ms=round(then.timestamp() * 1000))
    watch(quick, instance, None)
    assert told(settings) == [], "the topic is new"
    with connect(settings).begin() as connection:
        connection.execute(sa.text("UPDATE topics SET first_seen = first_seen - interval '1 hour'"))
        connection.execute(sa.text("UPDATE batches SET committed_at = committed_at - interval '1 hour'"))
    watch(quick, instance, None)
    ((kind, subject, details),) = told(settings)
    assert (kind, subject) == ("falling_behind", publisher.topic)
    assert (details["lag"], details["waiting"], details["ingested"]) == (4, 4, 0)
    catch_up(Pipeline(settings))
    watch(replace(quick, alert_repeat=timedelta(0)), instance, None)
    assert len(told(settings)) == 1


def test_a_kafka_that_is_down_keeps_no_failed_run_from_being_told(
    settings: Settings, instance: DagsterInstance
) -> None:
    Publisher(settings).readings({0: 2})
    fail(settings, instance)
    alone = replace(settings, kafka_bootstrap_servers=f"127.0.0.1:{ports.any_free()}")
    _, said = watch(alone, instance, None)
    assert "did not answer for topic" in said
    assert [kind for kind, _, _ in told(settings)] == ["batch_failed"]


def test_what_the_batches_and_the_runs_tell_reaches_the_webhook(settings: Settings, instance: DagsterInstance) -> None:
    settings = replace(settings, alert_max_age=timedelta(days=3650))
    publisher = Publisher(settings)
    publisher.send(0, reading("m", 1, failing=True))
    publisher.send(0, reading("m", 2))
    catch_up(Pipeline(settings))
    fail(settings, instance)
    watch(settings, instance, None)
    with receiving() as receiver:
        deliver = build_notice_sensor(replace(settings, alert_webhook_url=receiver.url))
        result = deliver(build_sensor_context(instance=instance))
        assert isinstance(result, SkipReason)
        assert result.skip_message == "3 sent"
    kinds = [body["kind"] for body in receiver.got]
    assert sorted(kinds) == ["batch_failed", "failure_ended", "failure_started"]
    assert kinds.index("failure_started") < kinds.index("failure_ended")
    assert all(body["text"] and body["title"] and body["alert_uid"] for body in receiver.got)


def test_a_webhook_that_is_down_fails_no_tick_and_is_said(settings: Settings, instance: DagsterInstance) -> None:
    Publisher(settings).readings({0: 2})
    fail(settings, instance)
    watch(settings, instance, None)
    url = f"http://127.0.0.1:{ports.any_free()}/"
    result = build_notice_sensor(replace(settings, alert_webhook_url=url))(build_sensor_context(instance=instance))
    assert isinstance(result, SkipReason)
    assert "the webhook did not answer (ConnectionError)" in (result.skip_message or "")
