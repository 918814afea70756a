"""What a batch costs where the table, the readings or the machines are not as in the throughput figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.bench.measured import Bound, Measured, per_second
from sensor_pipeline.bench.rounds import Effort, check_result, prepare
from sensor_pipeline.bench.site import Site
from sensor_pipeline.bench.work import PARTITIONS, Work
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.settings import Settings

_SHIFT_IDS = 1_000_000

_BASE = """
    CREATE UNLOGGED TABLE base AS SELECT * FROM readings;
    CREATE UNLOGGED TABLE base_failures AS SELECT * FROM failures;
    CREATE TABLE span AS SELECT max("timestamp") - min("timestamp") + interval '1 ms' AS length FROM base
"""
_EARLIER_FAILURES = """
    INSERT INTO failures (id, machine_id, start_time, last_failing_time, end_time, is_active)
    SELECT id + %(k)s * %(shift)s, machine_id, start_time - %(k)s * length, last_failing_time - %(k)s * length,
        coalesce(end_time, last_failing_time + interval '1 us') - %(k)s * length, false
    FROM base_failures, span
"""
_EARLIER_READINGS = """
    INSERT INTO readings (machine_id, "timestamp", failure_id, kafka_offset, kafka_partition, topic_id, has_failure,
        "values")
    SELECT machine_id, "timestamp" - %(k)s * length, failure_id + %(k)s * %(shift)s,
        kafka_offset + CAST(%(k)s AS bigint) * 1000000000, kafka_partition, topic_id, has_failure, "values"
    FROM base, span
"""


def late(site: Site, effort: Effort) -> list[Measured]:
    """A batch in which 1 % of the readings are a day late, against an orderly one."""
    size = effort.readings // 4
    orderly = Work(size, history=size)
    return [
        _compare(site, effort, "1 % a day late", replace(orderly, late_share=0.01), orderly, Bound(1.5, 1.1, False))
    ]


def failing(site: Site, effort: Effort) -> list[Measured]:
    """A batch in which 30 % of the readings are failing, against 2 %."""
    size = effort.readings // 4
    usual = Work(size, history=size // 5)
    return [_compare(site, effort, "30 % failing", replace(usual, failure_rate=0.3), usual, Bound(1.3, 1.1, False))]


def machines(site: Site, effort: Effort) -> list[Measured]:
    """A batch of readings of 20,000 machines, against one of 50."""
    size = effort.readings // 4
    few = Work(size, history=size // 5)
    return [_compare(site, effort, "20,000 machines", replace(few, machines=20_000), few, Bound(1.3, 1.1, False))]


def batch_sizes(site: Site, effort: Effort) -> list[Measured]:
    """Readings a second of one batch by itself, drained and written one after the other, by its size."""
    sizes = [effort.readings // part for part in (100, 40, 20, 10, 4)]
    work = Work(sum(sizes))
    prepare(site, effort, work)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for counts in effort.each_round("batch sizes"):
        with site.database() as fresh:
            pipeline = Pipeline(replace(fresh, kafka_topics=(site.topic(work),)))
            for part in _batches(site, work, sizes):
                site.settle()
                took = _timed(pipeline, part)
                if counts:
                    rates[len(part)].append(len(part) / took)
    return [Measured(f"a batch of {size:,} readings", rates[size], "readings/s", None) for size in sizes]


def table(site: Site, effort: Effort) -> list[Measured]:
    """A batch on a table of twenty times the readings of a throughput figure, all of one day, against an empty one."""
    size = effort.readings // 4
    fills = [part * effort.readings for part in (5, 10, 20)]
    work = Work(size * (2 + len(fills) * effort.rounds))
    prepare(site, effort, work)
    first, *others = _batches(site, work, [size] * (work.total // size))
    parts = iter(others)
    rates: dict[int, list[float]] = {}
    against_empty: list[tuple[float, float]] = []
    with site.database() as large:
        pipeline = Pipeline(replace(large, kafka_topics=(site.topic(work),)))
        pipeline.run(first)
        filling = _Filling(site, large, size)
        for rows in fills:
            effort.say(f"table: filling up to {rows:,} readings")
            filling.fill(rows)
            if rows != fills[-1]:
                rates[rows] = [size / _timed(pipeline, next(parts)) for _ in range(effort.rounds)]
        for counts in effort.each_round("table"):
            part = next(parts)
            with site.database() as fresh:
                empty = Pipeline(replace(fresh, kafka_topics=pipeline.settings.kafka_topics))
                empty.run(first)
                site.settle()
                seconds = _timed(pipeline, part), _timed(empty, part)
            if counts:
                against_empty.append(seconds)
    on_large, on_empty = zip(*against_empty, strict=True)
    rates |= {size: [size / one for one in on_empty], fills[-1]: [size / one for one in on_large]}
    return [
        Measured(
            f"the same batch on {fills[-1]:,} readings",
            [one / base for one, base in against_empty],
            "x",
            Bound(1.2, 1.05, at_least=False),
            per_second(size, on_large),
            f"on {size:,} readings {per_second(size, on_empty)}",
        ),
        *(Measured(f"a table of {rows:,} readings", rates[rows], "readings/s", None) for rows in sorted(rates)),
    ]


def _compare(site: Site, effort: Effort, title: str, subject: Work, usual: Work, bound: Bound) -> Measured:
    prepare(site, effort, subject, usual)
    seconds: dict[Work, list[float]] = {subject: [], usual: []}
    for counts in effort.each_round(title):
        for work in (usual, subject):
            with site.database() as fresh:
                before, part = _batches(site, work, [work.history, work.readings])
                pipeline = Pipeline(replace(fresh, kafka_topics=(site.topic(work),)))
                pipeline.run(before)
                site.settle()
                took = _timed(pipeline, part)
                if not counts:
                    check_result(site, work, fresh)
            if counts:
                seconds[work].append(took)
    return Measured(
        f"a batch with {title}",
        [one / base for one, base in zip(seconds[subject], seconds[usual], strict=True)],
        "x",
        bound,
        per_second(subject.readings, seconds[subject]),
        per_second(usual.readings, seconds[usual]),
    )


def _batches(site: Site, work: Work, sizes: Sequence[int]) -> list[Batch]:
    """The work cut into batches of these sizes, one after the other."""
    topic = site.kafka_topic(work)
    batches, start = [], 0
    for size in sizes:
        end = start + size // PARTITIONS
        ranges = tuple(OffsetRange(p, start, end) for p in range(PARTITIONS))
        batches.append(Batch(topic.name, topic.kafka_topic_id, ranges))
        start = end
    return batches


def _timed(pipeline: Pipeline, batch: Batch) -> float:
    began = time.perf_counter()
    pipeline.run(batch)
    return time.perf_counter() - began


class _Filling:
    """Copies of what is in a table, failures and all, shifted to earlier times of the same day."""

    def __init__(self, site: Site, settings: Settings, size: int) -> None:
        self._site = site
        self._settings = settings
        self._size = size
        self._copies = 0
        self._do([(_BASE, {})])

    def fill(self, rows: int) -> None:
        """Up to so many rows."""
        copies = range(self._copies + 1, rows // self._size)
        arguments = [{"k": k, "shift": _SHIFT_IDS} for k in copies]
        self._do([(statement, each) for each in arguments for statement in (_EARLIER_FAILURES, _EARLIER_READINGS)])
        self._do([("VACUUM ANALYZE readings", {})])
        self._copies = rows // self._size - 1

    def _do(self, statements: Sequence[tuple[str, dict[str, int]]]) -> None:
        with self._site.connection(self._settings) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            for statement, arguments in statements:
                cursor.execute(statement, arguments)
