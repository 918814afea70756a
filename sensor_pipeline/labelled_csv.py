"""Labelled CSV files as readings: each line one, each column that is not named for something else a sensor."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sensor_pipeline.errors import ConfigurationError, DataError

_SEPARATORS = ",;\t"
_LONGEST_LINE = 1_048_576  # bytes; a longer one is no table's
# A number as JSON writes it: published with exactly these digits.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_QUOTED = re.compile(r'"[^"]*"')


@dataclass(frozen=True)
class Layout:
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


class Row(NamedTuple):
    """One line, and the message that it becomes."""

    where: str  # file and line, for people
    machine_id: str
    has_failure: bool
    texts: dict[str, str]  # sensor → its text, where that is no number
    message: bytes


class Table:
    """One CSV file, read line by line.

    Raises:
        ConfigurationError: it cannot be read, or has other columns.
        DataError: naming file and line.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
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

    def rows(self) -> Iterator[Row]:
        """A row for each line, in the order of the file."""
        for cells in self._records():
            if len(cells) != len(self._header):
                raise DataError(f"{self._where}: {len(cells)} cells, but the header names {len(self._header)} columns")
            yield self._row([cell.strip() for cell in cells])

    def _row(self, cells: list[str]) -> Row:
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
        return Row(self._where, machine_id, has_failure, texts, message.encode())

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
