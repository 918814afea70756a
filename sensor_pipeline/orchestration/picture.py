"""Once an hour, away from the batches' path: a picture of the failures, as an observation of their asset."""

import base64
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from dagster import (
    AssetObservation,
    DefaultScheduleStatus,
    JobDefinition,
    MetadataValue,
    OpExecutionContext,
    ScheduleDefinition,
    in_process_executor,
    job,
    op,
)

from sensor_pipeline.orchestration.assets import FAILURES, HEALTH
from sensor_pipeline.orchestration.explained import failures_explained
from sensor_pipeline.orchestration.unchanged import unless_seen
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.figures import failures_between
from sensor_pipeline.settings import Settings

JOB_NAME = "picture_failures"
# Among the events of failures a materialization for each batch comes on top of it, and the UI cannot leave those out;
# of health it is the newest event.
_OBSERVED = (FAILURES, HEALTH)
_SPANS = {"last day": pd.Timedelta(days=1), "last week": pd.Timedelta(days=7)}


def build_job(settings: Settings) -> JobDefinition:
    """The job with these settings."""
    database = Database(settings)

    @op
    def draw(context: OpExecutionContext) -> None:
        """Draw which machines failed when, over the last day and week."""
        # Of a batch's run this would be most of the time.
        from sensor_pipeline import timeline

        until = datetime.now(UTC)
        with failures_explained(), database.begin() as connection:
            database.check_schema(connection)
            failures = failures_between(connection, until - max(_SPANS.values()), until)
        png = base64.b64encode(timeline.draw(failures, until, _SPANS)).decode()
        metadata: dict[str, Any] = {
            "timeline": MetadataValue.md(f"![which machines failed when](data:image/png;base64,{png})"),
            "failures in the last week": len(failures),
            "active failures": int(failures["end"].isna().sum()),
        }
        for asset in _OBSERVED:
            context.log_event(AssetObservation(asset, description="which machines failed when", metadata=metadata))

    @job(name=JOB_NAME, executor_def=in_process_executor, description="Draws which machines failed when.")
    def picture_failures() -> None:
        draw()

    return picture_failures


def build_schedule(settings: Settings, job: JobDefinition) -> ScheduleDefinition:
    """Once an hour, on from the start; where nothing was ingested since, once a day."""
    return ScheduleDefinition(
        name="picture_failures_schedule",
        cron_schedule="5 * * * *",
        job=job,
        execution_fn=unless_seen(JOB_NAME, Database(settings)),
        default_status=DefaultScheduleStatus.RUNNING,
        description="Draws the failures of the last day and week: once an hour in which something was ingested.",
    )
