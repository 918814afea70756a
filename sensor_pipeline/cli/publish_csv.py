"""`sensor-pipeline publish-csv`: publish labelled CSV files as readings."""

from __future__ import annotations

import csv
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.errors import ConfigurationError, DataError, SensorPipelineError
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.publish import Publisher
from sensor_pipeline.rules import Rejection
from sensor_pipeline.settings import Settings

_SEPARATORS = ",;\t"
_LONGEST_LINE = 1_048_576  # bytes; a longer one is no table's
_SHOW_EVERY = 1_000  # readings
# A number as JSON writes it: published with exactly these digits.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")

_QUOTED = re.compile(r'"[^"]*"')


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
    layout = _Layout(separator, time_column, failure_column, frozenset(exclude), machine_id, machine_id_column)
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


@dataclass(frozen=True)
class _Layout:
    """What the columns of the files mean."""

    separator: str | None
    time: str
    failure: str
    exclude: frozenset[str]
    machine_id: str | None
    machine_id_column: str | None

    @property
    def special(self) -> dict[str, str]:
        """The columns that must be there and are no sensors, each with the option that names it."""
        special = dict.fromkeys(sorted(self.exclude), "--exclude")
        if self.machine_id_column is not None:
            special[self.machine_id_column] = "--machine-id-column"
        return special | {self.failure: "--failure-column", self.time: "--time-column"}


class _Row(NamedTuple):
    where: str  # file and line, for people
    machine_id: str
    has_failure: bool
    texts: dict[str, str]  # sensor → its text, where that is no number
    message: bytes


@dataclass
class _Found:
    """What the check saw in all files."""

    readings: int = 0
    failing: int = 0
    machines: set[str] = field(default_factory=set)
    separators: dict[str, str] = field(default_factory=dict)  # → the first file that has it
    notes: dict[str, str] = field(default_factory=dict)  # sensor → what a person should know


class _Table:
    """One CSV file, read line by line.

    Raises:
        ConfigurationError: it cannot be read, or has other columns.
        DataError: naming file and line.
    """

    def __init__(self, path: Path, layout: _Layout) -> None:
        self._path = path
        self._layout = layout
        lines = _lines(path)
        first = next(lines, "")
        if not first.strip():
            raise DataError(f"{path}, line 1 is empty: it has to name the columns")
        self.separator = layout.separator or max(_SEPARATORS, key=_QUOTED.sub("", first).count)
        # strict: a stray quote is an error and not the start of a cell that never ends.
        self._reader = csv.reader(chain([first], lines), delimiter=self.separator, strict=True)
        self._header = [name.strip() for name in next(self._records())]
        self._check_header()
        at = self._header.index
        self._time, self._failure = at(layout.time), at(layout.failure)
        self._machine = None if layout.machine_id_column is None else at(layout.machine_id_column)
        sensors = [(place, name) for place, name in enumerate(self._header) if name not in layout.special]
        self._sensors = [(place, name, json.dumps(name, ensure_ascii=False)) for place, name in sensors]

    def rows(self) -> Iterator[_Row]:
        """A row for each line, in the order of the file."""
        for cells in self._records():
            if len(cells) != len(self._header):
                raise DataError(f"{self._where}: {len(cells)} cells, but the header names {len(self._header)} columns")
            yield self._row([cell.strip() for cell in cells])

    def _row(self, cells: list[str]) -> _Row:
        machine_id = self._layout.machine_id if self._machine is None else cells[self._machine]
        machine_id = self._path.stem if machine_id is None else machine_id
        moment = self._moment(cells[self._time])
        has_failure = self._flag(cells[self._failure])
        texts = {}
        values = []
        for place, name, quoted in self._sensors:
            cell = cells[place]
            if _NUMBER.fullmatch(cell):
                values.append(f"{quoted}: {cell}")
            elif not cell:
                values.append(f"{quoted}: null")
            else:
                values.append(f"{quoted}: {json.dumps(cell, ensure_ascii=False)}")
                texts[name] = cell
        message = (
            f'{{"machine_id": {json.dumps(machine_id, ensure_ascii=False)}, "timestamp": {json.dumps(moment)}, '
            f'"readings": {{"readings": {{{", ".join(values)}}}, "has_failure": {json.dumps(has_failure)}}}}}'
        )
        return _Row(self._where, machine_id, has_failure, texts, message.encode())

    @property
    def _where(self) -> str:
        return f"{self._path}, line {self._reader.line_num}"

    def _records(self) -> Iterator[list[str]]:
        try:
            # A blank line is no record.
            yield from filter(None, self._reader)
        except csv.Error as error:
            raise DataError(f"{self._where}: {error}; correct the line, or --separator") from error

    def _check_header(self) -> None:
        there = f"it has {', '.join(map(repr, self._header))} (separator {self.separator!r})"
        special = self._layout.special.items()
        missing = [f"{name!r} ({option})" for name, option in special if name not in self._header]
        if missing:
            raise ConfigurationError(f"{self._path} has no column {', '.join(missing)}: {there}")
        twice = [repr(name) for name, number in Counter(self._header).items() if number > 1]
        if twice:
            raise DataError(f"{self._path}, line 1: more than one column {', '.join(twice)}: {there}")
        if "" in self._header and "" not in self._layout.special:
            raise DataError(f"{self._path}, line 1: a column has no name; name it, or leave it out with --exclude ''")

    def _moment(self, text: str) -> str:
        """As written, but for the blank that ISO 8601 has a T for."""
        try:
            datetime.fromisoformat(text.upper())
            return text.replace(" ", "T", 1)
        except ValueError:
            raise DataError(
                f"{self._where}, column {self._layout.time!r}: {text!r} is not an ISO 8601 time, such as "
                "2026-01-01 12:00:00"
            ) from None

    def _flag(self, text: str) -> bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if _NUMBER.fullmatch(text) and float(text) in (0, 1):
            return float(text) == 1
        raise DataError(
            f"{self._where}, column {self._layout.failure!r}: {text!r} is neither 1 or true (failing) nor 0 or false"
        )


def _lines(path: Path) -> Iterator[str]:
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is not a file (files are read twice: to check and to publish)")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                if len(line) > _LONGEST_LINE:
                    raise DataError(f"{path}, line {number}: longer than {_LONGEST_LINE:,} bytes; is this a CSV file?")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8"
                    ) from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _check_names(files: Sequence[Path], layout: _Layout) -> None:
    if layout.machine_id is not None or layout.machine_id_column is not None:
        return
    names = Counter(path.stem for path in files)
    for path in files:
        if names[path.stem] > 1:
            raise ConfigurationError(
                f"{names[path.stem]} files are called {path.stem!r}, which names the machine; use --machine-id, "
                "--machine-id-column, or one command for each"
            )


def _check(files: Sequence[Path], layout: _Layout, settings: Settings, progress: Progress) -> _Found:
    """Read all files to the end; raises where the pipeline would reject a line."""
    decoder = MessageDecoder(settings.max_future, settings.naive_timestamp_tz, settings.max_message_bytes)
    latest = datetime.now(UTC).replace(tzinfo=None) + settings.max_future
    found = _Found()
    task = progress.add_task("checking", total=None)
    for path in files:
        table = _Table(path, layout)
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


def _publish(files: Sequence[Path], layout: _Layout, publisher: Publisher, total: int, progress: Progress) -> None:
    task = progress.add_task("publishing", total=total)
    rows = chain.from_iterable(_Table(path, layout).rows() for path in files)
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
