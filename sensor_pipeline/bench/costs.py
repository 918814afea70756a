"""What a batch costs where the table, the readings or the machines are not as in the throughput figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.bench.measured import Bound, Measured, per_second
from sensor_pipeline.bench.rounds import Effort, check_result, prepare
from sensor_pipeline.bench.site import Site
from sensor_pipeline.bench.work import PARTITIONS, Work
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.settings import Settings

_SHIFT_IDS = 1_000_000

_BASE = "CREATE UNLOGGED TABLE base AS SELECT * FROM readings"
_SPAN = 'SELECT max("timestamp") - min("timestamp") + interval \'1 ms\' FROM base'
_EARLIER_FAILURES = """
    INSERT INTO failures (id, machine_id, start_time, last_failing_time, end_time, is_active)
    SELECT id + %(k)s * %(shift)s, machine_id, start_time - %(k)s * %(span)s, last_failing_time - %(k)s * %(span)s,
        coalesce(end_time, last_failing_time + interval '1 us') - %(k)s * %(span)s, false
    FROM failures WHERE id < %(shift)s
"""
_EARLIER_READINGS = """
    INSERT INTO readings (machine_id, "timestamp", failure_id, kafka_offset, kafka_partition, topic_id, has_failure,
        "values")
    SELECT machine_id, "timestamp" - %(k)s * %(span)s, failure_id + %(k)s * %(shift)s,
        kafka_offset + CAST(%(k)s AS bigint) * 1000000000, kafka_partition, topic_id, has_failure, "values"
    FROM base
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


def table(site: Site, effort: Effort) -> list[Measured]:
    """A batch on a table of twenty times the readings of a throughput figure, all of one day, against an empty one."""
    size = effort.readings // 4
    work = Work(size * (effort.rounds + 2))
    prepare(site, effort, work)
    parts = _batches(site, work, [size] * (effort.rounds + 2))
    on_large: list[float] = []
    on_empty: list[float] = []
    with site.database() as large:
        pipeline = Pipeline(replace(large, kafka_topics=(site.topic(work),)))
        pipeline.run(parts[0])
        rows = 20 * effort.readings
        _fill(site, large, rows // size, effort)
        for part, counts in zip(parts[1:], effort.each_round("table"), strict=True):
            with site.database() as fresh:
                empty = Pipeline(replace(fresh, kafka_topics=pipeline.settings.kafka_topics))
                empty.run(parts[0])
                site.settle()
                seconds = _timed(empty, part), _timed(pipeline, part)
            if counts:
                on_empty.append(seconds[0])
                on_large.append(seconds[1])
    return [
        Measured(
            f"a batch on a table of {rows:,} readings",
            [one / base for one, base in zip(on_large, on_empty, strict=True)],
            "x",
            Bound(1.2, 1.05, at_least=False),
            per_second(size, on_large),
            f"on {size:,} readings {per_second(size, on_empty)}",
        )
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


def _fill(site: Site, settings: Settings, copies: int, effort: Effort) -> None:
    """Copy what is there again and again to earlier times of the same day, failures and all."""
    with ExitStack() as stack:
        connection = stack.enter_context(site.connection(settings))
        connection.autocommit = True
        cursor = stack.enter_context(connection.cursor())
        cursor.execute(_BASE)
        cursor.execute(_SPAN)
        ((span,),) = cursor.fetchall()
        for k in range(1, copies + 1):
            effort.say(f"table: filling, {k} of {copies}")
            arguments = {"k": k, "span": span, "shift": _SHIFT_IDS}
            cursor.execute(_EARLIER_FAILURES, arguments)
            cursor.execute(_EARLIER_READINGS, arguments)
        cursor.execute("VACUUM ANALYZE readings")
