"""What must be in PostgreSQL, from what was published and nothing else: slow, naive, and not the pipeline's code.

The oracle replays every reading of a machine in event-time order. Of the package it uses only the settings that say
where the database is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from sensor_pipeline.settings import Settings


@dataclass(frozen=True)
class Published:
    """A message as it lies in Kafka; `bad` is the reason for which it must be rejected."""

    topic: str
    kafka_topic_id: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None = None
    bad: str | None = None

    @property
    def place(self) -> tuple[str, int, int]:
        return (self.kafka_topic_id, self.partition, self.offset)


@dataclass(frozen=True)
class Rows:
    """The rows, ids apart, in a form that compares."""

    machines: dict[str, tuple[datetime, datetime]]
    failures: dict[tuple[str, datetime, tuple[Any, ...]], tuple[datetime | None, frozenset[tuple[str, int, int]]]]
    readings: dict[tuple[str, int, int], tuple[str, datetime, bool, Any]]
    rejected: dict[tuple[str, int, int], tuple[str, bytes | None, bytes | None]]


def expected(published: Iterable[Published]) -> Rows:
    """The rows that these messages must become."""
    messages = list(published)
    readings = {}
    order: dict[str, list[tuple[Any, ...]]] = {}
    for message in messages:
        if message.bad:
            continue
        assert message.value is not None
        document = json.loads(message.value, parse_float=Decimal, parse_int=Decimal)
        moment = datetime.fromisoformat(document["timestamp"])
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        inner = document["readings"]
        failing = bool(inner.get("has_failure", False))
        machine = document["machine_id"]
        readings[message.place] = (machine, moment, failing, inner.get("readings", {}))
        key = (moment, message.topic, message.kafka_topic_id, message.partition, message.offset)
        order.setdefault(machine, []).append((*key, failing))
    machines, failures = {}, {}
    for machine, rows in order.items():
        rows.sort(key=lambda row: row[:5])
        machines[machine] = (rows[0][0], rows[-1][0])
        current: list[tuple[Any, ...]] = []
        for row in [*rows, None]:
            if row is not None and row[5]:
                current.append(row)
            elif current:
                first = current[0]
                places = frozenset((r[2], r[3], r[4]) for r in current)
                failures[(machine, first[0], first[1:5])] = (None if row is None else row[0], places)
                current = []
    rejected = {m.place: (m.bad, m.value, m.key) for m in messages if m.bad}
    return Rows(machines, failures, readings, rejected)  # type: ignore[arg-type]


def connect(settings: Settings) -> sa.Engine:
    """An engine of the tests' own."""
    url = sa.URL.create(
        "postgresql+psycopg2",
        settings.postgres_user,
        settings.postgres_password,
        settings.postgres_host,
        settings.postgres_port,
        settings.postgres_db,
    )
    return sa.create_engine(url, poolclass=sa.NullPool, connect_args={"options": "-c timezone=UTC"})


def stored(settings: Settings, machines: Iterable[str] | None = None) -> Rows:
    """The rows that are there (of some machines only, where given; then no rejected messages)."""
    wanted = None if machines is None else list(machines)
    where = "" if wanted is None else "WHERE m.machine_id = ANY (CAST(:wanted AS text[]))"
    arguments = {} if wanted is None else {"wanted": wanted}
    with connect(settings).connect() as connection:
        seen = connection.execute(
            sa.text(f"SELECT m.machine_id, first_seen, last_seen FROM machines m {where}"), arguments
        ).all()
        rows = connection.execute(
            sa.text(f"""
                SELECT t.name, t.kafka_topic_id, r.kafka_partition, r.kafka_offset, m.machine_id, r."timestamp",
                       r.has_failure, CAST(r."values" AS text), r.failure_id
                FROM readings r JOIN machines m ON m.id = r.machine_id JOIN topics t ON t.id = r.topic_id {where}
            """),
            arguments,
        ).all()
        episodes = connection.execute(
            sa.text(f"""
                SELECT f.id, m.machine_id, f.start_time, f.end_time, f.is_active, f.last_failing_time
                FROM failures f JOIN machines m ON m.id = f.machine_id {where}
            """),
            arguments,
        ).all()
        bad = []
        if wanted is None:
            bad = connection.execute(
                sa.text("""
                    SELECT t.kafka_topic_id, r.kafka_partition, r.kafka_offset, r.reason, r.payload, r.key
                    FROM rejected_messages r JOIN topics t ON t.id = r.topic_id
                """)
            ).all()
    readings = {}
    held: dict[int, list[tuple[Any, ...]]] = {}
    for topic, topic_id, partition, offset, machine, moment, failing, values, failure_id in rows:
        place = (topic_id, partition, offset)
        assert place not in readings, f"{place} is stored twice"
        readings[place] = (machine, moment, failing, json.loads(values, parse_float=Decimal, parse_int=Decimal))
        assert failing == (failure_id is not None)
        if failing:
            held.setdefault(failure_id, []).append((machine, moment, topic, *place))
    failures = {}
    for failure_id, machine, start, end, is_active, last in episodes:
        members = sorted(held.pop(failure_id), key=lambda row: row[1:])
        assert {row[0] for row in members} == {machine}
        assert is_active == (end is None)
        assert (start, last) == (members[0][1], members[-1][1])
        places = frozenset(row[3:] for row in members)
        failures[(machine, start, members[0][2:])] = (end, places)
    assert not held, f"readings of failures that are not there: {held}"
    return Rows(
        machines={row[0]: (row[1], row[2]) for row in seen},
        failures=failures,
        readings=readings,
        rejected={(t, p, o): (reason, bytes_of(payload), bytes_of(key)) for t, p, o, reason, payload, key in bad},
    )


def bytes_of(value: Any) -> bytes | None:
    return None if value is None else bytes(value)


def failure_ids(settings: Settings, machines: Iterable[str]) -> dict[int, frozenset[tuple[str, int, int]]]:
    """Each failure's id with the places of the readings it holds."""
    with connect(settings).connect() as connection:
        rows = connection.execute(
            sa.text("""
                SELECT r.failure_id, t.kafka_topic_id, r.kafka_partition, r.kafka_offset
                FROM readings r JOIN machines m ON m.id = r.machine_id JOIN topics t ON t.id = r.topic_id
                WHERE r.has_failure AND m.machine_id = ANY (CAST(:wanted AS text[]))
            """),
            {"wanted": list(machines)},
        ).all()
    held: dict[int, set[tuple[str, int, int]]] = {}
    for failure_id, *place in rows:
        held.setdefault(failure_id, set()).add(tuple(place))
    return {failure_id: frozenset(places) for failure_id, places in held.items()}
