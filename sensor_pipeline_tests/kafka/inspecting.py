"""What the pipeline did, read from PostgreSQL by the tests' own statements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from sensor_pipeline.backlog import TopicBacklog, read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published, connect, expected, stored


def batch(settings: Settings, ranges: Mapping[int, tuple[int, int]], topic: str | None = None) -> Batch:
    """A batch of the topic as it is now, from `[start, end)` by partition."""
    name = topic or settings.kafka_topics[0]
    topic_id = Kafka(settings).topic(name).kafka_topic_id
    return Batch(name, topic_id, tuple(OffsetRange(p, start, end) for p, (start, end) in ranges.items()))


def backlog(pipeline: Pipeline, topic: str | None = None) -> TopicBacklog:
    """The backlog of the settings' first topic."""
    name = topic or pipeline.settings.kafka_topics[0]
    return read_backlog(pipeline.settings, pipeline.kafka, pipeline.database, name, register=True)


def catch_up(pipeline: Pipeline) -> list[Batch]:
    """Ingest all that is there now; returns the batches that were run, in order of their end."""
    done: list[Batch] = []
    runner = CatchUp(pipeline, lambda batch, _: done.append(batch), sleep=lambda _: None)
    runner.run(runner.backlog())
    return done


def slow_reader(settings: Settings, *, timeout: float = 20) -> Kafka:
    """A connection that fetches one record batch at a time, and no more before that is taken."""
    slow = {"queued.min.messages": "1", "fetch.message.max.bytes": "1", "fetch.queue.backoff.ms": "1"}
    return Kafka(replace(settings, kafka_client=slow), timeout=timeout, stall_timeout=timeout)


def query(settings: Settings, statement: str) -> Sequence[Any]:
    """The rows of a statement."""
    with connect(settings).connect() as connection:
        return connection.execute(sa.text(statement)).all()


def ledger_ranges(settings: Settings, topic_id: str) -> dict[int, list[tuple[int, int]]]:
    """What the ledger holds of a topic."""
    done: dict[int, list[tuple[int, int]]] = {}
    for found, partition, start, end in query(
        settings,
        """
        SELECT t.kafka_topic_id, kafka_partition, lower(span), upper(span)
        FROM ingested_offsets JOIN topics t ON t.id = topic_id, unnest(offsets) AS span ORDER BY 2, 3
        """,
    ):
        if found == topic_id:
            done.setdefault(partition, []).append((start, end))
    return done


def totals(settings: Settings) -> tuple[int, int, int, int]:
    """The ledger's totals: readings, rejected, no record, lost."""
    rows = query(
        settings,
        """
        SELECT coalesce(sum(readings), 0), coalesce(sum(rejected), 0), coalesce(sum(no_record), 0),
               coalesce(sum(lost), 0)
        FROM ingested_offsets
        """,
    )
    return tuple(map(int, rows[0]))  # type: ignore[return-value]


def accepted_gaps(settings: Settings) -> list[tuple[int, int, int]]:
    """Partition, start and end of each accepted gap, in order."""
    rows = query(
        settings,
        "SELECT kafka_partition, lower(offsets), upper(offsets) FROM accepted_gaps ORDER BY 1, 2",
    )
    return [tuple(row) for row in rows]


def check_rows(settings: Settings, published: Sequence[Published]) -> None:
    """The rows are the oracle's, and every count in the ledger and the batch log adds up."""
    want, got = expected(published), stored(settings)
    assert got.readings == want.readings
    assert got.rejected == want.rejected
    assert got.failures == want.failures
    assert got.machines == want.machines
    check_counts(settings)


def check_counts(settings: Settings) -> None:
    """Conservation, counted again from the rows: no total is believed."""
    off = query(
        settings,
        """
        SELECT i.*, held.*
        FROM ingested_offsets i, LATERAL (
            SELECT (SELECT coalesce(sum(upper(s) - lower(s)), 0) FROM unnest(i.offsets) AS s) AS offsets_held,
                   (SELECT count(*) FROM readings r WHERE (r.topic_id, r.kafka_partition)
                           = (i.topic_id, i.kafka_partition) AND r.kafka_offset <@ i.offsets) AS readings_held,
                   (SELECT count(*) FROM rejected_messages r WHERE (r.topic_id, r.kafka_partition)
                           = (i.topic_id, i.kafka_partition) AND r.kafka_offset <@ i.offsets) AS rejected_held,
                   (SELECT coalesce(sum(upper(g.offsets) - lower(g.offsets)), 0) FROM accepted_gaps g
                    WHERE (g.topic_id, g.kafka_partition) = (i.topic_id, i.kafka_partition)) AS lost_held
        ) AS held
        WHERE (readings_held, rejected_held, lost_held) IS DISTINCT FROM (i.readings, i.rejected, i.lost)
           OR offsets_held <> i.readings + i.rejected + i.no_record + i.lost
        """,
    )
    assert not off
    batches = query(
        settings,
        """
        SELECT * FROM batches b WHERE inserted + already_ingested + rejected + no_record <>
            (SELECT sum((r ->> 'end')::bigint - (r ->> 'start')::bigint) FROM jsonb_array_elements(b.ranges) AS r)
        """,
    )
    assert not batches
