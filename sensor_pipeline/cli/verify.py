"""`sensor-pipeline verify`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

import click
from rich.progress import Progress

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.cli.moment import Moment
from sensor_pipeline.cli.progress import progress
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.verify import CHECKS, EXAMPLES, SNAPSHOT, Machine, ask, find_machines, look
from sensor_pipeline.settings import Settings

Say = Callable[[str], None]

# A snapshot that is kept for long keeps the server from cleaning up.
_MACHINES_A_SNAPSHOT = 100


@click.command("verify")
@click.option("--machine", "names", multiple=True, help="Only this machine's failures; may be given several times.")
@click.option("--since", type=Moment(), help="Only failures that touch the time from then on: ISO 8601, or 7 days.")
def command(names: tuple[str, ...], since: datetime | None) -> None:
    """Check a live database: that everything adds up, and that failures are those that the readings make.

    Every reading is read, unless machines or a time are named; ingestion goes on meanwhile. Exits with 1 and the first
    differences when something is off.
    """
    database = Database(Settings.from_env(environment()))
    with database.begin() as connection:
        database.check_schema(connection)
        machines = find_machines(connection, names)
    with progress() as (bar, say):
        wrong = _check_tables(database, bar, say, all_readings=not names and since is None)
        wrong += _check_machines(database, bar, say, machines, since)
    sys.exit(1 if wrong else 0)


def _check_tables(database: Database, bar: Progress, say: Say, *, all_readings: bool) -> int:
    task = bar.add_task("", total=len(CHECKS))
    found = 0
    for check in CHECKS:
        bar.update(task, description=check.title)
        if check.reads_readings and not all_readings:
            say(f"left    {check.title}: it reads every reading, so not with --machine or --since")
        else:
            with database.begin() as connection:
                connection.execute(SNAPSHOT)
                answer = ask(connection, check)
            _report(say, check.title, answer.wrong, answer.examples, check.remedy)
            found += answer.wrong
        bar.advance(task)
    return found


def _check_machines(
    database: Database, bar: Progress, say: Say, machines: Sequence[Machine], since: datetime | None
) -> int:
    task = bar.add_task("failures by their readings", total=len(machines))
    said: list[str] = []
    names: list[str] = []
    for differences, machine in _differences(database, machines, since):
        said += [f"machine {machine.name}: {difference}" for difference in differences]
        names += [machine.name] if differences else []
        bar.advance(task)
    named = " ".join(f"--machine {name}" for name in names) if 0 < len(names) <= EXAMPLES else ""
    remedy = f"`sensor-pipeline recompute {named}".rstrip() + "` mends them from the readings"
    title = f"machines and failures are what the readings of {len(machines):,} machines make them"
    _report(say, title, len(said), said[:EXAMPLES], remedy)
    return len(said)


def _differences(
    database: Database, machines: Sequence[Machine], since: datetime | None
) -> Iterator[tuple[list[str], Machine]]:
    for at in range(0, len(machines), _MACHINES_A_SNAPSHOT):
        with database.begin() as connection:
            connection.execute(SNAPSHOT)
            for machine in machines[at : at + _MACHINES_A_SNAPSHOT]:
                differences, seen = look(connection, machine, since)
                yield [*([seen] if seen else []), *(difference.text for difference in differences)], machine


def _report(say: Say, title: str, wrong: int, examples: Sequence[str], remedy: str) -> None:
    if not wrong:
        say(f"ok      {title}")
        return
    say(f"wrong   {title}: {wrong:,} {'difference' if wrong == 1 else 'differences'}")
    for example in examples:
        say(f"          {example}")
    if wrong > len(examples):
        say(f"          … and {wrong - len(examples):,} more")
    say(f"        {remedy}")
