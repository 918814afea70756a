"""`sensor-pipeline status`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from sensor_pipeline.backlog import TopicBacklog, read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli.environment import environment
from sensor_pipeline.offsets import contiguous_prefix
from sensor_pipeline.postgres.figures import Figures, read_figures
from sensor_pipeline.settings import Settings

LAST_BATCHES = 5


@dataclass(frozen=True)
class Snapshot:
    """The state of the pipeline; `lag` is the number of offsets that are not ingested, over all topics."""

    readings: int
    machines: int
    failures: int
    active_failures: int
    rejected: int
    lag: int
    rejected_by_reason: dict[str, int]
    partitions: list[dict[str, Any]]
    last_batches: list[dict[str, Any]]


def snapshot(settings: Settings) -> Snapshot:
    """Ask Kafka and PostgreSQL.

    Raises:
        SensorPipelineError: one of them does not answer, or is not set up.
    """
    pipeline = Pipeline(settings)
    backlogs = [read_backlog(settings, pipeline.kafka, pipeline.database, name) for name in settings.kafka_topics]
    partitions = [row for backlog in backlogs for row in _partitions(pipeline, backlog)]
    with pipeline.database.begin() as connection:
        figures: Figures = read_figures(connection, LAST_BATCHES)
    return Snapshot(**vars(figures), lag=sum(backlog.lag for backlog in backlogs), partitions=partitions)


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, stable for scripts.")
def command(as_json: bool) -> None:
    """Show lag for each partition, the last batches, failures and rejected messages."""
    state = snapshot(Settings.from_env(environment()))
    if as_json:
        click.echo(json.dumps(vars(state), default=_json))
    else:
        _show(state, Console())


def _partitions(pipeline: Pipeline, backlog: TopicBacklog) -> list[dict[str, Any]]:
    committed = pipeline.kafka.committed_offsets(backlog.topic)
    return [
        {
            "topic": backlog.topic.name,
            "partition": p.partition,
            "first_offset": p.first,
            "end_offset": p.end,
            "ingested_to": contiguous_prefix(p.ingested),
            "committed_offset": committed.get(p.partition),
            "lag": p.lag,
            "gap": sum(map(len, p.gap)),
            "cut_off": p.cut_off,
        }
        for p in backlog.partitions
    ]


def _show(state: Snapshot, console: Console) -> None:
    console.print(
        f"[bold]{state.readings:,}[/] readings of [bold]{state.machines:,}[/] machines · "
        f"[bold]{state.failures:,}[/] failures, [bold]{state.active_failures:,}[/] active · "
        f"lag [bold]{state.lag:,}[/] · [bold]{state.rejected:,}[/] rejected"
    )
    table = Table("topic", "partition", "in Kafka", "ingested to", "group at", "lag", "gap", box=None)
    for row in state.partitions:
        table.add_row(
            row["topic"],
            str(row["partition"]),
            f"{row['first_offset']:,}-{row['end_offset']:,}",
            f"{row['ingested_to']:,}",
            "none" if row["committed_offset"] is None else f"{row['committed_offset']:,}",
            f"{row['lag']:,}",
            f"[red]{row['gap']:,}, see accept-gap[/]" if row["gap"] else "0",
        )
    console.print(table)
    for row in state.partitions:
        if row["cut_off"]:
            console.print(f"[red]topic {row['topic']} {row['cut_off']}[/]")
    batches = Table("batch", "kind", "committed", "inserted", "already", "rejected", "failures", "seconds", box=None)
    for row in state.last_batches:
        seconds = (row["committed_at"] - row["started_at"]).total_seconds()
        batches.add_row(
            str(row["id"]),
            row["kind"],
            f"{row['committed_at']:%m-%d %H:%M:%S}",
            f"{row['inserted']:,}",
            f"{row['already_ingested']:,}",
            f"{row['rejected']:,}",
            f"+{row['failures_started']} -{row['failures_ended']}",
            f"{seconds:.1f}",
        )
    console.print(batches if state.last_batches else "no batch yet")
    for reason, count in state.rejected_by_reason.items():
        console.print(f"rejected as {reason}: {count:,}")


def _json(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
