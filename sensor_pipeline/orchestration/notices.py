"""The sensors that tell people: one writes what became of runs and topics to the outbox, one delivers what is in it.

Neither launches anything, and both run in the code server, away from the batches.
"""

import math
import time
from datetime import UTC, datetime, timedelta
from logging import ERROR, INFO

from dagster import (
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DefaultSensorStatus,
    EventLogEntry,
    EventLogRecord,
    JobDefinition,
    RunStatusChangeRecordsFilter,
    SensorDefinition,
    SensorEvaluationContext,
    SkipReason,
    sensor,
)

from sensor_pipeline.delivery import Delivery
from sensor_pipeline.errors import SensorPipelineError, UnavailableError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.notices import RunNotice, batch_failed
from sensor_pipeline.orchestration import config, tags
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.notices import add_run_notice
from sensor_pipeline.settings import Settings
from sensor_pipeline.watch import look
from sensor_pipeline.webhook import Webhook

# A tick has 60 s, and one attempt may still be under way when these are over.
DELIVERY_SECONDS = 20.0
_DELIVERY_INTERVAL_SECONDS = 15
# Once nothing is left that is too old, it is looked for again after so long.
_DELETE_SECONDS = 3600.0
_RUN_INTERVAL_SECONDS = 60
_KAFKA_SECONDS = 5
# More failed runs than these are told by the next ticks.
_RUNS_AT_ONCE = 50


def build_notice_sensor(settings: Settings) -> SensorDefinition:
    """`notice_sensor` with these settings: delivers what is in the outbox; on from the start."""
    database = Database(settings, kept=1)
    webhook = Webhook(settings.alert_webhook_url) if settings.alert_webhook_url else None
    next_delete = -math.inf

    @sensor(
        name="notice_sensor",
        minimum_interval_seconds=_DELIVERY_INTERVAL_SECONDS,
        default_status=DefaultSensorStatus.RUNNING,
        description="Delivers notices from the outbox to ALERT_WEBHOOK_URL and to the log. Launches nothing.",
    )
    def notice_sensor(context: SensorEvaluationContext) -> SkipReason:
        nonlocal next_delete
        delivery = Delivery(database, webhook, context.log.log)
        delivered = delivery.run(DELIVERY_SECONDS)
        if time.monotonic() >= next_delete and not delivery.delete_old(timedelta(days=settings.notices_kept_days)):
            next_delete = time.monotonic() + _DELETE_SECONDS
        return SkipReason(str(delivered))

    return notice_sensor


def build_run_notice_sensor(settings: Settings, job: JobDefinition) -> SensorDefinition:
    """`run_notice_sensor` with these settings: writes to the outbox; on from the start.

    It has a cursor of its own over the failed runs. Dagster's own run status sensors move theirs on when they fail, so
    that what PostgreSQL could not take at that moment would be lost; this one's stays, and the next tick tries again.
    """
    database = Database(settings, kept=1)
    kafka = Kafka(settings, timeout=_KAFKA_SECONDS)

    @sensor(
        name="run_notice_sensor",
        minimum_interval_seconds=_RUN_INTERVAL_SECONDS,
        default_status=DefaultSensorStatus.RUNNING,
        description="Writes notices of failed runs, gaps, falling behind and rejected messages. Launches nothing.",
    )
    def run_notice_sensor(context: SensorEvaluationContext) -> SkipReason:
        failed = _failed_runs(context.instance, context.cursor, settings.alert_max_age)
        found = [notice for record in failed if (notice := _notice(context.instance, record, job.name))]
        told = _add(settings, database, found)
        if failed:
            context.update_cursor(str(failed[-1].storage_id))
        said = [f"failed runs: {len(found)}"] if found else []
        for name in settings.kafka_topics:
            try:
                told += _add(settings, database, look(settings, kafka, database, name))
            except SensorPipelineError as error:
                # The runs are told, and so are the other topics, unless a server is down that they would wait for too.
                said.append(str(error))
                context.log.log(ERROR, str(error))
                if isinstance(error, UnavailableError):
                    break
        said.append(f"notices written: {told}" if told else "nothing new to tell")
        context.log.log(INFO, "; ".join(said))
        return SkipReason("; ".join(said))

    return run_notice_sensor


def _failed_runs(instance: DagsterInstance, cursor: str | None, max_age: timedelta) -> list[EventLogRecord]:
    """What says that runs failed, after the cursor; at the first time, of as long ago as people are told of."""
    since = (datetime.now(UTC) - max_age).timestamp() if cursor is None else None
    wanted = RunStatusChangeRecordsFilter(
        event_type=DagsterEventType.RUN_FAILURE,
        after_storage_id=None if cursor is None else int(cursor),
        after_timestamp=since,
    )
    return list(instance.fetch_run_status_changes(wanted, limit=_RUNS_AT_ONCE, ascending=True).records)


def _notice(instance: DagsterInstance, record: EventLogRecord, job_name: str) -> RunNotice | None:
    run = instance.get_run_by_id(record.run_id)
    # One that was deleted since, or somebody else's.
    if run is None or run.job_name != job_name:
        return None
    error, said = _what_failed(instance, run, record.event_log_entry)
    at = datetime.fromtimestamp(record.timestamp, UTC)
    return batch_failed(job_name, run.run_id, config.of_run(run.run_config), run.tags.get(tags.LANE), error, said, at)


def _what_failed(instance: DagsterInstance, run: DagsterRun, ended: EventLogEntry) -> tuple[str, str]:
    """The class of a run's error and its one line: ours, or where it is none of ours, no more than its name."""
    for entry in instance.all_logs(run.run_id, of_type=DagsterEventType.STEP_FAILURE):
        data = entry.dagster_event.step_failure_data if entry.dagster_event else None
        if data is None:
            continue
        if data.user_failure_data is not None:
            kind = data.user_failure_data.metadata.get("error")
            return str(kind.value if kind else ""), data.user_failure_data.description or ""
        if data.error is not None:
            # Dagster's own error stands before it. Its words may hold a message's values.
            name = (data.error.cause or data.error).cls_name or "error"
            return name, f"{name}, which the run's page shows"
    event = ended.dagster_event
    return "", (event.message if event and event.message else "the run's page says why").splitlines()[0]


def _add(settings: Settings, database: Database, found: list[RunNotice]) -> int:
    """Write notices in one transaction; returns how many are new."""
    if not found:
        return 0
    with database.begin() as connection:
        database.check_schema(connection)
        return sum(
            add_run_notice(connection, notice, settings.alert_max_age, settings.alert_repeat) for notice in found
        )
