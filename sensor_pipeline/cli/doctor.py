"""`sensor-pipeline doctor`: every connection and right that the pipeline needs, each with its remedy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import sqlalchemy as sa
from rich.console import Console

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli.environment import environment
from sensor_pipeline.errors import ConfigurationError, SensorPipelineError
from sensor_pipeline.postgres.database import SCHEMA_VERSION
from sensor_pipeline.postgres.rights import WRITER, missing_rights
from sensor_pipeline.settings import Settings

MAX_CLOCK_SKEW = timedelta(seconds=30)
MIN_POSTGRES = 140_000

Check = tuple[str, Callable[[], str]]


@click.command("doctor")
def command() -> None:
    """Check every connection and right that the pipeline needs, and say how to mend what is wrong."""
    console = Console(soft_wrap=True, highlight=False)
    env = environment()
    settings = Settings.from_env(env)
    healthy = True
    for name, check in _checks(settings, env):
        try:
            console.print(f"[green]ok[/]    {name}: {check()}")
        except SensorPipelineError as error:
            healthy = False
            console.print(f"[red]wrong[/] {name}: ", end="")
            console.print(str(error), markup=False)
    sys.exit(0 if healthy else 1)


def _checks(settings: Settings, env: Mapping[str, str]) -> Iterator[Check]:
    pipeline = Pipeline(settings)
    for name in settings.kafka_topics:
        yield f"topic {name}", lambda name=name: _topic(pipeline, name)  # type: ignore[misc]
        yield f"group {settings.kafka_group_id}", lambda name=name: _group(pipeline, name)  # type: ignore[misc]
    yield "PostgreSQL", lambda: _server(pipeline)
    yield "schema", lambda: _schema(pipeline)
    yield "rights", lambda: _rights(pipeline)
    yield "clock", lambda: _clock(pipeline)
    for name in settings.kafka_topics:
        yield f"backlog of {name}", lambda name=name: _backlog(pipeline, name)  # type: ignore[misc]
    yield "capacity", lambda: _capacity(settings)
    yield "Dagster", lambda: _dagster(env)


def _topic(pipeline: Pipeline, name: str) -> str:
    topic = pipeline.kafka.topic(name)
    return (
        f"at {pipeline.settings.kafka_bootstrap_servers}, {len(topic.partitions)} partitions, id {topic.kafka_topic_id}"
    )


def _group(pipeline: Pipeline, name: str) -> str:
    committed = pipeline.kafka.committed_offsets(pipeline.kafka.topic(name))
    return f"readable, committed for {len(committed)} partitions of {name}"


def _server(pipeline: Pipeline) -> str:
    with pipeline.database.begin() as connection:
        version = int(connection.scalars(sa.text("SHOW server_version_num")).one())
        pipeline.database.check_encoding(connection)
        read_only = connection.scalars(sa.text("SELECT pg_is_in_recovery()")).one()
    if version < MIN_POSTGRES:
        raise ConfigurationError(f"PostgreSQL {version // 10000} at {pipeline.database.name} is too old; 14 is needed")
    if read_only:
        raise ConfigurationError(f"{pipeline.database.name} is a standby; set POSTGRES_HOST to the primary")
    return f"version {version // 10000}.{version % 10000} at {pipeline.database.name}"


def _schema(pipeline: Pipeline) -> str:
    with pipeline.database.begin() as connection:
        pipeline.database.check_schema(connection)
    return f"version {SCHEMA_VERSION}"


def _rights(pipeline: Pipeline) -> str:
    user = pipeline.settings.postgres_user
    try:
        with pipeline.database.begin() as connection:
            missing = missing_rights(connection, WRITER, user)
    except ConfigurationError:
        # What an older schema does not have yet would be said to be all of the tables.
        _schema(pipeline)
        raise
    if missing:
        raise ConfigurationError(
            f"{user} lacks {', '.join(missing)}; have the owner of the tables grant it: sensor-pipeline migrate "
            f"--writer {user}"
        )
    return f"{user} has all that are needed"


def _clock(pipeline: Pipeline) -> str:
    with pipeline.database.begin() as connection:
        skew = datetime.now(UTC) - connection.scalars(sa.text("SELECT clock_timestamp()")).one()
    if abs(skew) > MAX_CLOCK_SKEW:
        raise ConfigurationError(
            f"this machine's clock is {skew.total_seconds():+.0f} s off PostgreSQL's; set both by NTP"
        )
    return f"within {abs(skew).total_seconds():.1f} s of PostgreSQL's"


def _backlog(pipeline: Pipeline, name: str) -> str:
    backlog = read_backlog(pipeline.settings, pipeline.kafka, pipeline.database, name)
    cut_off = [said for p in backlog.partitions if (said := p.cut_off)]
    if cut_off:
        raise ConfigurationError("; ".join(cut_off))
    gaps = [f"partition {span.partition} [{span.start}, {span.end})" for p in backlog.partitions for span in p.gap]
    if gaps:
        raise ConfigurationError(
            f"Kafka lost offsets that were never ingested: {', '.join(gaps)}; accept the loss with "
            f"sensor-pipeline accept-gap --topic {name} --partition PARTITION --reason TEXT"
        )
    return f"lag {backlog.lag:,}, no gap"


def _capacity(settings: Settings) -> str:
    if settings.is_slow:
        raise ConfigurationError(f"{settings.capacity_note()}; raise BATCH_SIZE (250000 is the default)")
    return settings.capacity_note()


def _dagster(env: Mapping[str, str]) -> str:
    home = env.get("DAGSTER_HOME", "")
    if not home:
        return "DAGSTER_HOME is not set; `dagster dev` then keeps its runs in a temporary folder"
    if not (Path(home) / "dagster.yaml").exists():
        raise ConfigurationError(
            f"DAGSTER_HOME={home} has no dagster.yaml; copy the package's orchestration/dagster.yaml"
        )
    from dagster import DagsterInstance

    from sensor_pipeline.orchestration.instance import find_wrong

    # Dagster's instance looks there. A file's secret is in `env` already, and its file would be a second one.
    os.environ.clear()
    os.environ.update(env)
    try:
        with DagsterInstance.get() as instance:
            runs = instance.get_runs_count()
            wrong = list(find_wrong(instance))
    except Exception as error:
        raise ConfigurationError(f"the instance in {home} does not open: {str(error).splitlines()[0]}") from error
    if wrong:
        raise ConfigurationError(f"instance in {home}: {'; '.join(wrong)}")
    return (
        f"instance in {home}, {runs:,} runs; its queue, lane limits, monitoring, storage and daemon are as they must be"
    )
