"""`sensor-pipeline up`: the whole stack on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from sensor_pipeline.embedded import check_installed
from sensor_pipeline.embedded.stack_file import DATA_DIR
from sensor_pipeline.errors import ConfigurationError, SensorPipelineError

if TYPE_CHECKING:
    from sensor_pipeline.batch import Pipeline
    from sensor_pipeline.embedded.screen import PlainScreen
    from sensor_pipeline.embedded.stack import Stack

LINE_SECONDS = 2.0
# While nothing changes: to ask what is shown is a tenth of what an idle stack costs, otherwise.
QUIET_LINE_SECONDS = 30.0
WATCH_SECONDS = 0.5


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP; like KeyboardInterrupt, nothing but `up` itself may take it for an error."""


class Interrupts:
    """Turns the first signal into `Interrupted`; any further one makes the stack stop faster."""

    def __init__(self, stack: Stack) -> None:
        self.received = False
        self._stack = stack
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # under nohup
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.received:
            self._stack.hurry()
            return
        self.received = True
        raise Interrupted


@click.command("up")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), default=DATA_DIR, show_default=True, help="Holds data and logs."
)
@click.option("--ui/--no-ui", default=True, help="Run Dagster's UI.")
@click.option(
    "--simulate/--no-simulate", default=None, help="Publish a simulated fleet. Default: only to an embedded Kafka."
)
@click.option(
    "--machines", type=click.IntRange(1, 100_000), default=20, show_default=True, help="Machines in the fleet."
)
@click.option(
    "--rate",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=200,
    show_default=True,
    help="Readings/s of the whole fleet.",
)
def command(data_dir: Path, ui: bool, simulate: bool | None, machines: int, rate: float) -> None:
    """Run Kafka, PostgreSQL, Dagster and a simulated fleet on this machine until Ctrl-C.

    Where KAFKA_BOOTSTRAP_SERVERS or POSTGRES_HOST is set, that server is used and none of that kind is started.
    """
    check_installed()
    from sensor_pipeline.embedded.screen import open_screen
    from sensor_pipeline.embedded.stack import Stack

    screen = open_screen()
    stack = Stack(data_dir, os.environ, screen, ui=ui)
    if simulate or (simulate is None and stack.embeds_kafka):
        stack.fleet = (machines, rate)
    interrupts = Interrupts(stack)
    try:
        with stack:
            stack.start()
            _greet(stack, screen)
            with screen.live():
                _watch(stack, screen, interrupts)
    except Interrupted:
        pass
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise ConfigurationError(
            f"cannot run on {data_dir} ({what}): make room or give the right to write, or name another --data-dir"
        ) from error
    screen.say(f"stopped; `sensor-pipeline up` goes on from here (data: {stack.data_dir})")


def _greet(stack: Stack, screen: PlainScreen) -> None:
    settings = stack.settings
    psql = f"psql -h {settings.postgres_host} -p {settings.postgres_port} -U {settings.postgres_user}"
    for name, value in (
        ("UI", stack.ui or "not started (--no-ui)"),
        ("Kafka", f"{settings.kafka_bootstrap_servers}, topic {', '.join(settings.kafka_topics)}"),
        ("PostgreSQL", f"{psql} {settings.postgres_db}"),
        ("Data, logs", str(stack.data_dir)),
    ):
        screen.say(f"  {name:<11} {value}")
    if settings.is_slow:
        screen.say(f"  Note: {settings.capacity_note()}")
    screen.say("  `sensor-pipeline env` prints this as variables, with the password. Ctrl-C stops everything.")


def _watch(stack: Stack, screen: PlainScreen, interrupts: Interrupts) -> None:
    """Keep the stack running and the line up to date until a signal comes."""
    from sensor_pipeline.batch import Pipeline

    supervisor = stack.supervisor()
    pipeline = Pipeline(stack.settings)
    totals: tuple[int, ...] = ()
    next_line, pause = 0.0, LINE_SECONDS
    while not interrupts.received:
        for note in supervisor.watch(time.monotonic()):
            screen.say(note)
        if time.monotonic() >= next_line:
            before = totals
            line, totals = _line(pipeline)
            screen.update(line)
            pause = min(2 * pause, QUIET_LINE_SECONDS) if totals == before else LINE_SECONDS
            next_line = time.monotonic() + pause
        time.sleep(WATCH_SECONDS)


def _line(pipeline: Pipeline) -> tuple[str, tuple[int, ...]]:
    """The state in one line, and its totals; none where they cannot be had."""
    from sensor_pipeline.backlog import read_backlog
    from sensor_pipeline.postgres.figures import read_figures

    settings, kafka, database = pipeline.settings, pipeline.kafka, pipeline.database
    try:
        lag = sum(read_backlog(settings, kafka, database, name).lag for name in settings.kafka_topics)
        with database.begin() as connection:
            now = read_figures(connection, last_batches=1)
    except SensorPipelineError as error:
        return str(error), ()
    commits: list[datetime] = [batch["committed_at"] for batch in now.last_batches]
    last = f"{(datetime.now(UTC) - max(commits)).total_seconds():.0f} s ago" if commits else "none yet"
    line = (
        f"readings {now.readings:,} · lag {lag:,} · machines {now.machines:,} · failures {now.failures:,} "
        f"({now.active_failures:,} active) · rejected {now.rejected:,} · last batch {last}"
    )
    return line, (now.readings, lag, now.machines, now.failures, now.active_failures, now.rejected)


def _leave_terminal() -> None:
    """The terminal is gone: what is still said has nowhere to go, and may not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
