"""`sensor-pipeline bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.cli.progress import progress
from sensor_pipeline.collector import spare_collector
from sensor_pipeline.embedded import check_installed

if TYPE_CHECKING:
    from sensor_pipeline.bench.measured import Measured

_ROUNDS, _READINGS, _STEADY_SECONDS = 5, 1_000_000, 600
_QUICK_ROUNDS, _QUICK_READINGS = 3, 150_000


@click.command("bench")
@click.argument("figures", nargs=-1)
@click.option("--list", "list_them", is_flag=True, help="List the figures and what each measures.")
@click.option("--quick", is_flag=True, help="Throughput alone, on less work, against no limit: in under two minutes.")
@click.option("--rounds", type=click.IntRange(1), help=f"Counted rounds of each figure (default: {_ROUNDS}).")
@click.option("--readings", type=click.IntRange(10_000), help=f"Readings in a backlog (default: {_READINGS:,}).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="For the benchmark's data (default: a temporary one).",
)
def command(
    figures: tuple[str, ...],
    list_them: bool,
    quick: bool,
    rounds: int | None,
    readings: int | None,
    as_json: bool,
    folder: Path | None,
) -> None:
    """Measure the pipeline against references in the same run: all FIGURES of its speed, or those named.

    Starts servers of its own where the environment names none; where it does, works in databases and topics that it
    makes there and removes. Exits with 1 where a figure misses what it must reach.
    """
    check_installed()
    from sensor_pipeline.bench.figures import FIGURES, NAMED_ONLY, QUICK
    from sensor_pipeline.bench.rounds import Effort
    from sensor_pipeline.bench.site import Site

    if list_them:
        for name, figure in FIGURES.items():
            click.echo(f"{name:<14} {(figure.__doc__ or '').splitlines()[0]}")
        return
    if unknown := [name for name in figures if name not in FIGURES]:
        raise click.BadParameter(f"no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    spare_collector()
    names = figures or (QUICK if quick else tuple(name for name in FIGURES if name not in NAMED_ONLY))
    measured: list[Measured] = []
    with progress() as (bar, _), Site(environment(), folder) as site:
        task = bar.add_task("starting", total=len(names))
        effort = Effort(
            rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
            readings=readings or (_QUICK_READINGS if quick else _READINGS),
            steady_seconds=_STEADY_SECONDS,
            say=lambda what: bar.update(task, description=what),
        )
        for name in names:
            # What is asked holds for the whole work: on little of it, a process's start is much.
            measured += [replace(line, bound=None) if quick else line for line in FIGURES[name](site, effort)]
            bar.advance(task)
    click.echo(json.dumps([_as_json(line) for line in measured], indent=2)) if as_json else _print(measured)
    if any(line.reaches is False for line in measured):
        sys.exit(1)


def _as_json(line: Measured) -> dict[str, Any]:
    bound = line.bound
    return {
        "figure": line.title,
        "median": line.value,
        "values": list(line.values),
        "unit": line.unit,
        "measured": line.subject,
        "reference": line.reference,
        "microseconds_by_stage": dict(line.stages),
        "limit": bound and bound.limit,
        "aim": bound and bound.aim,
        "at_least": bound and bound.at_least,
        "reaches": line.reaches,
    }


def _print(measured: Sequence[Measured]) -> None:
    table = Table("figure", "median", "spread", "asked", "aim", box=None, pad_edge=False)
    for line in measured:
        bound = line.bound
        sign = "" if bound is None else (">= " if bound.at_least else "<= ")
        table.add_row(
            line.title,
            f"{_number(line.value)} {line.unit}{'' if line.reaches in (True, None) else ' (missed)'}",
            f"{_number(min(line.values))} to {_number(max(line.values))}",
            "" if bound is None else sign + _number(bound.limit),
            "" if bound is None else _number(bound.aim),
        )
    console = Console(width=max(100, Console().width))
    console.print(table)
    for line in measured:
        said = [line.subject, line.reference and f"against {line.reference}", _profile(line)]
        if any(said):
            console.print(f"{line.title}: {'; '.join(filter(None, said))}", markup=False, highlight=False)


def _profile(line: Measured) -> str:
    stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in sorted(line.stages.items()))
    return f"us a reading in {stages}" if stages else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"
