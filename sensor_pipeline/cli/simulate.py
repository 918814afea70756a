"""`sensor-pipeline simulate`: publish a simulated fleet."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.status import Status

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.fleet import MAX_FAILURE_RATE, Fleet, FleetReading
from sensor_pipeline.publish import Pace, Publisher
from sensor_pipeline.settings import Settings

_MOST_AT_ONCE = 5_000  # readings between two looks at the clock and at the signals
_LONGEST_WAIT_SECONDS = 0.2
_LINE_SECONDS = 0.5
# Nothing delivered for this long is worth a word.
_AWAY_SECONDS = 5.0
# How long the last readings may take: after a signal, and otherwise without any progress.
_STOP_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0
# Event time goes on at about the pace at which readings can be made, where --rate sets none.
_UNPACED_EVENT_RATE = 100_000.0


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """FloatRange takes nan."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number.", ctx, param)
    return value


def _moment(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not an ISO 8601 time, such as 2026-01-01T12:00:00.", ctx, param
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@click.command("simulate")
@click.option("--topic", help="Default: the first of KAFKA_TOPIC.")
@click.option("--machines", type=click.IntRange(1, 100_000), default=20, show_default=True, help="In the fleet.")
@click.option("--sensors", type=click.IntRange(0, 1_000), default=20, show_default=True, help="Of each machine.")
@click.option(
    "--rate",
    type=click.FloatRange(0, 1e6),
    callback=_finite,
    default=200,
    show_default=True,
    help="Readings/s over the whole fleet; 0: as fast as possible.",
)
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    callback=_finite,
    help="Seconds. Default: until SIGINT or SIGTERM.",
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many readings.")
@click.option(
    "--failure-rate",
    type=click.FloatRange(0, MAX_FAILURE_RATE),
    callback=_finite,
    default=0.02,
    show_default=True,
    help="Share of readings that are failing, on average.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Makes the machines and what happens to them: the same seed, the same fleet.",
)
@click.option(
    "--start",
    callback=_moment,
    metavar="TIMESTAMP",
    help="Event time of the first reading (without an offset: UTC). Default: now.",
)
@click.option(
    "--event-rate",
    type=click.FloatRange(0, min_open=True),
    callback=_finite,
    help=f"Readings/s of event time, to write history. Default: --rate; {_UNPACED_EVENT_RATE:,.0f} with --rate 0.",
)
@click.option("--keyed", is_flag=True, help="Key = machine id. Default: no key, and the partitions in turn.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    topic: str | None,
    machines: int,
    sensors: int,
    rate: float,
    duration: float | None,
    count: int | None,
    failure_rate: float,
    seed: int,
    start: datetime | None,
    event_rate: float | None,
    keyed: bool,
    as_json: bool,
) -> None:
    """Publish the readings of a simulated fleet, whose machines fail now and then.

    Runs until --count, --duration or a signal, delivers what is under way and reports what it published. While
    Kafka is away, readings wait (as many as fit the producer's queue) and are published when it is back.
    """
    settings = Settings.from_env(environment())
    with Publisher(settings, topic or settings.kafka_topics[0], patience=_PATIENCE_SECONDS) as publisher:
        fleet = Fleet(
            machines=machines,
            sensors=sensors,
            failure_rate=failure_rate,
            seed=seed,
            start=start or datetime.now(UTC),
            rate=event_rate or rate or _UNPACED_EVENT_RATE,
        )
        with _Screen(settings.kafka_bootstrap_servers) as screen:
            simulation = _Simulation(publisher, fleet.readings(), Pace(rate, count, duration), screen, keyed=keyed)
            simulation.run()
            report = simulation.report() | {"machines": machines, "seed": seed}
    click.echo(json.dumps(report) if as_json else _text(report))


class _Simulation:
    """Publishes at a pace and keeps count."""

    def __init__(
        self, publisher: Publisher, readings: Iterator[FleetReading], pace: Pace, screen: _Screen, *, keyed: bool
    ) -> None:
        self._publisher = publisher
        self._readings = readings
        self._pace = pace
        self._screen = screen
        self._keyed = keyed
        self._began = time.monotonic()
        self._sent = 0
        self._failing = 0
        self._failures = 0

    def run(self) -> None:
        with _heeding_signals() as signals:
            while True:
                self._send_due(signals)
                self._look()
                if self._is_over(signals):
                    break
                time.sleep(self._pace.pause(self._elapsed(), self._sent))
            while self._publisher.stalled_seconds < _PATIENCE_SECONDS and self._publisher.pending:
                if signals.received:
                    break
                self._look(_LONGEST_WAIT_SECONDS)
            self._publisher.flush(within=_STOP_SECONDS)

    def report(self) -> dict[str, Any]:
        seconds = self._elapsed()
        return {
            "topic": self._publisher.topic,
            "readings": self._sent,
            "failing_readings": self._failing,
            "failures_started": self._failures,
            "partitions": self._publisher.published,
            "seconds": round(seconds, 3),
            "rate": round(self._sent / seconds, 1),
        }

    def _send_due(self, signals: _Signals) -> None:
        due = min(self._pace.due(self._elapsed()) - self._sent, _MOST_AT_ONCE)
        for reading in islice(self._readings, int(due)):
            key = reading.machine_id if self._keyed else None
            while not self._publisher.offer(reading.message, key):
                self._look(_LONGEST_WAIT_SECONDS)
                if self._is_over(signals):
                    return
            self._sent += 1
            self._failing += reading.has_failure
            self._failures += reading.starts_failure

    def _is_over(self, signals: _Signals) -> bool:
        return signals.received or self._pace.is_over(self._elapsed(), self._sent)

    def _look(self, seconds: float = 0.0) -> None:
        """Take in what was delivered, and show it."""
        self._publisher.serve(seconds)
        self._screen.stalled(self._publisher.stalled_seconds, self._publisher.pending)
        self._screen.update(self._sent, self._failing, self._failures, self._elapsed())

    def _elapsed(self) -> float:
        return time.monotonic() - self._began


class _Screen:
    """Standard error: one line that is kept up to date on a terminal, and a word when Kafka goes away or is back."""

    def __init__(self, servers: str) -> None:
        self._servers = servers
        self._console = Console(stderr=True, highlight=False)
        self._status = Status("publishing", console=self._console) if self._console.is_terminal else None
        self._away = False
        self._next_line = 0.0

    def __enter__(self) -> _Screen:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def stalled(self, seconds: float, pending: int) -> None:
        if not self._away and seconds > _AWAY_SECONDS:
            self._away = True
            self._say(f"Kafka at {self._servers} takes nothing; {pending:,} readings wait and go out when it does")
        elif self._away and seconds < _AWAY_SECONDS:
            self._away = False
            self._say(f"Kafka at {self._servers} is back")

    def update(self, sent: int, failing: int, failures: int, elapsed: float) -> None:
        if self._status is not None and elapsed >= self._next_line:
            self._next_line = elapsed + _LINE_SECONDS
            rate = sent / max(elapsed, _LINE_SECONDS)
            self._status.update(
                f"{sent:,} readings ({failing:,} failing, {failures:,} failures) in {elapsed:,.0f} s, {rate:,.0f}/s"
            )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class _Signals:
    received = False


@contextmanager
def _heeding_signals() -> Iterator[_Signals]:
    """SIGINT and SIGTERM are noted; a second one changes nothing, since the end is bounded."""
    signals = _Signals()

    def receive(number: int, frame: FrameType | None) -> None:
        signals.received = True

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(report: dict[str, Any]) -> str:
    partitions = ", ".join(f"{partition}: {readings:,}" for partition, readings in report["partitions"].items())
    return (
        f"published {report['readings']:,} readings of {report['machines']:,} machines to topic {report['topic']} "
        f"in {report['seconds']:,.1f} s ({report['rate']:,.0f}/s)\n"
        f"failing: {report['failing_readings']:,} readings, {report['failures_started']:,} failures started\n"
        f"partitions: {partitions}"
    )
