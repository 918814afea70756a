"""Figures for people and scripts, from the ledger, the batch log and small tables: readings are never counted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pandas as pd
import sqlalchemy as sa

from sensor_pipeline.postgres.failure_rows import UTC_MICROSECONDS, to_frame

_TOTALS = sa.text("""
    SELECT (SELECT coalesce(sum(readings), 0) FROM ingested_offsets)::bigint AS readings,
           (SELECT coalesce(sum(rejected), 0) FROM ingested_offsets)::bigint AS rejected,
           (SELECT count(*) FROM machines) AS machines,
           (SELECT count(*) FROM failures) AS failures,
           (SELECT count(*) FROM failures WHERE is_active) AS active_failures
""")
_INGESTED = sa.text("""
    SELECT coalesce(sum(readings), 0)::bigint AS readings, coalesce(sum(rejected), 0)::bigint AS rejected,
           coalesce(sum(no_record), 0)::bigint AS no_record, coalesce(sum(lost), 0)::bigint AS lost
    FROM ingested_offsets
""")
# Up to a hundred thousand rows are counted; beyond that it is the planner's estimate that is cheap at any size.
_COUNTED = """(
    SELECT CASE WHEN count(*) <= 100000 THEN count(*) ELSE greatest(
        count(*), (SELECT reltuples FROM pg_class WHERE oid = '{table}'::regclass)::bigint
    ) END
    FROM (SELECT FROM {table} LIMIT 100001) AS first
)"""
_ROWS = sa.text(f"""
    SELECT (SELECT coalesce(sum(readings), 0) FROM ingested_offsets)::bigint AS readings,
           (SELECT coalesce(sum(rejected), 0) FROM ingested_offsets)::bigint AS rejected_messages,
           {_COUNTED.format(table="machines")} AS machines,
           {_COUNTED.format(table="failures")} AS failures,
           (SELECT count(*) FROM failures WHERE is_active) AS active_failures
""")
_SILENT = sa.text("""
    SELECT machine_id, last_seen, count(*) OVER () AS machines FROM machines
    WHERE last_seen < :since ORDER BY last_seen DESC, id LIMIT :most
""")
_FAILED = sa.text("""
    SELECT m.machine_id, f.start_time, f.end_time FROM failures f JOIN machines m ON m.id = f.machine_id
    WHERE f.start_time < :until AND (f.is_active OR f.end_time >= :since) ORDER BY f.start_time, f.id
""")
_REASONS = sa.text("SELECT reason, count(*) AS messages FROM rejected_messages GROUP BY reason ORDER BY reason")
_LAST_BATCHES = sa.text("""
    SELECT batches.id, kind, topics.name AS topic, ranges, dagster_run_id, drained, inserted, already_ingested,
           rejected, no_record, failures_started, failures_ended, started_at, committed_at, timings
    FROM batches JOIN topics ON topics.id = batches.topic_id
    ORDER BY committed_at DESC LIMIT :count
""")
# Messages are counted as done with the batch that brought them.
_THROUGHPUT = sa.text("""
    SELECT statement_timestamp() - first_seen AS known_for, (
        SELECT coalesce(sum(inserted + rejected + no_record), 0)::bigint FROM batches
        WHERE topic_id = topics.id AND committed_at > statement_timestamp() - CAST(:within AS interval)
    ) AS done
    FROM topics WHERE kafka_topic_id = :kafka_topic_id
""")
_REJECTED_WITHIN = sa.text("""
    SELECT coalesce(sum(rejected), 0)::bigint FROM batches JOIN topics ON topics.id = topic_id
    WHERE kafka_topic_id = :kafka_topic_id AND committed_at > statement_timestamp() - CAST(:within AS interval)
""")


@dataclass(frozen=True)
class Figures:
    """Totals since the first start, rejected messages held by reason, and the newest batches, newest first."""

    readings: int
    rejected: int
    machines: int
    failures: int
    active_failures: int
    rejected_by_reason: dict[str, int]
    last_batches: list[dict[str, Any]]


def read_figures(connection: sa.Connection, last_batches: int) -> Figures:
    """The figures as they are now."""
    totals = connection.execute(_TOTALS).one()
    reasons = {row.reason: row.messages for row in connection.execute(_REASONS)}
    batches = [dict(row._mapping) for row in connection.execute(_LAST_BATCHES, {"count": last_batches})]
    return Figures(**totals._mapping, rejected_by_reason=reasons, last_batches=batches)


@dataclass(frozen=True)
class Ingested:
    """The ledger's totals of all topics, in offsets: a batch that changed anything changed one of them."""

    readings: int
    rejected: int
    no_record: int
    lost: int

    @property
    def messages(self) -> int:
        """How many messages were ever ingested."""
        return self.readings + self.rejected

    def __str__(self) -> str:
        return f"readings {self.readings}, rejected {self.rejected}, no record {self.no_record}, lost {self.lost}"


def read_ingested(connection: sa.Connection) -> Ingested:
    """What was ingested until now."""
    return Ingested(**connection.execute(_INGESTED).one()._mapping)


@dataclass(frozen=True)
class Rows:
    """How many rows the tables have: an estimate for machines and failures where there are more than 100,000."""

    readings: int
    rejected_messages: int
    machines: int
    failures: int
    active_failures: int


def count_rows(connection: sa.Connection) -> Rows:
    """The rows as they are now, in some milliseconds at any size."""
    return Rows(**connection.execute(_ROWS).one()._mapping)


@dataclass(frozen=True)
class Silent:
    """How many machines have not been heard of since some time, and the last event times of some, latest first."""

    machines: int
    latest: dict[str, datetime]


def find_silent(connection: sa.Connection, since: datetime, most: int) -> Silent:
    """Machines whose latest reading is older than `since`; at most `most` of them by name."""
    rows = connection.execute(_SILENT, {"since": since, "most": most}).all()
    return Silent(rows[0].machines if rows else 0, {row.machine_id: row.last_seen for row in rows})


def failures_between(connection: sa.Connection, since: datetime, until: datetime) -> pd.DataFrame:
    """`machine` (its name), `start` and `end` (datetime64[us, UTC], NaT while active) of failures in some time."""
    rows = connection.execute(_FAILED, {"since": since, "until": until})
    return to_frame(rows, {"machine": "object", "start": UTC_MICROSECONDS, "end": UTC_MICROSECONDS})


@dataclass(frozen=True)
class Throughput:
    """For how long a topic is known, and how many of its offsets were done within some time, by the batch log."""

    known_for: timedelta
    done: int


def read_throughput(connection: sa.Connection, kafka_topic_id: str, within: timedelta) -> Throughput | None:
    """A topic's throughput until now; None where the pipeline does not know it yet."""
    row = connection.execute(_THROUGHPUT, {"kafka_topic_id": kafka_topic_id, "within": within}).one_or_none()
    return None if row is None else Throughput(**row._mapping)


def rejected_within(connection: sa.Connection, kafka_topic_id: str, within: timedelta) -> int:
    """How many messages of a topic were rejected within some time until now, by the batch log."""
    arguments = {"kafka_topic_id": kafka_topic_id, "within": within}
    return int(connection.execute(_REJECTED_WITHIN, arguments).scalar_one())
