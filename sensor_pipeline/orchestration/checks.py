"""The checks of the data, on a schedule of their own: none is paid for by a batch. None reads every reading.

`sensor-pipeline verify` asks the same questions of the tables, and those that read every reading besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from dagster import (
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetSelection,
    DefaultScheduleStatus,
    ScheduleDefinition,
    define_asset_job,
    in_process_executor,
    multi_asset_check,
)

from sensor_pipeline.backlog import oldest_unread, read_backlog
from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.orchestration import tags
from sensor_pipeline.orchestration.assets import HEALTH
from sensor_pipeline.orchestration.unchanged import unless_seen
from sensor_pipeline.postgres import verify
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.figures import find_silent
from sensor_pipeline.settings import Settings

JOB_NAME = "check_data"
_EVERY_15_MINUTES = "*/15 * * * *"
_NAMED_MACHINES = 20
# All failures, rejected messages and the batch log are read, which may be of years: dagster.yaml's max_runtime_seconds
# is made for batches, and a run that is given up says nothing of the data. It holds up no batch; four schedules fit in.
_TAGS = {tags.MAX_RUNTIME: "3600"}

# Asked of the tables, by the check's name.
_OF_TABLES = {
    "conservation": verify.CONSERVATION,
    "ledger_totals": verify.LEDGER_TOTALS,
    "rejected_in_the_ledger": verify.REJECTED,
    "no_failures_overlap": verify.OVERLAPS,
}
_FRESH = "fresh"
_SILENT = "no_machine_silent"


def build_checks(settings: Settings) -> AssetChecksDefinition:
    """All checks, asked one after the other."""
    kafka, database = Kafka(settings), Database(settings)
    described = {
        **{name: "; ".join(check.title for check in questions) for name, questions in _OF_TABLES.items()},
        _FRESH: f"no record of a topic has waited longer than STALE_AFTER={settings.stale_after}",
        _SILENT: f"every machine has published within SILENT_AFTER={settings.silent_after}",
    }
    specs = [AssetCheckSpec(name, asset=HEALTH, description=said) for name, said in described.items()]

    @multi_asset_check(name=JOB_NAME + "_op", specs=specs)
    def check() -> Iterator[AssetCheckResult]:
        now = datetime.now(UTC)
        for name, questions in _OF_TABLES.items():
            yield _explained(name, partial(_of_tables, name, database, questions))
        yield _explained(_FRESH, partial(_fresh, settings, kafka, database, now))
        yield _explained(_SILENT, partial(_silent, settings, database, now))

    return check


def build_schedule(settings: Settings, checks: AssetChecksDefinition) -> ScheduleDefinition:
    """Every 15 minutes, on from the start; where nothing could be answered in another way, once a day."""
    kafka, database = Kafka(settings), Database(settings)

    def silent_machines() -> str | None:
        """Without a lag no record waits; that a machine falls silent is all that time may change."""
        if any(read_backlog(settings, kafka, database, name).lag for name in settings.kafka_topics):
            return None
        with database.begin() as connection:
            silent = find_silent(connection, datetime.now(UTC) - settings.silent_after, 1)
        return f"silent machines {silent.machines}"

    return ScheduleDefinition(
        name="check_data_schedule",
        cron_schedule=_EVERY_15_MINUTES,
        job=define_asset_job(
            JOB_NAME,
            AssetSelection.checks(checks),
            description="Asks of the tables and the topics whether all is as it must be.",
            executor_def=in_process_executor,
            tags=_TAGS,
        ),
        execution_fn=unless_seen(JOB_NAME, database, silent_machines),
        default_status=DefaultScheduleStatus.RUNNING,
        description="Runs the asset checks every 15 minutes in which something changed.",
    )


def _explained(name: str, ask: Callable[[], AssetCheckResult]) -> AssetCheckResult:
    """A server that does not answer fails the check with one line, and the others are still asked."""
    try:
        return ask()
    except SensorPipelineError as error:
        return _result(name, f"this could not be asked: {error}", {"error": type(error).__name__})


def _of_tables(name: str, database: Database, questions: Sequence[verify.Check]) -> AssetCheckResult:
    wrong, said = 0, []
    for question in questions:
        with database.begin() as connection:
            connection.execute(verify.SNAPSHOT)
            database.check_schema(connection)
            answer = verify.ask(connection, question)
        wrong += answer.wrong
        if answer.wrong:
            said.append(f"not so: {question.title}: {'; '.join(answer.examples)}. What to do: {question.remedy}")
    return _result(name, "\n".join(said), {"wrong": wrong})


def _fresh(settings: Settings, kafka: Kafka, database: Database, now: datetime) -> AssetCheckResult:
    said = []
    lag, longest = 0, 0.0
    for name in settings.kafka_topics:
        backlog = read_backlog(settings, kafka, database, name)
        oldest = min(oldest_unread(kafka, backlog).values(), default=None)
        age = (now - oldest).total_seconds() if oldest else 0.0
        lag, longest = lag + backlog.lag, max(longest, age)
        if age > settings.stale_after.total_seconds():
            said.append(
                f"topic {name}: lag {backlog.lag:,}, the oldest record has waited {age:,.0f} s, and STALE_AFTER is "
                f"{settings.stale_after}. What to do: see what the ticks of backlog_sensor wait for; if batches fail, "
                "their runs say why; if they cannot keep up, raise LANES, or BATCH_SIZE"
            )
    return _result(_FRESH, "\n".join(said), {"lag": lag, "oldest unread age in seconds": round(longest, 1)})


def _silent(settings: Settings, database: Database, now: datetime) -> AssetCheckResult:
    with database.begin() as connection:
        database.check_schema(connection)
        silent = find_silent(connection, now - settings.silent_after, _NAMED_MACHINES)
    named = ", ".join(f"{name} since {last:%Y-%m-%d %H:%M:%S} UTC" for name, last in silent.latest.items())
    more = ", …" if silent.machines > len(silent.latest) else ""
    said = (
        f"{silent.machines} machines have published nothing within SILENT_AFTER={settings.silent_after}: {named}"
        f"{more}. What to do: look at these machines and their way to Kafka; if they are meant to be silent for so "
        "long, raise SILENT_AFTER"
    )
    return _result(
        _SILENT, said if silent.machines else "", {"silent machines": silent.machines}, AssetCheckSeverity.WARN
    )


def _result(
    name: str,
    said: str,
    metadata: dict[str, float | str],
    severity: AssetCheckSeverity = AssetCheckSeverity.ERROR,
) -> AssetCheckResult:
    """Passed where there is nothing to say."""
    return AssetCheckResult(
        passed=not said,
        asset_key=HEALTH,
        check_name=name,
        description=said or "all is well",
        severity=severity,
        metadata=metadata,
    )
