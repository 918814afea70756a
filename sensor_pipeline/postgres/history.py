"""A machine's failures from all its readings, by SQL that shares nothing with the way in which batches find them.

It reads every reading where a batch reads a few, so it can tell whether the stored failures are right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

# From this moment on all readings are there. A failure that reaches into that time has its first and last reading from
# before it still; of one that ended before, all were dropped, and nothing can be said about it any more.
_THERE_FROM = "(SELECT coalesce(dropped_before::timestamp AT TIME ZONE 'UTC', '-infinity') FROM readings_horizon)"

# Machines with when they were first and last seen by their readings; what was seen before these are there is taken as
# it stands.
SEEN_BY_READINGS = f"""
    machines CROSS JOIN LATERAL (
        SELECT CASE WHEN first_seen < {_THERE_FROM} THEN least(first_seen, first) ELSE first END AS first,
               CASE WHEN last_seen < {_THERE_FROM} THEN greatest(last_seen, last) ELSE last END AS last
        FROM (
            SELECT min("timestamp") AS first, max("timestamp") AS last FROM readings WHERE machine_id = machines.id
        ) AS stored
    ) AS held
"""

_INSIDE = """r."timestamp" > coalesce(CAST(:after AS timestamptz), '-infinity')
    AND r."timestamp" <= coalesce(CAST(:until AS timestamptz), 'infinity')"""
# Every reading of the window with the number of its failure, or of the last one before it; 0 before the first. The
# names are compared byte by byte, as everywhere else.
_NUMBERED = f"""
    WITH placed AS (
        SELECT r.id, r."timestamp", r.has_failure, r.failure_id, row_number() OVER turn AS place,
               r.has_failure AND NOT lag(r.has_failure, 1, false) OVER turn AS starts
        FROM readings r LEFT JOIN topics t ON t.id = r.topic_id
        WHERE r.machine_id = :machine AND {_INSIDE}
        WINDOW turn AS (
            ORDER BY r."timestamp", t.name COLLATE "C", t.kafka_topic_id COLLATE "C", r.kafka_partition, r.kafka_offset
        )
    ), numbered AS (
        SELECT id, "timestamp", has_failure, failure_id, count(*) FILTER (WHERE starts) OVER (ORDER BY place) AS episode
        FROM placed
    )
"""
_FOUND = sa.text(f"""
    {_NUMBERED}
    SELECT episode AS number, min("timestamp") FILTER (WHERE has_failure) AS start,
           max("timestamp") FILTER (WHERE has_failure) AS last, min("timestamp") FILTER (WHERE NOT has_failure) AS end,
           count(*) FILTER (WHERE has_failure) AS readings,
           array_agg(DISTINCT failure_id) FILTER (WHERE has_failure) AS ids
    FROM numbered WHERE episode > 0 GROUP BY episode ORDER BY episode
""")
_STORED = sa.text(f"""
    SELECT id, start_time AS start, last_failing_time AS last, end_time AS end FROM failures
    WHERE machine_id = :machine AND start_time > coalesce(CAST(:after AS timestamptz), '-infinity')
        AND start_time <= coalesce(CAST(:until AS timestamptz), 'infinity')
        AND coalesce(end_time, 'infinity') >= {_THERE_FROM}
    ORDER BY start_time, id
""")
_POINT = sa.text(f"""
    {_NUMBERED}
    UPDATE readings r SET failure_id = new.id
    FROM numbered JOIN unnest(CAST(:episodes AS bigint[]), CAST(:ids AS bigint[])) AS new (episode, id) USING (episode)
    WHERE numbered.has_failure AND numbered.failure_id IS DISTINCT FROM new.id
        AND r.machine_id = :machine AND r."timestamp" = numbered."timestamp" AND r.id = numbered.id AND {_INSIDE}
""")
_HEALTHY_BEFORE = sa.text("""
    SELECT "timestamp" FROM readings WHERE machine_id = :machine AND "timestamp" < :moment
    GROUP BY "timestamp" HAVING NOT bool_or(has_failure) ORDER BY "timestamp" DESC LIMIT 1
""")
_HEALTHY_FROM = sa.text("""
    SELECT "timestamp" FROM readings WHERE machine_id = :machine AND "timestamp" >= :moment
    GROUP BY "timestamp" HAVING NOT bool_or(has_failure) ORDER BY "timestamp" LIMIT 1
