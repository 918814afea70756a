"""Old days are dropped, and for all that comes after it is as if they were still there."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline.drained import Drained, FrameBuilder, Records
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.postgres import days
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.recompute import Recompute
from sensor_pipeline.postgres.rejected_search import Filter
from sensor_pipeline.postgres.transaction import Origin, Written
from sensor_pipeline.postgres.verify import CHECKS, SNAPSHOT, ask, find_machines, look
from sensor_pipeline.replay import Replay
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import query
from sensor_pipeline_tests.oracle import Published, connect, expected
from sensor_pipeline_tests.postgres.tables import dated, other_session, sessions, until
from sensor_pipeline_tests.soak import amount
from sensor_pipeline_tests.test_any_history import Log

TODAY = datetime.now(UTC).date()
# Of an example's days; the next example's come after them, as the horizon only moves forward.
DAYS = 12
_numbers = itertools.count(1)


class OldLog(Log):
    """A log whose drain knows from when on readings are kept; where it raced with a drop, it does not."""

    def __init__(self, settings: Settings, topic: str, topic_id: str) -> None:
        super().__init__(settings, topic, topic_id)
        self.pipeline.kafka = _Memory(self)  # type: ignore[assignment]

    def ingest_knowing(self, ranges: list[OffsetRange]) -> Written:
        with self.pipeline.database.begin() as connection:
            kept_from = days.look_kept_from(connection)
        builder = FrameBuilder()
        for records in self.records(ranges):
            builder.add(records, self._decoder.decode(records.value, records.timestamp_ms, kept_from))
        drained = Drained(builder.frame(), tuple(builder.rejected), ())
        batch = Batch(self.topic, self.topic_id, tuple(ranges))
        return self.pipeline.write(batch, drained, self.pipeline.detect(drained), Origin(datetime.now(UTC)))


class _Memory:
    """Where refused messages are read again."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def drain(self, batch: Batch, ranges: list[OffsetRange]) -> Iterator[Records]:
        return self._log.records(ranges)


def midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def moment_of(published: Published) -> datetime:
    assert published.value is not None
    return datetime.fromisoformat(json.loads(published.value)["timestamp"])


def drop(database: Database, before: date) -> days.Dropped:
    return days.drop_readings(database, before, 60)


def wrong_with(database: Database, names: Sequence[str] = ()) -> list[Any]:
    """All that `verify` finds."""
    with database.begin() as connection:
        connection.execute(SNAPSHOT)
        said = [answer for check in CHECKS if (answer := ask(connection, check)).wrong]
        return said + [found for m in find_machines(connection, names) if (found := look(connection, m)) != ([], None)]


@pytest.fixture(scope="module")
def shared_settings(postgres: Settings, administer: Any) -> Settings:
    """One database for all examples: each has machines and days of its own."""
    administer(f"CREATE DATABASE kept_readings TEMPLATE {postgres.postgres_db}")
    return replace(postgres, postgres_db="kept_readings")


