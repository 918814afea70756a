"""Once an hour: what is too old to be kept is deleted, and the coming days' partitions are made.

Dagster keeps its runs and their events for ever. Of ticks it deletes old ones by itself, at the end of each tick, with
a statement for each number of days: dagster.yaml names one, and this job deletes most of them earlier.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from dagster import (
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    DefaultScheduleStatus,
    JobDefinition,
    OpExecutionContext,
    RunsFilter,
    ScheduleDefinition,
    in_process_executor,
    job,
    op,
)
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import TickStatus

from sensor_pipeline.orchestration import tags
from sensor_pipeline.orchestration.explained import failures_explained
from sensor_pipeline.orchestration.unchanged import unless_seen
from sensor_pipeline.postgres.batch_log import forget_batches
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.days import drop_readings, ensure_days
from sensor_pipeline.settings import Settings

JOB_NAME = "keep_house"
_ENDED = [DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED]
_RUNS_A_PIECE = 200
# An hour's runs take seconds. Where years were left, the next hours go on: a run may take five minutes.
_MOST_SECONDS = 180
_DAYS_AHEAD = 2
# The page of a sensor reads all of its ticks: of a week's 121,000 that took three times as long as of a day's. What a
# batch did is told by its run.
_TICKS_KEPT_DAYS = {TickStatus.SKIPPED: 1, TickStatus.SUCCESS: 1, TickStatus.FAILURE: 7}


def build_job(settings: Settings, jobs: Sequence[str]) -> JobDefinition:
    """The job with these settings; `jobs` are those whose old runs it deletes, besides its own."""
    database = Database(settings)

    @op
    def make_days(context: OpExecutionContext) -> None:
        """Make the partitions of today and the coming days, so that no batch has to."""
        today = datetime.now(UTC).date()
        with failures_explained():
            made = ensure_days(database, [today + timedelta(days=ahead) for ahead in range(_DAYS_AHEAD + 1)])
        context.add_output_metadata({"days made": ", ".join(day.isoformat() for day in made) or "none"})

    @op
    def drop_old_readings(context: OpExecutionContext) -> None:
        """Drop the days of readings that are older than READINGS_KEPT_DAYS, if that is set."""
        days = settings.readings_kept_days
        if days is None:
            context.add_output_metadata({"readings dropped": 0, "kept from": "READINGS_KEPT_DAYS is not set: all"})
            return
        before = datetime.now(UTC).date() - timedelta(days=days)
        with failures_explained(), _left_for_the_next(context):
            dropped = drop_readings(database, before, _MOST_SECONDS)
        kept_from = dropped.kept_from.isoformat() if dropped.kept_from else "all: none is in a day that is too old"
        context.add_output_metadata({"readings dropped": dropped.readings, "kept from": kept_from})

    @op
    def delete_batches(context: OpExecutionContext) -> None:
        """Delete old rows of the batch log; the ledger and its totals stay."""
        before = datetime.now(UTC) - timedelta(days=settings.batches_kept_days)
        with failures_explained():
            deleted = forget_batches(database, before)
        context.add_output_metadata({"batches deleted": deleted, "older than": before.isoformat()})

    @op
    def delete_runs(context: OpExecutionContext) -> None:
        """Delete old runs of the pipeline's own jobs that have ended, with their events."""
        before = datetime.now(UTC) - timedelta(days=settings.runs_kept_days)
        with _left_for_the_next(context):
            deleted = forget_runs(context.instance, [*jobs, JOB_NAME], before, _MOST_SECONDS)
        context.add_output_metadata({"runs deleted": deleted, "older than": before.isoformat()})

    @op
    def delete_ticks(context: OpExecutionContext) -> None:
        """Delete old ticks of the pipeline's own sensors."""
        forget_ticks(context.instance, context.run, datetime.now(UTC))

    @job(
        name=JOB_NAME,
        tags=tags.MAY_TAKE_HOURS,  # the readings of a busy day are counted before they are dropped
        executor_def=in_process_executor,
        description="Deletes what is too old, makes coming days.",
    )
    def keep_house() -> None:
        make_days()
        drop_old_readings()
        delete_batches()
        delete_runs()
        delete_ticks()

    return keep_house


def build_schedule(settings: Settings, job: JobDefinition) -> ScheduleDefinition:
    """Once an hour, on from the start; where nothing was ingested since and nothing is left to do, once a day."""
    return ScheduleDefinition(
        name="keep_house_schedule",
        cron_schedule="25 * * * *",
        job=job,
        execution_fn=unless_seen(JOB_NAME, Database(settings)),
        default_status=DefaultScheduleStatus.RUNNING,
        description="Once an hour: deletes old runs and old rows of the batch log, makes the coming days' partitions.",
    )


@contextmanager
def _left_for_the_next(context: OpExecutionContext) -> Iterator[None]:
    """Where the time was over before the work, the run has not seen to all."""
    began = time.monotonic()
    yield
    if time.monotonic() - began >= _MOST_SECONDS:
        context.instance.add_run_tags(context.run_id, {tags.SEEN: "more is left to delete"})


def forget_runs(instance: DagsterInstance, jobs: Sequence[str], before: datetime, most_seconds: float) -> int:
    """Delete runs of some jobs that were created before some time and have ended, a job's oldest first.

    An instance may be shared, and the runs of others are not ours to delete. Each run is deleted by itself, so that it
    may be stopped at any time; after `most_seconds` it stops by itself.

    Returns:
        How many were deleted.
    """
    deadline = time.monotonic() + most_seconds
    deleted = 0
    for name in jobs:
        old = RunsFilter(job_name=name, statuses=_ENDED, created_before=before)
        while time.monotonic() < deadline:
            records = instance.get_run_records(old, limit=_RUNS_A_PIECE, ascending=True)
            for record in records:
                instance.delete_run(record.dagster_run.run_id)
            deleted += len(records)
            if not records:
                break
    return deleted


def forget_ticks(instance: DagsterInstance, run: DagsterRun, now: datetime) -> None:
    """Delete old ticks of the sensors of the run's own code location; an instance may be shared with others."""
    if run.remote_job_origin is None:
        return  # executed by hand, outside a code location
    location = run.remote_job_origin.repository_origin
    sensors = instance.all_instigator_state(location.get_id(), location.get_selector_id(), InstigatorType.SENSOR)
    for sensor in sensors:
        for status, days in _TICKS_KEPT_DAYS.items():
            before = (now - timedelta(days=days)).timestamp()
            instance.purge_ticks(sensor.instigator_origin_id, sensor.selector_id, before, [status])