""")
_REACH = sa.text("""
    SELECT min(start_time) AS since, max(end_time) AS until, bool_or(is_active) AS is_open FROM failures
    WHERE machine_id = :machine AND start_time <= coalesce(CAST(:until AS timestamptz), 'infinity')
        AND coalesce(end_time, 'infinity') > coalesce(CAST(:after AS timestamptz), '-infinity')
""")


@dataclass(frozen=True)
class Span:
    """When a failure starts, last fails and ends (None while it is active)."""

    start: datetime
    last: datetime
    end: datetime | None

    def __str__(self) -> str:
        end = f"ends {self.end.isoformat()}" if self.end else "is active"
        return f"starts {self.start.isoformat()}, last fails {self.last.isoformat()}, {end}"


@dataclass(frozen=True)
class Episode:
    """A failure by its readings: its number in the window, how many readings it has, and the ids they point to."""

    number: int
    span: Span
    readings: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A part of a machine's history, `(after, until]`, that no failure crosses; None: to its beginning or end.

    `machine` is `machines.id`.
    """

    machine: int
    after: datetime | None
    until: datetime | None


def widen(connection: sa.Connection, machine: int, since: datetime | None, until: datetime | None) -> Window:
    """The smallest window around some time that holds every failure which touches it, found or stored, whole."""
    while True:
        after = since and connection.scalar(_HEALTHY_BEFORE, {"machine": machine, "moment": since})
        end = until and connection.scalar(_HEALTHY_FROM, {"machine": machine, "moment": until})
        stored = connection.execute(_REACH, {"machine": machine, "after": after, "until": end}).one()
        # A stored failure that reaches further is wrong, and is looked at whole.
        begins_before = after is not None and stored.since is not None and stored.since <= after
        ends_after = end is not None and (bool(stored.is_open) or (stored.until is not None and stored.until > end))
        if not begins_before and not ends_after:
            return Window(machine, after, end)
        since = stored.since if begins_before else since
        until = (None if stored.is_open else stored.until) if ends_after else until


def find_episodes(connection: sa.Connection, window: Window) -> list[Episode]:
    """The failures of a window from its readings, in order of start."""
    rows = connection.execute(_FOUND, vars(window))
    return [Episode(r.number, Span(r.start, r.last, r.end), r.readings, tuple(r.ids)) for r in rows]


def stored_failures(connection: sa.Connection, window: Window) -> dict[int, Span]:
    """The stored failures that start in a window, by id."""
    return {row.id: Span(row.start, row.last, row.end) for row in connection.execute(_STORED, vars(window))}


def point_readings(connection: sa.Connection, window: Window, ids: Mapping[int, int]) -> int:
    """Let each failing reading of a window point to its failure, by the number of its episode; how many did not."""
    arguments = {"episodes": list(ids), "ids": list(ids.values())}
    return connection.execute(_POINT, vars(window) | arguments).rowcount


@dataclass(frozen=True)
class Difference:
    """One thing that is wrong with a machine's failures, and the time that it touches (`until` None: on and on)."""

    text: str
    since: datetime
    until: datetime | None


def compare(found: Sequence[Episode], stored: Mapping[int, Span]) -> list[Difference]:
    """How the stored failures of a window differ from those that its readings make, in order of time."""
    used: set[int] = set()
    differences = []
    for episode in found:
        if said := _wrong(episode, stored, used):
            differences.append(_difference(said, [episode.span, *(stored[i] for i in episode.ids if i in stored)]))
        used.update(episode.ids)
    differences += [
        _difference(f"failure {failure_id} is stored ({span}), and no reading is in it", [span])
        for failure_id, span in stored.items()
        if failure_id not in used
    ]
    return sorted(differences, key=lambda difference: difference.since)


def _wrong(episode: Episode, stored: Mapping[int, Span], used: set[int]) -> str | None:
    readings = f"{episode.readings} failing readings ({episode.span})"
    if len(episode.ids) > 1:
        return f"{readings} are one failure, and point to {', '.join(map(str, episode.ids))}"
    [failure_id] = episode.ids
    if failure_id in used:
        return f"{readings} point to failure {failure_id}, as those of another failure do"
    if failure_id not in stored:
        return f"{readings} point to failure {failure_id}, which is not stored for this machine and time"
    if stored[failure_id] != episode.span:
        return f"failure {failure_id} is stored as: {stored[failure_id]}; by its readings it {episode.span}"
    return None


def _difference(text: str, spans: Sequence[Span]) -> Difference:
    ends = [span.end for span in spans]
    return Difference(text, min(s.start for s in spans), None if None in ends else max(end for end in ends if end))
