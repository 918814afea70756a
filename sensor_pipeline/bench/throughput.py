"""How fast a backlog becomes rows, by `sensor-pipeline catch-up`."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.bench import reference
from sensor_pipeline.bench.measured import Bound, Measured, per_second
from sensor_pipeline.bench.processes import Ran
from sensor_pipeline.bench.rounds import Effort, bare_copy, catch_up, prepare
from sensor_pipeline.bench.site import Site
from sensor_pipeline.bench.work import Work
from sensor_pipeline.catch_up import CatchUp


def throughput(site: Site, effort: Effort) -> list[Measured]:
    """`sensor-pipeline catch-up` over a backlog, with one lane and with two, by the clock around the command."""
    work = Work(effort.readings)
    prepare(site, effort, work, compared=work)
    copied: list[float] = []
    ran: dict[int, list[Ran]] = {1: [], 2: []}
    stages: dict[int, dict[str, float]] = {}
    for counts in effort.each_round("throughput"):
        seconds = bare_copy(site, work)
        for lanes, measured in ran.items():
            one, stages[lanes] = catch_up(site, work, lanes=lanes, check=not counts)
            if counts:
                measured.append(one)
        if counts:
            copied.append(seconds)
    return [
        Measured(
            title,
            [base / one.seconds for base, one in zip(copied, ran[lanes], strict=True)],
            "x",
            bound,
            f"{per_second(work.total, [one.seconds for one in ran[lanes]])}, "
            f"{median(one.peak_mb for one in ran[lanes]):.0f} MB, "
            f"{1e6 * median(one.cpu_seconds for one in ran[lanes]) / work.total:.1f} us of CPU a reading",
            f"bare COPY {per_second(work.total, copied)}",
            {stage: 1e6 * spent / work.total for stage, spent in stages[lanes].items()},
        )
        for lanes, title, bound in (
            (1, "catch-up, one lane", Bound(0.60, 0.85)),
            (2, "catch-up, two lanes", Bound(0.80, 1.1)),
        )
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
        one, _ = catch_up(site, work, lanes=1)
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


def sizes(site: Site, effort: Effort) -> list[Measured]:
    """Backlogs of a tenth, of one and of five times the size: seconds a reading, without the command's start.

    What takes one or two seconds is measured several times a round, or a moment of the machine would decide.
    """
    small, middle, large = works = [
        Work(effort.readings // 10),
        Work(effort.readings),
        Work(5 * effort.readings),
    ]
    times = {small: 5, middle: 1, large: 1}
    prepare(site, effort, *works)
    seconds: dict[Work, list[float]] = {work: [] for work in works}
    for counts in effort.each_round("sizes"):
        for work in works:
            took = median(_catch_up_here(site, work) for _ in range(times[work]))
            if counts:
                seconds[work].append(took / work.total)
    site.remove_topic(large)
    return [
        Measured(
            f"backlog of {work.total:,} against one of {middle.total:,}",
            [one / base for one, base in zip(seconds[work], seconds[middle], strict=True)],
            "x",
            Bound(1.10, 1.0, at_least=False),
            per_second(1, seconds[work]),
            per_second(1, seconds[middle]),
        )
        for work in (small, large)
    ]


def _catch_up_here(site: Site, work: Work) -> float:
    with site.database() as fresh:
        runner = CatchUp(Pipeline(replace(fresh, kafka_topics=(site.topic(work),))), lambda batch, written: None)
        backlogs = runner.backlog()
        site.settle()
        began = time.perf_counter()
        runner.run(backlogs)
        return time.perf_counter() - began
