"""Lines for standard output while a bar shows on the terminal how far a long command is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress() -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A bar, and what says a line. Where standard output is no terminal, the bar is on standard error if it is one."""
    output = Console()
    screen = output if output.is_terminal else Console(stderr=True)

    def say(line: str) -> None:
        output.print(line, markup=False, highlight=False, soft_wrap=True)

    with Progress(console=screen, transient=True, redirect_stdout=False, disable=not screen.is_terminal) as bar:
        yield bar, say
