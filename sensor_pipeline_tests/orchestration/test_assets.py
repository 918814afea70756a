"""What the assets' pages and a run's tags say of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from dagster import AssetKey, DagsterInstance

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.orchestration import tags
from sensor_pipeline.orchestration.assets import COLUMNS, FAILURES, HEALTH, MACHINES, READINGS, REJECTED, build_assets
from sensor_pipeline.orchestration.config import to_run_config
from sensor_pipeline.orchestration.job import build_job
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect, expected
from sensor_pipeline_tests.orchestration.test_job import publish_some, whole_backlog
from sensor_pipeline_tests.publishing import Publisher


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


def materialized(result: Any) -> dict[AssetKey, dict[str, Any]]:
    """What a run says of each asset."""
    found: dict[AssetKey, dict[str, Any]] = {}
    for event in result.asset_materializations_for_node("write"):
        assert event.asset_key not in found
        found[event.asset_key] = {name: value.value for name, value in event.metadata.items()}
    return found


def test_the_columns_of_an_asset_are_those_of_its_table(database_settings: Settings) -> None:
    with connect(database_settings).connect() as connection:
        for key, columns in COLUMNS.items():
            rows = connection.execute(
                sa.text("SELECT column_name, data_type FROM information_schema.columns WHERE table_name = :table"),
                {"table": key.path[-1]},
            )
            stored = {row.column_name: row.data_type for row in rows}
            assert {column.name: column.type for column in columns} == stored


def test_readings_come_of_every_topic_and_failures_of_readings(settings: Settings) -> None:
    specs = {spec.key: spec for spec in build_assets(replace(settings, kafka_topics=("a.b", "c")))}
    topics = {AssetKey(["kafka", "a.b"]), AssetKey(["kafka", "c"])}
    assert specs.keys() == topics | {READINGS, REJECTED, MACHINES, FAILURES, HEALTH}
    assert {dep.asset_key for dep in specs[READINGS].deps} == topics
    assert {dep.asset_key for dep in specs[REJECTED].deps} == topics
    assert [dep.asset_key for dep in specs[FAILURES].deps] == [READINGS]
    assert all(spec.description and spec.owners for spec in specs.values())
    assert settings.postgres_password not in str([spec.metadata for spec in specs.values()])


def test_a_batch_materializes_every_table_with_numbers_that_plot(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    published = publish_some(settings).published
    rows = expected(published)
    result = build_job(settings).execute_in_process(to_run_config(whole_backlog(pipeline)), instance=instance)
    said = materialized(result)
    assert {key: of["dagster/row_count"] for key, of in said.items()} == {
        READINGS: 40,
        REJECTED: 1,
        MACHINES: 2,
        FAILURES: len(rows.failures),
    }
    assert (said[READINGS]["readings"], said[READINGS]["lag left"]) == (40, 0)
    assert said[READINGS]["oldest unread age in seconds"] == 0
    assert said[READINGS]["event to commit in seconds, p50"] <= said[READINGS]["event to commit in seconds, p95"]
    assert {"seconds in drain", "seconds in detect", "seconds in write"} <= said[READINGS].keys()
    assert said[REJECTED]["rejected: not_json"] == 1
    active = sum(end is None for end, _ in rows.failures.values())
    assert said[FAILURES]["failures started"] == len(rows.failures)
    assert (said[FAILURES]["failures ended"], said[FAILURES]["active failures"]) == (
        len(rows.failures) - active,
        active,
    )
    numbers = [value for of in said.values() for value in of.values()]
    assert all(isinstance(number, int | float) for number in numbers)


def test_what_a_batch_leaves_is_said_with_how_long_it_has_waited(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    publish_some(settings)
    whole = whole_backlog(pipeline)
    part = Batch(whole.topic, whole.kafka_topic_id, (OffsetRange(0, 0, 4),))
    result = build_job(settings).execute_in_process(to_run_config(part), instance=instance)
    said = materialized(result)[READINGS]
    assert said["lag left"] == len(whole) - 4
    assert 0 <= said["oldest unread age in seconds"] < 600


def test_people_can_filter_runs_by_outcome_machines_topic_and_ranges(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    publish_some(settings)
    batch = whole_backlog(pipeline)

    def tags_of(job_settings: Settings) -> dict[str, str]:
        job = build_job(job_settings)
        run = job.execute_in_process(to_run_config(batch), instance=instance, raise_on_error=False)
        found = instance.get_run_by_id(run.run_id)
        assert found is not None
        return dict(found.tags)

    first = tags_of(settings)
    assert (first[tags.OUTCOME], first[tags.MACHINES]) == ("ingested", "2")
    assert (first[tags.TOPIC], first[tags.RANGES]) == (batch.topic, " ".join(map(str, batch.ranges)))
    assert tags_of(settings)[tags.OUTCOME] == "already ingested"
    assert tags_of(replace(settings, postgres_password="wrong"))[tags.OUTCOME] == "UnavailableError"


def test_rejected_messages_are_shown_by_three_samples_of_each_reason_cut_and_printable(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    publisher = Publisher(settings)
    for payload in (b"\x1b[31mred", b"x" * 500, b"{", b"["):
        publisher.send(0, payload, bad="not_json")
    publisher.send(1, b"\xff\xfe", bad="not_utf8")
    publisher.flush()
    result = build_job(settings).execute_in_process(to_run_config(whole_backlog(pipeline)), instance=instance)
    output = next(e for e in result.all_node_events if e.step_key == "drain" and e.is_successful_output)
    records = [r.data for r in output.event_specific_data.metadata["rejected samples"].records]  # type: ignore[union-attr]
    assert [(r["reason"], r["offset"]) for r in records] == [
        ("not_json", 0),
        ("not_json", 1),
        ("not_json", 2),
        ("not_utf8", 0),
    ]
    shown = [str(r["message"]) for r in records]
    assert shown[0] == r"\x1b[31mred"
    assert shown[1] == "x" * 79 + "…"
    assert shown[3] == r"\xff\xfe"
