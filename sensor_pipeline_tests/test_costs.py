"""What must not grow, counted and not timed: calls for a message, statements and bytes for a batch, connections."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from types import FrameType
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import sqlalchemy as sa
from confluent_kafka import Consumer

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.drained import FrameBuilder, Records
from sensor_pipeline.failures import detect
from sensor_pipeline.fleet import Fleet
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.postgres import copy
from sensor_pipeline.publish import Publisher
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.test_any_history import Log, message

DECODER = MessageDecoder(timedelta(days=1), ZoneInfo("UTC"), 1_000_000)
# What COPY takes of a row beside its values: 31 or 39 bytes of columns, their lengths and number.
MOST_BYTES_BESIDE_VALUES = 80


def messages(number: int) -> list[bytes]:
    fleet = Fleet(machines=50, failure_rate=0.02, start=datetime.now(UTC), rate=1_000)
    return [reading.message for reading in islice(fleet.readings(), number)]


@contextmanager
def counting_calls() -> Iterator[Counter[str]]:
    """Calls of Python functions, and of C functions by Python code."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        calls[event] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def calls_to_decode(values: list[bytes]) -> float:
    """For each message."""
    with counting_calls() as calls:
        decoded = DECODER.decode(values, np.full(len(values), -1))
    assert len(decoded.index) == len(values)
    return (calls["call"] + calls["c_call"]) / len(values)


def test_decoding_a_plain_message_costs_no_call_of_its_own() -> None:
    assert calls_to_decode(messages(2_000)) < 1.5


def test_messages_that_are_not_plain_cost_the_others_nothing() -> None:
    """One in a hundred has an escape."""
    values = messages(2_000)
    for at in range(0, len(values), 100):
        values[at] = values[at].replace(b'"Sensor 1"', b'"Sensor \\u00b0"')
    assert calls_to_decode(values) < 2.5


def test_detecting_failures_takes_as_many_calls_for_many_readings_as_for_few() -> None:
    calls = {}
    for number in (2_000, 20_000):
        values = messages(number)
        builder = FrameBuilder()
        offsets = np.arange(number)
        records = Records(
            offsets.astype(np.int32) % 4, offsets // 4, np.full(number, -1), list(values), lambda at: (None, ())
        )
        builder.add(records, DECODER.decode(values, records.timestamp_ms))
        frame = builder.frame()
        with counting_calls() as counted:
            detect(frame)
        calls[number] = counted["call"] + counted["c_call"]
    assert calls[20_000] <= 1.05 * calls[2_000]


class Spent:
    """What a batch cost beside time."""

    def __init__(self) -> None:
        self.statements = 0
        self.copied_bytes = 0
        self.connections = 0
        self.consumers = 0


@pytest.fixture
def cost_of(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[[Pipeline, Batch], Spent]:
    spent = Spent()

    def read(stream: copy._Stream, size: int) -> bytes:
        chunk = next(stream._chunks, b"")
        spent.copied_bytes += len(chunk)
        return chunk

    class CountedConsumer(Consumer):
        def __init__(self, properties: dict[str, object]) -> None:
            spent.consumers += 1
            super().__init__(properties)

    monkeypatch.setattr(copy._Stream, "read", read)
    monkeypatch.setattr("sensor_pipeline.kafka.connection.Consumer", CountedConsumer)

    def run(pipeline: Pipeline, batch: Batch) -> Spent:
        nonlocal spent
        spent = Spent()
        engine = pipeline.database._engine

        def statement(*_: object) -> None:
            spent.statements += 1

        def connection(*_: object) -> None:
            spent.connections += 1

        sa.event.listen(engine, "before_cursor_execute", statement)
        sa.event.listen(engine, "connect", connection)
        try:
            pipeline.run(batch)
        finally:
            sa.event.remove(engine, "before_cursor_execute", statement)
            sa.event.remove(engine, "connect", connection)
        return spent

    return run


def test_a_batch_takes_as_many_statements_and_connections_for_many_readings_as_for_few(
    settings: Settings, cost_of: Callable[[Pipeline, Batch], Spent]
) -> None:
    name = settings.kafka_topics[0]
    values = messages(12_000)
    with Publisher(settings, name) as publisher:
        for value in values:
            publisher.send(value)
    pipeline = Pipeline(settings)
    topic_id = pipeline.kafka.topic(name).kafka_topic_id

    def batch(start: int, end: int) -> Batch:
        return Batch(name, topic_id, tuple(OffsetRange(p, start // 4, end // 4) for p in range(4)))

    cost_of(pipeline, batch(0, 2_000))  # makes the machines and the day
    small = cost_of(pipeline, batch(2_000, 4_000))
    large = cost_of(pipeline, batch(4_000, 12_000))

    assert max(small.statements, large.statements) <= 40
    # One more or less where a batch starts or ends no failure.
    assert abs(small.statements - large.statements) <= 3
    assert large.connections <= 5
    assert large.consumers <= 3
    beside = large.copied_bytes - sum(len(_values_of(value)) for value in values[4_000:])
    assert beside / 8_000 < MOST_BYTES_BESIDE_VALUES


def test_a_batch_of_many_machines_sends_its_arrays_whole_and_updates_the_machines_on_their_pages(
    database_settings: Settings,
) -> None:
    """A list would be parsed element by element, and a row that moves to another page is written to each index."""
    machines, batches = 500, 8
    log = Log(database_settings, "readings", "readings-id")
    longest = 0

    def note(connection: object, cursor: object, statement: str, arguments: dict[str, object], *_: object) -> None:
        nonlocal longest
        longest = max([longest, *(len(value) for value in arguments.values() if isinstance(value, list))])

    def index_bytes() -> list[int]:
        with log.pipeline.database.begin() as connection:
            found = connection.exec_driver_sql(
                "SELECT pg_relation_size(indexrelid) FROM pg_index WHERE indrelid = 'machines'::regclass"
            )
            return list(found.scalars())

    def ingest(second: int) -> None:
        for machine in range(machines):
            log.publish(0, message(f"m{machine}", second, failing=second % 2 == 1))
        log.ingest([OffsetRange(0, second * machines, (second + 1) * machines)])

    ingest(0)
    before = index_bytes()
    sa.event.listen(log.pipeline.database._engine, "before_cursor_execute", note)
    for second in range(1, batches):
        ingest(second)
    assert len(before) == 2
    assert index_bytes() == before
    assert longest < machines / 10


def test_notices_take_a_batch_one_statement_and_only_where_there_are_some(database_settings: Settings) -> None:
    log = Log(database_settings, "readings", "readings-id")
    said: list[str] = []
    sa.event.listen(log.pipeline.database._engine, "before_cursor_execute", lambda *event: said.append(event[2]))

    def statements(first: int, failing: bool) -> int:
        """Of a batch of 300 machines with four readings each; of them, those that speak of notices."""
        start = len(log.partitions.get(0, []))
        for second in range(first, first + 4):
            for machine in range(300):
                log.publish(0, message(f"m{machine}", second, failing and second % 2 == 0))
        said.clear()
        log.ingest([OffsetRange(0, start, start + 1_200)])
        return sum("notices" in statement for statement in said)

    assert statements(0, failing=False) == 0
    assert statements(4, failing=True) == 1
    assert statements(8, failing=False) == 0
    with log.pipeline.database.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM notices").scalar_one() == 300 * 4


def _values_of(message: bytes) -> bytes:
    """The innermost object."""
    return message[message.rindex(b"{") : message.index(b"}") + 1]
