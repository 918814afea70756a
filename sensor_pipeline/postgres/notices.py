"""Rows of `notices`, the outbox: written with what they tell of, read by whoever delivers, deleted after some days.

A machine's notices get ascending ids in the order in which they are committed, since whoever writes them holds the
machine. So they are delivered in order of id, the next one only when the one before it is closed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pandas as pd
import sqlalchemy as sa

from sensor_pipeline.notices import Kind, MachineChange, Notice, RunNotice
from sensor_pipeline.postgres.arrays import array, time_array

_IS_OLD = "event_time < statement_timestamp() - CAST(:max_age AS interval)"
_OUTCOME = f"CASE WHEN {_IS_OLD} THEN 'old' END, CASE WHEN {_IS_OLD} THEN statement_timestamp() END"
_ADD_CHANGES = sa.text(f"""
    INSERT INTO notices (kind, machine_id, failure_id, start_time, end_time, event_time, outcome, closed_at)
    SELECT kind, machine_id, failure_id, start_time, end_time, event_time, {_OUTCOME}
    FROM unnest(
        CAST(:kinds AS text[]), CAST(:machines AS bigint[]), CAST(:failures AS bigint[]),
        CAST(:starts AS timestamptz[]), CAST(:ends AS timestamptz[]), CAST(:moments AS timestamptz[])
    ) WITH ORDINALITY AS new (kind, machine_id, failure_id, start_time, end_time, event_time, place)
    ORDER BY place
""")
# One that was too old to be sent has told nobody.
_ADD_RUN_NOTICE = sa.text(f"""
    INSERT INTO notices (kind, subject, details, event_time, outcome, closed_at)
    SELECT kind, subject, details, event_time, {_OUTCOME}
    FROM (SELECT CAST(:kind AS text) AS kind, CAST(:subject AS text) AS subject, CAST(:details AS jsonb) AS details,
                 CAST(:at AS timestamptz) AS event_time) AS new
    WHERE NOT EXISTS (
        SELECT FROM notices told WHERE (told.kind, told.subject) = (new.kind, new.subject)
            AND told.found_at > statement_timestamp() - CAST(:repeat AS interval)
            AND told.outcome IS DISTINCT FROM 'old'
    )
""")

_NOTICE = """
    SELECT n.id, n.kind, n.machine_id, m.machine_id AS name, n.failure_id, n.start_time, n.end_time, n.found_at,
           n.subject, n.details, n.attempts, n.refused_since, clock_timestamp() AS now
    FROM notices n LEFT JOIN machines m ON m.id = n.machine_id
    WHERE n.outcome IS NULL
"""
# Of each machine, and of each subject of the pipeline's own, the first; all others wait for it.
_DUE = sa.text("""
    SELECT id FROM (
        SELECT DISTINCT ON (machine_id, subject) id, retry_at FROM notices
        WHERE outcome IS NULL ORDER BY machine_id, subject, id
    ) AS first
    WHERE retry_at <= statement_timestamp() ORDER BY retry_at, id LIMIT :most
""")
# Whoever has its row is alone with the notice; one that was closed meanwhile is not found.
_TAKE = sa.text(f"{_NOTICE} AND n.id = :id FOR UPDATE OF n SKIP LOCKED")
# Here the second one waits, so that the log has them in order.
_TAKE_FIRST = sa.text(f"{_NOTICE} ORDER BY n.id LIMIT :most FOR UPDATE OF n")
_CLOSE = sa.text("""
    UPDATE notices SET outcome = :outcome, closed_at = clock_timestamp(), attempts = attempts + :attempts
    WHERE id = ANY (CAST(:ids AS bigint[]))
""")
_POSTPONE = sa.text("""
    UPDATE notices SET attempts = attempts + 1, retry_at = clock_timestamp() + CAST(:pause AS interval),
        refused_since = CASE WHEN :refused THEN coalesce(refused_since, clock_timestamp()) ELSE refused_since END
    WHERE id = :id
""")
# Ids are in order of time, so the oldest are looked at and no more: without an index that every notice would pay for.
_DELETE_OLD = sa.text("""
    DELETE FROM notices WHERE id IN (
        SELECT id FROM (SELECT id, found_at, outcome FROM notices ORDER BY id LIMIT :most) AS oldest
        WHERE outcome IS NOT NULL AND found_at < statement_timestamp() - CAST(:kept AS interval)
    )
