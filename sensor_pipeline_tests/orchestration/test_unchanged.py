"""A schedule launches nothing where its job has seen all that there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dagster import (
    DagsterInstance,
    DagsterRunStatus,
    Definitions,
    RunRequest,
    ScheduleDefinition,
    SkipReason,
    build_schedule_context,
    job,
)

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.orchestration import house, picture
from sensor_pipeline.orchestration.assets import build_assets
from sensor_pipeline.orchestration.checks import build_checks, build_schedule
from sensor_pipeline.orchestration.tags import SEEN
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.orchestration.test_job import publish_some, whole_backlog

LONG = timedelta(days=100_000)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def checks_schedule(settings: Settings) -> ScheduleDefinition:
    checks = build_checks(settings)
    schedule = build_schedule(settings, checks)
    defs = Definitions(assets=build_assets(settings), asset_checks=[checks], schedules=[schedule])
    return defs.resolve_schedule_def(schedule.name)


def house_schedule(settings: Settings) -> ScheduleDefinition:
    return house.build_schedule(settings, house.build_job(settings, []))


def picture_schedule(settings: Settings) -> ScheduleDefinition:
    return picture.build_schedule(settings, picture.build_job(settings))


def tick(schedule: ScheduleDefinition, instance: DagsterInstance, settings: Settings) -> RunRequest | SkipReason:
    defs = Definitions(assets=build_assets(settings), asset_checks=[build_checks(settings)])
    with build_schedule_context(
        instance, repository_def=defs.get_repository_def(), scheduled_execution_time=datetime.now(UTC)
    ) as context:
        data = schedule.evaluate_tick(context)
    return data.run_requests[0] if data.run_requests else SkipReason(data.skip_message)


def see(
    answer: RunRequest | SkipReason,
    schedule: ScheduleDefinition,
    instance: DagsterInstance,
    status: DagsterRunStatus = DagsterRunStatus.SUCCESS,
) -> str:
    """Let the run that a tick asked for have come so far; its id."""

    @job(name=schedule.job_name)
    def its_job() -> None: ...

    assert isinstance(answer, RunRequest)
    return instance.create_run_for_job(its_job, status=status, tags=dict(answer.tags)).run_id


@pytest.mark.parametrize("build", [checks_schedule, house_schedule, picture_schedule])
def test_nothing_is_launched_until_something_was_ingested_and_again_until_something_more_is(
    build: type, settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    settings = replace(settings, silent_after=LONG)
    schedule: ScheduleDefinition = build(settings)
    nothing = tick(schedule, instance, settings)
    assert isinstance(nothing, SkipReason)
    assert nothing.skip_message == "nothing was ever ingested"
    publisher = publish_some(settings)
    pipeline.run(whole_backlog(pipeline))
    first = tick(schedule, instance, settings)
    run_id = see(first, schedule, instance)
    again = tick(schedule, instance, settings)
    assert isinstance(again, SkipReason)
    assert f"run {run_id[:8]} has seen all that there is: readings 40, rejected 1" in (again.skip_message or "")
    publisher.send(0, b"poison", bad="not_json")
    publisher.flush()
    pipeline.run(whole_backlog(pipeline))
    more = tick(schedule, instance, settings)
    assert isinstance(more, RunRequest)
    assert more.tags[SEEN] != first.tags[SEEN]  # type: ignore[union-attr]


@pytest.mark.parametrize("status", [DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED, DagsterRunStatus.STARTED])
def test_a_run_that_did_not_succeed_has_seen_nothing(
    status: DagsterRunStatus, settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    publish_some(settings)
    pipeline.run(whole_backlog(pipeline))
    schedule = house_schedule(settings)
    see(tick(schedule, instance, settings), schedule, instance, status)
    assert isinstance(tick(schedule, instance, settings), RunRequest)


def test_what_was_seen_is_looked_at_again_after_a_day(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_some(settings)
    pipeline.run(whole_backlog(pipeline))
    schedule = house_schedule(settings)
    see(tick(schedule, instance, settings), schedule, instance)
    monkeypatch.setattr("sensor_pipeline.orchestration.unchanged._SEEN_WITHIN", timedelta(days=-1))
    assert isinstance(tick(schedule, instance, settings), RunRequest)


def test_a_run_of_the_house_that_was_not_done_is_followed_by_another(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_some(settings)
    pipeline.run(whole_backlog(pipeline))
    schedule = house_schedule(settings)
    house_job = house.build_job(settings, [])
    asked = tick(schedule, instance, settings)
    assert isinstance(asked, RunRequest)
    for seconds, is_done in [(0, False), (house._MOST_SECONDS, True)]:
        monkeypatch.setattr(house, "_MOST_SECONDS", seconds)
        assert house_job.execute_in_process(instance=instance, tags=dict(asked.tags)).success
        assert isinstance(tick(schedule, instance, settings), SkipReason) is is_done


def test_checks_are_made_while_messages_wait_and_when_a_machine_falls_silent(
    settings: Settings, pipeline: Pipeline, instance: DagsterInstance
) -> None:
    settings = replace(settings, silent_after=LONG)
    publisher = publish_some(settings)
    pipeline.run(whole_backlog(pipeline))
    schedule = checks_schedule(settings)
    see(tick(schedule, instance, settings), schedule, instance)
    assert isinstance(tick(schedule, instance, settings), SkipReason)
    soon = replace(settings, silent_after=timedelta(hours=1))
    assert isinstance(tick(checks_schedule(soon), instance, soon), RunRequest)
    publisher.send(0, b"poison", bad="not_json")
    publisher.flush()
    assert isinstance(tick(schedule, instance, settings), RunRequest)


def test_a_server_that_is_away_leaves_it_to_the_run_to_say_so(settings: Settings, instance: DagsterInstance) -> None:
    publish_some(settings)
    for away in (replace(settings, postgres_port=1), replace(settings, kafka_bootstrap_servers="127.0.0.1:1")):
        asked = tick(checks_schedule(away), instance, away)
        assert isinstance(asked, RunRequest)
        assert SEEN not in asked.tags
