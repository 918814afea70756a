"""No run for nothing: a schedule launches its job where there is something that the job has not seen yet."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from dagster import DagsterRunStatus, RunRequest, RunsFilter, ScheduleEvaluationContext, SkipReason

from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.orchestration import tags
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.figures import read_ingested

# What time and people's hands change without anything being ingested is seen within a day.
_SEEN_WITHIN = timedelta(days=1)


def unless_seen(
    job_name: str, database: Database, more: Callable[[], str | None] = lambda: ""
) -> Callable[[ScheduleEvaluationContext], RunRequest | SkipReason]:
    """What a schedule is to call: whether its job is launched, which is told what there is to see by a tag.

    Args:
        job_name: the schedule's job.
        more: what the job looks at besides the rows that were ingested; None where it must look in any case.
    """

    def evaluate(context: ScheduleEvaluationContext) -> RunRequest | SkipReason:
        try:
            with database.begin() as connection:
                database.check_schema(connection)
                ingested = read_ingested(connection)
            also = more()
        except SensorPipelineError as error:
            # The run meets the same, and says so where people look.
            context.log.warning(str(error))
            return RunRequest()
        if also is None:
            return RunRequest()
        if not ingested.messages:
            return SkipReason("nothing was ever ingested")
        there = ", ".join(filter(None, [str(ingested), also]))
        seen = RunsFilter(
            job_name=job_name,
            statuses=[DagsterRunStatus.SUCCESS],
            tags={tags.SEEN: there},
            created_after=datetime.now(UTC) - _SEEN_WITHIN,
        )
        if runs := context.instance.get_runs(seen, limit=1):
            return SkipReason(f"run {runs[0].run_id[:8]} has seen all that there is: {there}")
        return RunRequest(tags={tags.SEEN: there})

    return evaluate