""")
_WAITING = sa.text("""
    SELECT count(*) AS undelivered,
           coalesce(extract(epoch FROM clock_timestamp() - min(found_at)), 0)::float8 AS oldest_seconds,
           (SELECT count(*) FROM notices WHERE outcome = 'given_up') AS given_up
    FROM notices WHERE outcome IS NULL
""")


@dataclass(frozen=True)
class Taken:
    """A notice that is locked to be delivered: its failed attempts so far, and since when it was refused, if it was."""

    notice: Notice
    attempts: int
    refused_since: datetime | None
    now: datetime


@dataclass(frozen=True)
class Waiting:
    """How many notices are to be delivered, how old the oldest is, and how many of the kept ones were given up."""

    undelivered: int
    oldest_seconds: float
    given_up: int


def add_changes(connection: sa.Connection, told: pd.DataFrame, max_age: timedelta) -> None:
    """Write the notices of machines that are locked: a frame as `notices.changes` gives it; nothing where it is empty.

    Those of what happened more than `max_age` ago are closed as they are written.
    """
    if told.empty:
        return
    connection.execute(
        _ADD_CHANGES,
        {
            "kinds": array(told["kind"]),
            "machines": array(told["machine"]),
            "failures": array(told["id"]),
            "starts": time_array(told["start"]),
            "ends": time_array(told["end"]),
            "moments": time_array(told["at"]),
            "max_age": max_age,
        },
    )


def add_run_notice(connection: sa.Connection, notice: RunNotice, max_age: timedelta, repeat: timedelta) -> bool:
    """Write a notice of the pipeline itself, unless its subject was told less than `repeat` ago; whether it was."""
    arguments = {
        "kind": notice.kind,
        "subject": notice.subject,
        "details": json.dumps({"text": notice.text, **notice.details}),
        "at": notice.at,
        "max_age": max_age,
        "repeat": repeat,
    }
    return connection.execute(_ADD_RUN_NOTICE, arguments).rowcount == 1


def due(connection: sa.Connection, most: int) -> list[int]:
    """Ids of notices that may be delivered now, of a machine only the first; the longest due first."""
    return list(connection.scalars(_DUE, {"most": most}))


def take(connection: sa.Connection, notice_id: int) -> Taken | None:
    """Lock a notice until the transaction ends; None where it is closed, or another one has it."""
    row = connection.execute(_TAKE, {"id": notice_id}).one_or_none()
    return None if row is None else Taken(_notice(row), row.attempts, row.refused_since, row.now)


def take_first(connection: sa.Connection, most: int) -> list[Notice]:
    """Lock the first notices that are to be delivered, whatever their machines, once no other one has them."""
    return [_notice(row) for row in connection.execute(_TAKE_FIRST, {"most": most})]


def close(connection: sa.Connection, ids: Sequence[int], outcome: str, *, attempts: int = 0) -> None:
    """These are done with: `sent`, `logged` or `given_up`, after so many more attempts."""
    connection.execute(_CLOSE, {"ids": list(ids), "outcome": outcome, "attempts": attempts})


def postpone(connection: sa.Connection, notice_id: int, pause: timedelta, *, refused: bool) -> None:
    """An attempt failed; the next one comes after a pause."""
    connection.execute(_POSTPONE, {"id": notice_id, "pause": pause, "refused": refused})


def delete_old(connection: sa.Connection, kept: timedelta, most: int) -> int:
    """Delete closed notices that were found longer ago than `kept`, of the oldest `most`; returns how many."""
    return connection.execute(_DELETE_OLD, {"kept": kept, "most": most}).rowcount


def waiting(connection: sa.Connection) -> Waiting:
    """What is to be delivered."""
    return Waiting(**connection.execute(_WAITING).one()._mapping)


def _notice(row: Any) -> Notice:
    change = None
    if row.machine_id is not None:
        change = MachineChange(row.machine_id, row.name, row.failure_id, row.start_time, row.end_time)
    details = dict(row.details or {})
    text = details.pop("text", "")
    return Notice(row.id, Kind(row.kind), row.found_at, change, row.subject or "", text, details)