@pytest.mark.soak
@hypothesis_settings(
    max_examples=amount(8, 400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(random=st.randoms(use_true_random=True))
def test_failures_are_those_of_all_readings_that_were_ever_taken(shared_settings: Settings, random: Random) -> None:
    number = next(_numbers)
    first = TODAY + timedelta(days=number * (DAYS + 1))
    database = Database(shared_settings)
    drop(database, first)
    log = OldLog(shared_settings, f"kept-{number}", f"kept-{number}")
    machines = [f"kept{number}-{i}" for i in range(2)]
    failing = random.choice([0.3, 0.6, 0.9])
    # Quarters of a day, so that many lie on a border of days or on one another.
    for at in range(random.randrange(5, 60)):
        quarter = at * 4 * DAYS // 60 - (random.randrange(4 * DAYS) if random.random() < 0.4 else 0)
        moment = midnight(first) + timedelta(hours=6 * max(quarter, 0))
        log.publish(random.randrange(2), dated(random.choice(machines), moment, random.random() < failing))
    taken: list[Published] = []
    kept_from = first
    todo = dict.fromkeys(log.partitions, 0)
    while left := [p for p in todo if todo[p] < len(log.partitions[p])]:
        if random.random() < 0.3:
            kept_from = min(kept_from + timedelta(days=random.randrange(4)), first + timedelta(days=DAYS))
            note(f"drop before {kept_from}")
            ids = failure_ids_of(shared_settings, machines)
            drop(database, kept_from)
            assert failure_ids_of(shared_settings, machines) == ids
        else:
            partition = random.choice(left)
            start = todo[partition]
            end = min(start + random.randrange(1, 20), len(log.partitions[partition]))
            note(f"ingest {partition} [{start}, {end})")
            ingest = log.ingest_knowing if random.random() < 0.7 else log.ingest
            written = ingest([OffsetRange(partition, start, end)])
            todo[partition] = end
            new = log.partitions[partition][start:end]
            old = [m for m in new if moment_of(m) < midnight(kept_from)]
            assert written.rejected_by_reason == ({"timestamp_too_old": len(old)} if old else {})
            taken += [m for m in new if m not in old]
        check(shared_settings, machines, taken, kept_from)
    seen = sorted(expected(taken).machines)
    assert not wrong_with(database, seen)
    recompute = Recompute(database, seen)
    assert [mended for _, mended in recompute.run() if mended] == []


def failure_ids_of(settings: Settings, machines: list[str]) -> list[Any]:
    statement = """
        SELECT f.id, f.machine_id, start_time FROM failures f JOIN machines m ON m.id = f.machine_id
        WHERE m.machine_id = ANY (:machines) ORDER BY 1
    """
    with connect(settings).connect() as connection:
        return list(connection.execute(sa.text(statement), {"machines": machines}).all())


def check(settings: Settings, machines: list[str], taken: list[Published], kept_from: date) -> None:
    """The failures are the oracle's of all that was ever taken, the readings what of these must be there."""
    want = expected(taken)
    statement = """
        SELECT m.machine_id, start_time, last_failing_time, end_time FROM failures f
        JOIN machines m ON m.id = f.machine_id WHERE m.machine_id = ANY (:machines) ORDER BY 1, 2, 4
    """
    with connect(settings).connect() as connection:
        got = [tuple(row) for row in connection.execute(sa.text(statement), {"machines": machines})]
        seen = connection.execute(
            sa.text("SELECT machine_id, first_seen, last_seen FROM machines WHERE machine_id = ANY (:machines)"),
            {"machines": machines},
        ).all()
        held = connection.execute(
            sa.text("""
                SELECT t.kafka_topic_id, kafka_partition, kafka_offset FROM readings r JOIN topics t ON t.id = topic_id
                JOIN machines m ON m.id = r.machine_id WHERE m.machine_id = ANY (:machines)
            """),
            {"machines": machines},
        ).all()
    border = midnight(kept_from)
    wanted, kept = [], set()
    for (machine, start, _), (end, places) in want.failures.items():
        moments = {place: want.readings[place][1] for place in places}
        wanted.append((machine, start, max(moments.values()), end))
        before = {place: moment for place, moment in moments.items() if moment < border}
        if before and (end is None or end >= border):
            edges = {start, max(before.values())}
            kept |= {place for place, moment in before.items() if moment in edges}
    kept |= {place for place, reading in want.readings.items() if reading[1] >= border}
    assert got == sorted(wanted, key=lambda f: (f[0], f[1], f[3] or datetime.max.replace(tzinfo=UTC)))
    assert {tuple(place) for place in held} == kept
    assert {row[0]: (row[1], row[2]) for row in seen} == want.machines


@pytest.fixture
def database(database_settings: Settings) -> Database:
    return Database(database_settings)


@pytest.fixture
def log(database_settings: Settings) -> OldLog:
    return OldLog(database_settings, "kept", "kept")


def publish(log: Log, *readings: tuple[float, bool]) -> None:
    """A machine's readings, each so many days after today began."""
    for day, failing in readings:
        log.publish(0, dated("m", midnight(TODAY) + timedelta(days=day), failing))


def ingest_all(log: Log) -> Written:
    return log.ingest([OffsetRange(0, 0, len(log.partitions[0]))])


def failures(settings: Settings) -> list[tuple[float, float, float | None]]:
    """Start, last failing reading and end, in days after today began."""

    def day(moment: datetime | None) -> Any:
        return None if moment is None else (moment - midnight(TODAY)) / timedelta(days=1)

    rows = query(settings, "SELECT start_time, last_failing_time, end_time FROM failures ORDER BY 1, 3")
    return [(day(start), day(last), day(end)) for start, last, end in rows]


def days_there(settings: Settings) -> list[str]:
    return [
        name
        for (name,) in query(
            settings,
            """SELECT child.relname FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
               WHERE inhparent = 'readings'::regclass ORDER BY 1""",
        )
    ]


def test_whole_days_go_and_no_other(database_settings: Settings, database: Database, log: OldLog) -> None:
    publish(log, (-400, False), (0, False), (1.5, False), (3, False))
    ingest_all(log)
    assert drop(database, TODAY - timedelta(days=1)) == days.Dropped(0, None)
    assert drop(database, TODAY) == days.Dropped(1, TODAY)
    assert drop(database, TODAY) == days.Dropped(0, TODAY)
    assert drop(database, TODAY + timedelta(days=2)) == days.Dropped(2, TODAY + timedelta(days=2))
    third = (TODAY + timedelta(days=3)).isoformat().replace("-", "")
    assert days_there(database_settings) == [f"readings_{third}", "readings_before_horizon"]
    assert drop(database, TODAY + timedelta(days=1)).readings == 0
    assert not wrong_with(database)


def test_a_failure_that_reaches_into_what_is_kept_goes_on_ends_and_is_split_there(
    database_settings: Settings, database: Database, log: OldLog
) -> None:
    publish(log, (0, True), (1, True), (2.5, True), (3.5, True))
    ingest_all(log)
    assert drop(database, TODAY + timedelta(days=3)).readings == 1
    assert failures(database_settings) == [(0, 3.5, None)]
    publish(log, (4, False), (3, False))
    ingest_all(log)
    assert failures(database_settings) == [(0, 2.5, 3), (3.5, 3.5, 4)]
    assert not wrong_with(database)


def test_an_older_reading_is_rejected_whole_and_again_when_it_is_replayed(
    database_settings: Settings, database: Database, log: OldLog
) -> None:
    publish(log, (0, True), (2, False))
    ingest_all(log)
    drop(database, TODAY + timedelta(days=2))
    publish(log, (1, False), (3, True))
    assert ingest_all(log).rejected_by_reason == {"timestamp_too_old": 1}
    ((reason, detail, payload),) = query(database_settings, "SELECT reason, detail, payload FROM rejected_messages")
    assert reason == "timestamp_too_old"
    assert "READINGS_KEPT_DAYS" in detail
    assert bytes(payload) == log.partitions[0][2].value
    assert failures(database_settings) == [(0, 0, 2), (3, 3, None)]

    outcome = Replay(database_settings, Filter()).run(lambda _: None)
    assert outcome.bad_again == {"timestamp_too_old": 1}
    assert not wrong_with(database)


def test_recompute_mends_above_and_leaves_what_was_dropped(
    database_settings: Settings, database: Database, log: OldLog
) -> None:
    publish(log, (0, True), (0.5, False), (1, True), (3, True), (4, False), (5, True), (6, False))
    ingest_all(log)
    drop(database, TODAY + timedelta(days=3))
    right = failures(database_settings)
    assert right == [(0, 0, 0.5), (1, 3, 4), (5, 5, 6)]
    with database.begin() as connection:
        statement = "UPDATE failures SET end_time = end_time + interval '1 h' WHERE end_time > :kept_from"
        connection.execute(sa.text(statement), {"kept_from": TODAY + timedelta(days=3)})
        connection.execute(sa.text("UPDATE machines SET last_seen = last_seen - interval '1 hour'"))
    assert wrong_with(database)
    assert [mended is not None for _, mended in Recompute(database).run()] == [True]
    assert failures(database_settings) == right
    assert not wrong_with(database)


def test_a_drop_that_was_cut_off_is_finished_by_the_next(
    database_settings: Settings, database: Database, log: OldLog, monkeypatch: Any
) -> None:
    publish(log, (0, True), (0.5, False), (1, True), (1.5, False), (2, False))
    ingest_all(log)
    failures_before = failures(database_settings)
    drop(database, TODAY)
    monkeypatch.setattr(days, "_DROP", sa.text("SELECT 1 / 0"))
    with pytest.raises(Exception, match="division by zero"):
        drop(database, TODAY + timedelta(days=2))
    monkeypatch.undo()
    # What is rejected from now on is still there.
    assert not wrong_with(database)
    assert [mended for _, mended in Recompute(database).run()] == [None]
    assert drop(database, TODAY + timedelta(days=2)) == days.Dropped(4, TODAY + timedelta(days=2))
    assert failures(database_settings) == failures_before
    assert not wrong_with(database)


def test_a_query_on_readings_makes_the_drop_give_up_and_lose_nothing(
    database_settings: Settings, database: Database, log: OldLog, monkeypatch: Any
) -> None:
    publish(log, (0, False), (1, False))
    ingest_all(log)
    monkeypatch.setattr(days, "_LOCK_TIMEOUT", sa.text("SET LOCAL lock_timeout = '100ms'"))
    with other_session(database_settings, "SELECT count(*) FROM readings"):
        with pytest.raises(UnavailableError, match="lock"):
            drop(database, TODAY + timedelta(days=1))
        assert len(days_there(database_settings)) == 3
    assert drop(database, TODAY + timedelta(days=1)).readings == 1
    assert not wrong_with(database)


def test_who_verifies_sees_all_of_a_drop_or_nothing_of_it(
    database_settings: Settings, database: Database, log: OldLog
) -> None:
    publish(log, (0, True), (1, True), (2, False))
    ingest_all(log)
    drop(database, TODAY)
    with database.begin() as connection:
        connection.execute(sa.text("SELECT keep_readings_from(:day)"), {"day": TODAY + timedelta(days=1)})
    found: list[Any] = []
    with connect(database_settings).begin() as dropping:
        dropping.execute(sa.text("LOCK TABLE readings IN ACCESS EXCLUSIVE MODE"))
        looking = threading.Thread(target=lambda: found.append(wrong_with(database)))
        looking.start()
        until(lambda: sessions(database_settings, waiting=True))
        dropping.execute(sa.text("SELECT drop_readings()"))
    looking.join(60)
    assert found == [[]]


def test_a_batch_that_is_being_written_is_waited_for_and_its_readings_are_dropped_too(
    database_settings: Settings, database: Database, log: OldLog
) -> None:
    publish(log, (0, False), (1, False))
    days.ensure_days(database, [TODAY, TODAY + timedelta(days=1)])
    results: list[Any] = []

    def work(action: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=lambda: results.append(action()))
        thread.start()
        return thread

    with other_session(database_settings, "LOCK TABLE machines IN EXCLUSIVE MODE"):
        writer = work(lambda: ingest_all(log))
        until(lambda: len(sessions(database_settings, waiting=True)) == 1)
        dropper = work(lambda: drop(database, TODAY + timedelta(days=1)))
        until(lambda: len(sessions(database_settings, waiting=True)) == 2)
        assert results == []
    for thread in (writer, dropper):
        thread.join(60)
    assert {type(result) for result in results} == {Written, days.Dropped}
    assert query(database_settings, "SELECT count(*) FROM readings") == [(1,)]
    assert query(database_settings, "SELECT readings FROM dropped_readings") == [(1,)]
    assert not wrong_with(database)
