"""What `sensor-pipeline up` shows: steps with ticks, then one line that is kept up to date."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

# A tenth of a download, each time, where nothing can be drawn.
PLAIN_PARTS = 10
PLAIN_LINE_SECONDS = 10.0


class PlainScreen:
    """Plain lines, for a log file or a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._part = 0
        self._last_line = 0.0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A line when it is done."""
        started = time.monotonic()
        yield
        self.say(f"{_tick(self._console)} {title} ({time.monotonic() - started:.1f} s)")

    def progress(self, done: int, total: int) -> None:
        """A line each tenth."""
        part = done * PLAIN_PARTS // total
        if part > self._part:
            self._part = part
            self.say(f"  fetched {done / 1e6:.1f} of {total / 1e6:.1f} MB")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Entered while lines are kept up to date."""
        yield

    def update(self, line: str) -> None:
        """What the line says now; printed every 10 s."""
        if time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(line)


class TerminalScreen(PlainScreen):
    """A spinner, a progress bar and a line that changes in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._status: Status | None = None
        self._bar: Progress | None = None
        self._live: Live | None = None

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A spinner until it is done, then a line."""
        self._status = self._console.status(Text(title))
        try:
            with self._status, super().step(title):
                yield
        finally:
            self._status = None
            if self._bar:
                self._bar.stop()
                self._bar = None

    def progress(self, done: int, total: int) -> None:
        """A bar in the spinner's place."""
        if self._bar is None:
            if self._status:
                self._status.stop()
            columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("fetching", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Entered while the line is kept up to date, below all others."""
        with Live(console=self._console, refresh_per_second=4, transient=True) as self._live:
            yield

    def update(self, line: str) -> None:
        """What the line says now."""
        if self._live:
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))


def open_screen() -> PlainScreen:
    """The screen that standard output allows."""
    console = Console()
    return TerminalScreen(console) if console.is_terminal else PlainScreen(console)


def _tick(console: Console) -> str:
    return "✓" if console.encoding.lower().startswith("utf") else "+"
