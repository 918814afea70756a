"""`sensor-pipeline publish-csv`: publish labelled CSV files as readings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.errors import ConfigurationError, DataError, SensorPipelineError
from sensor_pipeline.labelled_csv import Layout, Table
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.publish import Publisher
from sensor_pipeline.rules import Rejection
from sensor_pipeline.settings import Settings

_SHOW_EVERY = 1_000  # readings


def _separator(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    separator = "\t" if value in ("tab", "\\t") else value
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise click.BadParameter("it must be one character, or tab.", ctx, param)
    return separator


@click.command("publish-csv")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--separator", callback=_separator, help="Default: , or ; or tab, whichever the header has.")
@click.option("--time-column", metavar="COLUMN", default="timestamp", show_default=True, help="ISO 8601 times.")
@click.option(
    "--failure-column", metavar="COLUMN", default="has_failure", show_default=True, help="1 or true while failing."
)
@click.option("--exclude", metavar="COLUMN", multiple=True, help="Leave this column out; may be repeated.")
@click.option("--machine-id", metavar="NAME", help="All files are of this machine.")
@click.option("--machine-id-column", metavar="COLUMN", help="This column names the machine.")
@click.option("--topic", help="Default: the first of KAFKA_TOPIC.")
def command(
    files: tuple[Path, ...],
    separator: str | None,
    time_column: str,
    failure_column: str,
    exclude: tuple[str, ...],
    machine_id: str | None,
    machine_id_column: str | None,
    topic: str | None,
) -> None:
    """Publish labelled CSV files: each line is a reading, each other column a sensor, each file a machine.

    A machine is called after its file, without the ending, unless an option says otherwise. Numbers are published
    exactly as written, empty cells as null, any other text as a string; blanks around a cell are left out. Times
    without an offset are published so. Readings go to the topic's partitions in turn.

    Every file is checked to its end, by the pipeline's own rules, before anything is published: where one is wrong,
    nothing is. If Kafka fails or the command is ended later, it says how many readings were published by then; they
    stay, and running the command again publishes them a second time.
    """
    if machine_id is not None and machine_id_column is not None:
        raise click.UsageError("--machine-id and --machine-id-column exclude each other.")
    settings = Settings.from_env(environment())
    layout = Layout(separator, time_column, failure_column, frozenset(exclude), machine_id, machine_id_column)
    console = Console(stderr=True, highlight=False)
    _check_names(files, layout)
    with _progress(console) as progress:
        found = _check(files, layout, settings, progress)
    for note in found.notes.values():
        click.echo(f"note: {note}", err=True)
    began = time.monotonic()
    publisher = Publisher(settings, topic or settings.kafka_topics[0])
    try:
        with publisher, _progress(console) as progress:
            _publish(files, layout, publisher, found.readings, progress)
    except (SensorPipelineError, KeyboardInterrupt):
        published = sum(publisher.published.values())
        click.echo(f"published before that: at least {published:,} of {found.readings:,} readings", err=True)
        raise
    click.echo(_report(len(files), found, publisher, time.monotonic() - began))


@dataclass
class _Found:
    """What the check saw in all files."""

    readings: int = 0
    failing: int = 0
    machines: set[str] = field(default_factory=set)
    separators: dict[str, str] = field(default_factory=dict)  # → the first file that has it
    notes: dict[str, str] = field(default_factory=dict)  # sensor → what a person should know


def _check_names(files: Sequence[Path], layout: Layout) -> None:
    if layout.machine_id is not None or layout.machine_id_column is not None:
        return
    names = Counter(path.stem for path in files)
    for path in files:
        if names[path.stem] > 1:
            raise ConfigurationError(
                f"{names[path.stem]} files are called {path.stem!r}, which names the machine; use --machine-id, "
                "--machine-id-column, or one command for each"
            )


def _check(files: Sequence[Path], layout: Layout, settings: Settings, progress: Progress) -> _Found:
    """Read all files to the end; raises where the pipeline would reject a line."""
    decoder = MessageDecoder(settings.max_future, settings.naive_timestamp_tz, settings.max_message_bytes)
    latest = datetime.now(UTC).replace(tzinfo=None) + settings.max_future
    found = _Found()
    task = progress.add_task("checking", total=None)
    for path in files:
        table = Table(path, layout)
        found.separators.setdefault(table.separator, str(path))
        for row in table.rows():
            result = decoder.decode_one(row.message)
            if isinstance(result, Rejection):
                raise DataError(f"{row.where}: not a reading ({result.reason}): {result.detail}")
            if result.timestamp > latest:
                raise DataError(f"{row.where}: its time is more than MAX_FUTURE ahead of now")
            found.readings += 1
            found.failing += row.has_failure
            found.machines.add(row.machine_id)
            for sensor, text in row.texts.items():
                note = f"{row.where}, column {sensor!r}: {text!r} is no number; such text is published as a string"
                found.notes.setdefault(sensor, note)
            if found.readings % _SHOW_EVERY == 0:
                progress.update(task, completed=found.readings)
    return found


def _publish(files: Sequence[Path], layout: Layout, publisher: Publisher, total: int, progress: Progress) -> None:
    task = progress.add_task("publishing", total=total)
    rows = chain.from_iterable(Table(path, layout).rows() for path in files)
    for number, row in enumerate(rows, 1):
        publisher.send(row.message)
        if number % _SHOW_EVERY == 0 or number == total:
            progress.update(task, completed=number)
    publisher.flush()


def _progress(console: Console) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _report(files: int, found: _Found, publisher: Publisher, seconds: float) -> str:
    partitions = ", ".join(f"{partition}: {readings:,}" for partition, readings in publisher.published.items())
    separators = ", ".join(f"{separator!r} (first in {path})" for separator, path in found.separators.items())
    return (
        f"published to topic {publisher.topic} in {seconds:,.1f} s: {found.readings:,} readings "
        f"({found.failing:,} failing), machines: {len(found.machines):,}, files: {files:,}\n"
        f"partitions: {partitions}\n"
        f"separator: {separators}"
    )
