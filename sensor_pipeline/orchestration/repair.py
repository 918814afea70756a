"""The jobs `replay_rejected` and `recompute_failures`: repairs, launched by hand from the Launchpad.

They work while batches are ingested: the database's locks keep them apart. So they have no lane, and wait in no queue.
A batch's run imports this module too, so what only the repairs need is imported when one runs.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dagster import (
    Field,
    JobDefinition,
    MetadataValue,
    Nothing,
    OpExecutionContext,
    Out,
    TableColumn,
    TableRecord,
    TableSchema,
    in_process_executor,
    job,
    op,
)

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.orchestration import tags
from sensor_pipeline.orchestration.explained import failures_explained
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.settings import Settings, parse_moment

if TYPE_CHECKING:
    from sensor_pipeline.postgres.recompute import Mended, Total
    from sensor_pipeline.postgres.verify import Machine
    from sensor_pipeline.replay import Outcome

REPLAY_JOB = "replay_rejected"
RECOMPUTE_JOB = "recompute_failures"

# A batch takes seconds, and dagster.yaml's max_runtime_seconds is made for that. These may take hours, and hold up
# nothing that would have to be freed.
_TAGS = {tags.MAX_RUNTIME: "86400"}
# A run's page is read by people, and its metadata is kept in Dagster's database.
_MOST_ROWS = 50
_MOST_CHARACTERS = 200
# Columns of tables, with their types.
_SAMPLE = {
    "reason": "string",
    "messages": "int",
    "topic": "string",
    "partition": "int",
    "offset": "int",
    "detail": "string",
}
_MENDED = {
    "machine": "string",
    "made": "int",
    "changed": "int",
    "removed": "int",
    "readings moved": "int",
    "what was wrong": "string",
}

_TIMES = {
    "since": Field(
        str, default_value="", description="ISO 8601, or a duration that lies back: 7 days. Empty: no limit."
    ),
    "until": Field(str, default_value="", description="The same, for the end."),
}
_REPLAY_CONFIG = {
    "reasons": Field([str], default_value=[], description="Only messages rejected for these reasons. Empty: for any."),
    "topics": Field([str], default_value=[], description="Only messages of these topics. Empty: of all."),
    **_TIMES,
    "dry_run": Field(bool, default_value=False, description="Write nothing: only say what would become of them."),
}
_RECOMPUTE_CONFIG = {
    "machines": Field([str], default_value=[], description="Only failures of these machines. Empty: of all."),
    **_TIMES,
}


def build_replay_job(settings: Settings) -> JobDefinition:
    """The job `replay_rejected` with these settings."""

    @op(config_schema=_REPLAY_CONFIG, out=Out(Nothing))
    def replay(context: OpExecutionContext) -> None:
        """Decode rejected messages again, and let those that are in order become readings.

        Since and until are of the time at which a message was rejected first.
        """
        from sensor_pipeline.postgres.rejected_search import Filter
        from sensor_pipeline.replay import Replay

        config: Mapping[str, Any] = context.op_config
        dry_run: bool = config["dry_run"]
        with failures_explained():
            wanted = Filter(config["reasons"], config["topics"], *_times(config))
            work = Replay(settings, wanted, dry_run=dry_run, dagster_run_id=context.run_id)
            context.log.info(f"{work.total:,} rejected messages to look at")
            outcome = work.run(lambda _: context.log.info(work.outcome.sentence(dry_run=dry_run)))
        context.add_output_metadata(_replayed(outcome, dry_run=dry_run))

    @job(name=REPLAY_JOB, tags=_TAGS, executor_def=in_process_executor, config=_prefilled("replay", _REPLAY_CONFIG))
    def replay_rejected() -> None:
        """Try rejected messages again by today's rules and settings, once what was wrong with them is mended.

        Without any config it tries all of them. What is bad again stays as it is, so that it is safe to run again.
        """
        replay()

    return replay_rejected


def build_recompute_job(settings: Settings) -> JobDefinition:
    """The job `recompute_failures` with these settings."""

    @op(config_schema=_RECOMPUTE_CONFIG, out=Out(Nothing))
    def recompute(context: OpExecutionContext) -> None:
        """Mend failures from the readings, machine by machine.

        Every failure that touches the time from since to until is recomputed whole.
        """
        from sensor_pipeline.postgres.recompute import Recompute

        config: Mapping[str, Any] = context.op_config
        mended: list[tuple[Machine, Mended]] = []
        with failures_explained():
            since, until = _times(config)
            work = Recompute(Database(settings), config["machines"], since, until, settings.alert_max_age)
            for machine, found in work.run():
                if found is not None and len(mended) < _MOST_ROWS:
                    mended.append((machine, found))
                    context.log.info(f"machine {machine.name}: {'; '.join(found.examples())}")
        context.log.info(work.total.sentence())
        context.add_output_metadata(_mended(work.total, mended))

    @job(
        name=RECOMPUTE_JOB,
        tags=_TAGS,
        executor_def=in_process_executor,
        config=_prefilled("recompute", _RECOMPUTE_CONFIG),
    )
    def recompute_failures() -> None:
        """Mend failures, and when machines were seen, from the readings.

        Without any config it looks at all machines and all time. Where nothing is wrong, nothing is locked or written.
        """
        recompute()

    return recompute_failures


def _prefilled(name: str, schema: Mapping[str, Field]) -> dict[str, Any]:
    """The config that the Launchpad shows to begin with: everything there is, at its default."""
    return {"ops": {name: {"config": {key: field.default_value for key, field in schema.items()}}}}


def _times(config: Mapping[str, Any]) -> list[datetime | None]:
    """`since` and `until`.

    Raises:
        ConfigurationError: one is no time.
    """
    now = datetime.now(UTC)
    times: list[datetime | None] = []
    for name in _TIMES:
        text = config[name].strip()
        try:
            times.append(parse_moment(text, now) if text else None)
        except ValueError as error:
            raise ConfigurationError(f"{name}: {error}") from None
    return times


def _replayed(outcome: "Outcome", *, dry_run: bool) -> Mapping[str, Any]:
    samples = [
        {
            "reason": reason,
            "messages": messages,
            "topic": sample.topic,
            "partition": sample.partition,
            "offset": sample.offset,
            "detail": sample.detail[:_MOST_CHARACTERS],
        }
        for reason, messages in outcome.bad_again.most_common()
        for sample in outcome.samples[reason]
    ]
    return {
        "outcome": outcome.sentence(dry_run=dry_run),
        "looked at": outcome.looked_at,
        "would become readings" if dry_run else "became readings": outcome.readings,
        "failures started": outcome.failures_started,
        "failures ended": outcome.failures_ended,
        "gone meanwhile": outcome.gone,
        "bad again": outcome.bad_again.total(),
        "bad again, with samples": _table(samples, _SAMPLE),
        "batches": MetadataValue.json(outcome.batches),
    }


def _mended(total: "Total", mended: Sequence[tuple["Machine", "Mended"]]) -> Mapping[str, Any]:
    rows = [
        {
            "machine": machine.name,
            "made": found.failures_made,
            "changed": found.failures_changed,
            "removed": found.failures_removed,
            "readings moved": found.readings_moved,
            "what was wrong": "; ".join(found.examples()),
        }
        for machine, found in mended
    ]
    return {
        "outcome": total.sentence(),
        "machines looked at": total.machines,
        "machines mended": total.machines_mended,
        "failures made": total.failures_made,
        "failures changed": total.failures_changed,
        "failures removed": total.failures_removed,
        "readings moved": total.readings_moved,
        "mended": _table(rows, _MENDED),
    }


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> MetadataValue:
    schema = TableSchema([TableColumn(name, kind) for name, kind in columns.items()])
    return MetadataValue.table([TableRecord(row) for row in rows[:_MOST_ROWS]], schema)
