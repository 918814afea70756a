"""The figures by name: each a function that measures some lines of the table on a site.

Every round of a figure runs the reference, or what it is compared with, right before the pipeline, on a database of its
own each; the first round is not counted. Before a speed is reported its result was compared with the naive one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from sensor_pipeline.bench import daemon, naive, reference
from sensor_pipeline.bench.measured import Bound, Measured, per_second
from sensor_pipeline.bench.processes import Ran, run
from sensor_pipeline.bench.site import Site
from sensor_pipeline.bench.work import Work
from sensor_pipeline.settings import Settings


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        rounds: counted rounds of each figure.
        readings: in the backlog of a throughput figure.
        say: told what is done now.
    """

    rounds: int
    readings: int
    say: Callable[[str], None]

    def each_round(self, title: str) -> Iterator[bool]:
        """Says each round; whether it counts."""
        for number in range(self.rounds + 1):
            self.say(f"{title}: round {number} of {self.rounds}" if number else f"{title}: warming up")
            yield number > 0


def throughput(site: Site, effort: Effort) -> list[Measured]:
    """`sensor-pipeline catch-up` over a backlog, with one lane and with two, by the clock around the command."""
    work = Work(effort.readings)
    _prepare(site, effort, work)
    copied: list[float] = []
    ran: dict[int, list[Ran]] = {1: [], 2: []}
    for counts in effort.each_round("throughput"):
        seconds = bare_copy(site, work)
        ran_now = {lanes: catch_up(site, work, lanes=lanes, check=not counts) for lanes in ran}
        if counts:
            copied.append(seconds)
            for lanes, one in ran_now.items():
                ran[lanes].append(one)
    bounds = {1: Bound(0.60, 0.85), 2: Bound(0.80, 1.1)}
    return [
        Measured(
            f"catch-up, {'one lane' if lanes == 1 else 'two lanes'}",
            [base / one.seconds for base, one in zip(copied, ran[lanes], strict=True)],
            "x",
            bounds[lanes],
            f"{per_second(work.total, [one.seconds for one in ran[lanes]])}, "
            f"{median(one.peak_mb for one in ran[lanes]):.0f} MB, "
            f"{1e6 * median(one.cpu_seconds for one in ran[lanes]) / work.total:.1f} us of CPU a reading",
            f"bare COPY {per_second(work.total, copied)}",
        )
        for lanes in ran
    ]


def through_daemon(site: Site, effort: Effort) -> list[Measured]:
    """A backlog of twice as much through Dagster's daemon, sensor and default launcher, with two lanes."""
    work = Work(2 * effort.readings)
    compared = Work(effort.readings)
    _prepare(site, effort, work, compared)
    copied: list[float] = []
    drained: list[float] = []
    launches: list[float] = []
    for counts in effort.each_round("daemon"):
        base = bare_copy(site, compared) / compared.total
        with site.database() as fresh:
            settings = replace(fresh, kafka_topics=(site.topic(work),), lanes=2)
            site.settle()
            with daemon.running(site, settings) as ran:
                ran.await_offsets(work.total)
                seconds, launch = ran.seconds(), ran.launch_seconds()
            if not counts:
                check_result(site, work, settings)
        if counts:
            copied.append(base)
            drained.append(seconds / work.total)
            launches.append(launch)
    return [
        Measured(
            f"daemon, two lanes, {work.total:,} readings",
            [base / one for base, one in zip(copied, drained, strict=True)],
            "x",
            Bound(0.55, 0.70),
            per_second(1, drained),
            f"bare COPY {per_second(1, copied)}",
        ),
        Measured("from launch to first op", launches, "s", Bound(2.0, 2.0, at_least=False)),
    ]


def one_by_one(site: Site, effort: Effort) -> list[Measured]:
    """`catch-up` against a consumer that does one message, one transaction."""
    work = Work(effort.readings)
    messages = 500
    topic = site.topic(work)
    naively: list[float] = []
    ran: list[Ran] = []
    for counts in effort.each_round("one by one"):
        with site.database(migrated=False) as settings, site.connection(settings) as connection:
            reference.make_service_tables(connection)
            site.settle()
            servers = settings.kafka_bootstrap_servers
            seconds = reference.one_by_one(connection, servers, topic, f"{settings.kafka_group_id}-naive", messages)
        one = catch_up(site, work, lanes=1)
        if counts:
            naively.append(seconds / messages)
            ran.append(one)
    return [
        Measured(
            "against one message, one transaction",
            [base / (one.seconds / work.total) for base, one in zip(naively, ran, strict=True)],
            "x",
            Bound(100, 150),
            per_second(work.total, [one.seconds for one in ran]),
            per_second(1, naively),
        )
    ]


def bare_copy(site: Site, work: Work) -> float:
    """Seconds of the reference."""
    rows = site.rows(work)
    with site.database(migrated=False) as settings, site.connection(settings) as connection:
        reference.make_plain_table(connection)
        site.settle()
        return reference.bare_copy(connection, rows)


def catch_up(site: Site, work: Work, *, lanes: int, batch_size: int | None = None, check: bool = False) -> Ran:
    """The command over all of the work, in a fresh database."""
    with site.database() as fresh:
        settings = replace(fresh, kafka_topics=(site.topic(work),), lanes=lanes)
        if batch_size is not None:
            settings = replace(settings, batch_size=batch_size)
        site.settle()
        ran = run(["sensor_pipeline", "catch-up"], settings)
        if check:
            check_result(site, work, settings)
        return ran


def check_result(site: Site, work: Work, settings: Settings) -> None:
    """Whether the database holds what the work must become."""
    with site.connection(settings) as connection:
        naive.check(work, connection)


def _prepare(site: Site, effort: Effort, work: Work, compared: Work | None = None) -> None:
    effort.say(f"publishing {work.total:,} messages")
    site.topic(work)
    effort.say("writing the reference's rows")
    site.rows(compared or work)


FIGURES: dict[str, Callable[[Site, Effort], Sequence[Measured]]] = {
    "throughput": throughput,
    "one-by-one": one_by_one,
    "daemon": through_daemon,
}
