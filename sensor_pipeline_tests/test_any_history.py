"""Whatever the order, batching and repetition in which readings arrive, the rows are the oracle's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.drained import Drained, FrameBuilder, Records
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.offsets import Batch, OffsetRange, subtract
from sensor_pipeline.postgres import ledger
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.transaction import Origin, Written
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published, expected, failure_ids, stored
from sensor_pipeline_tests.soak import amount

BASE = datetime(2026, 1, 31, 23, 59, 50, tzinfo=UTC)
_numbers = itertools.count(1)


class Log:
    """Partitions of a topic in memory, with what a drain of them gives: the write is what is under test here."""

    def __init__(self, settings: Settings, topic: str, topic_id: str) -> None:
        self.topic, self.topic_id = topic, topic_id
        self.pipeline = Pipeline(settings)
        self.partitions: dict[int, list[Published]] = {}
        self._decoder = MessageDecoder(settings.max_future, settings.naive_timestamp_tz, settings.max_message_bytes)
        with Database(settings).begin() as connection:
            ledger.add_topic(connection, topic, topic_id, {})

    def publish(self, partition: int, value: bytes | None, bad: str | None = None) -> None:
        log = self.partitions.setdefault(partition, [])
        log.append(Published(self.topic, self.topic_id, partition, len(log), value, bad=bad))

    def records(self, ranges: list[OffsetRange]) -> Iterator[Records]:
        for span in ranges:
            messages = self.partitions[span.partition][span.start : span.end]
            yield Records(
                partition=np.full(len(messages), span.partition, np.int32),
                offset=np.array([m.offset for m in messages], np.int64),
                timestamp_ms=np.full(len(messages), -1),
                value=[m.value for m in messages],
                key_and_headers=lambda at: (None, []),
            )

    def drain(self, ranges: list[OffsetRange]) -> Drained:
        builder = FrameBuilder()
        for records in self.records(ranges):
            builder.add(records, self._decoder.decode(records.value, records.timestamp_ms))
        return Drained(builder.frame(), tuple(builder.rejected), ())

    def ingest(self, ranges: list[OffsetRange]) -> Written:
        batch = Batch(self.topic, self.topic_id, tuple(ranges))
        drained = self.drain(list(batch.ranges))
        detected = self.pipeline.detect(drained)
        return self.pipeline.write(batch, drained, detected, Origin(datetime.now(UTC)))


def message(machine: str, second: int, failing: bool) -> bytes:
    moment = (BASE + timedelta(seconds=second)).replace(tzinfo=None)
    return json.dumps(
        {
            "machine_id": machine,
            "timestamp": moment.isoformat(),
            "readings": {"readings": {"Sensor 1": second / 8}, "has_failure": failing},
        }
    ).encode()


readings = st.tuples(
    st.integers(0, 2),  # machine
    st.one_of(st.integers(0, 6), st.integers(0, 40)),  # second: equal ones are frequent
    st.booleans(),
    st.integers(0, 2),  # partition
    st.integers(0, 9),  # 0: poison
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """Readings in order of publication, and batch borders with an order in which to run them."""
    published = draw(st.lists(readings, min_size=1, max_size=40))
    steps = draw(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 15), st.integers(1, 15)), min_size=1, max_size=12)
    )
    return published, steps


def check_ids(before: dict[int, frozenset[Any]], after: dict[int, frozenset[Any]], order: list[frozenset[Any]]) -> None:
    """The rule of design.md, by itself: in order of start, the smallest id not taken that shares a reading."""
    taken: set[int] = set()
    by_places = {places: failure_id for failure_id, places in after.items()}
    for places in order:
        candidates = sorted(i for i, held in before.items() if held & places and i not in taken)
        got = by_places[places]
        if candidates:
            assert got == candidates[0], f"failure of {sorted(places)} should have kept id {candidates[0]}, has {got}"
        else:
            assert got not in before
        taken.add(got)


@pytest.fixture(scope="module")
def shared_settings(postgres: Settings, administer: Any) -> Settings:
    """One database for all examples: each has topics and machines of its own."""
    administer(f"CREATE DATABASE any_history TEMPLATE {postgres.postgres_db}")
    return replace(postgres, postgres_db="any_history")


_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@pytest.mark.soak
@hypothesis_settings(max_examples=amount(60, 1_000), **_SETTINGS)
@given(history=histories(), two_topics=st.booleans())
def test_rows_equal_the_oracle_after_every_batch(
    shared_settings: Settings, history: tuple[list[Any], list[tuple[int, int, int]]], two_topics: bool
) -> None:
    check_history(shared_settings, *history, two_topics)


@pytest.mark.soak
@hypothesis_settings(max_examples=amount(100, 1_500), **_SETTINGS)
@given(random=st.randoms(use_true_random=True), two_topics=st.booleans())
def test_rows_equal_the_oracle_after_every_batch_of_a_long_history(
    shared_settings: Settings, random: Random, two_topics: bool
) -> None:
    """Dense histories: Hypothesis prefers small ones, in which few failures meet."""
    failing = random.choice([0.2, 0.5, 0.8])
    span = random.choice([8, 40, 400])
    published = []
    for at in range(random.randrange(10, 90)):
        # In order, with a tail of late ones.
        second = at * span // 90 - (random.randrange(span) if random.random() < 0.3 else 0)
        published.append((random.randrange(2), second, random.random() < failing, random.randrange(3), 1))
    steps = [(random.randrange(8), random.randrange(30), random.randrange(1, 25)) for _ in range(random.randrange(6))]
    check_history(shared_settings, published, steps, two_topics)


def check_history(
    shared_settings: Settings, published: list[Any], steps: list[tuple[int, int, int]], two_topics: bool
) -> None:
    """Publish and ingest step by step; after each the rows are the oracle's, and ids moved as the rule says."""
    number = next(_numbers)
    machines = [f"m{number}-{i}" for i in range(3)]
    # The second is the same topic, deleted and created again, with an id that sorts before the first's.
    logs = [Log(shared_settings, f"topic-{number}", f"{name}-{number}") for name in ("b", "a")][: 1 + two_topics]
    for at, (machine, second, failing, partition, poison) in enumerate(published):
        log = logs[at % len(logs)]
        if poison == 0:
            log.publish(partition, b"poison", bad="not_json")
        else:
            log.publish(partition, message(machines[machine], second, failing))
    done: dict[str, list[OffsetRange]] = {log.topic_id: [] for log in logs}
    runs: list[tuple[Log, list[OffsetRange]]] = []
    for partition, start, size in steps:
        log = logs[partition % len(logs)]
        length = len(log.partitions.get(partition % 3, []))
        if start < length:
            runs.append((log, [OffsetRange(partition % 3, start, min(start + size, length))]))
    # At last everything that is left, at once.
    runs += [(log, [OffsetRange(p, 0, len(ms)) for p, ms in log.partitions.items()]) for log in logs if log.partitions]
    for log, ranges in runs:
        before = failure_ids(shared_settings, machines)
        new = subtract(ranges, done[log.topic_id])
        note(f"ingest {log.topic_id} {[str(r) for r in ranges]}")
        written = log.ingest(ranges)
        done[log.topic_id] += new
        event(f"new offsets: {min(len(new), 1)}")
        assert written.already_ingested == sum(map(len, ranges)) - sum(map(len, new))
        ingested = [
            m
            for one in logs
            for span in done[one.topic_id]
            for m in one.partitions[span.partition][span.start : span.end]
        ]
        want = expected(ingested)
        got = stored(shared_settings, machines)
        assert got.failures == want.failures
        assert got.readings == want.readings
        assert got.machines == want.machines
        order = [places for _, (_, places) in sorted(want.failures.items())]
        check_ids(before, failure_ids(shared_settings, machines), order)
