"""Rejected messages, replayed: the rows are those of messages that had been in order from the start."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from threading import Barrier
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline import replay as replay_module
from sensor_pipeline.errors import ConfigurationError, ConservationError, DataError
from sensor_pipeline.offsets import OffsetRange, ranges_of, total
from sensor_pipeline.postgres import rejected_search
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.figures import read_figures
from sensor_pipeline.postgres.ledger import topics
from sensor_pipeline.postgres.rejected_search import Filter, pages
from sensor_pipeline.postgres.transaction import Origin
from sensor_pipeline.replay import Replay
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published, connect, expected, failure_ids, stored
from sensor_pipeline_tests.postgres.tables import (
    batch_of,
    dated,
    every_row,
    ingest_once,
    other_session,
    sessions,
    until,
    want,
)
from sensor_pipeline_tests.postgres.test_concurrency import STOPS, is_free, nobody_deadlocks
from sensor_pipeline_tests.rejecting import (
    TOO_LARGE,
    check_replayed,
    check_verified,
    mended,
    messages,
    publish_rejected,
    query,
    rejecting_history,
    replay,
    strict,
)
from sensor_pipeline_tests.soak import amount
from sensor_pipeline_tests.test_any_history import Log, check_ids, message

__all__ = ["nobody_deadlocks"]

_numbers = itertools.count(1)


def ingested(settings: Settings, **history: Any) -> Log:
    log = rejecting_history(settings, **history)
    ingest_once(settings, log)
    assert stored(settings) == want(log)
    return log


def rejected_first(log: Log, reason: str = TOO_LARGE) -> int:
    return sum(1 for m in messages(log) if m.bad == reason)


# After a setting was changed


def test_what_a_changed_setting_lets_in_becomes_the_oracles_rows_and_the_rest_stays(
    database_settings: Settings,
) -> None:
    log = ingested(database_settings)
    outcome = replay(database_settings)
    poison = rejected_first(log, "not_json")
    assert poison
    assert (outcome.readings, outcome.bad_again, outcome.gone) == (rejected_first(log), {"not_json": poison}, 0)
    assert outcome.looked_at == outcome.readings + poison
    check_replayed(database_settings, log)


def test_without_a_change_nothing_is_written(database_settings: Settings) -> None:
    log = ingested(database_settings)
    before = every_row(database_settings)
    outcome = replay(strict(database_settings))
    assert outcome.readings == 0
    assert outcome.bad_again == {TOO_LARGE: rejected_first(log), "not_json": rejected_first(log, "not_json")}
    assert all(len(samples) == replay_module.SAMPLES for samples in outcome.samples.values())
    assert every_row(database_settings) == before


def test_a_dry_run_says_what_would_become_of_them_and_writes_nothing(database_settings: Settings) -> None:
    log = ingested(database_settings)
    before = every_row(database_settings)
    outcome = replay(database_settings, dry_run=True)
    assert (outcome.readings, outcome.bad_again.total()) == (rejected_first(log), rejected_first(log, "not_json"))
    assert outcome.sentence(dry_run=True) == (
        f"{outcome.looked_at:,} rejected messages looked at; {outcome.readings:,} would become readings, "
        f"{outcome.bad_again.total():,} would be bad again"
    )
    assert every_row(database_settings) == before


def test_a_time_without_an_offset_is_read_in_the_zone_that_is_set_now(database_settings: Settings) -> None:
    """In Berlin, the first half hour of year 1 lies before it in UTC."""
    log = Log(replace(database_settings, naive_timestamp_tz=ZoneInfo("Europe/Berlin")), "t", "t-id")
    log.publish(0, dated("m", datetime(1, 1, 1, 0, 30), True), bad="timestamp_out_of_range")
    ingest_once(database_settings, log)
    assert stored(database_settings) == want(log)
    assert replay(database_settings).readings == 1
    assert stored(database_settings) == expected([replace(m, bad=None) for m in messages(log)])
    check_verified(database_settings)


def test_days_that_a_replay_needs_are_made(database_settings: Settings) -> None:
    log = Log(strict(database_settings), "t", "t-id")
    tomorrow = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    for day in range(5):
        publish_rejected(log, 0, dated("m", tomorrow + timedelta(days=day), day == 2))
    ingest_once(database_settings, log)
    assert replay(database_settings).readings == 5
    check_replayed(database_settings, log)


# The clock of the Kafka record


def of_time(settings: Settings, record_ms: int, moment: datetime) -> Log:
    """One message of this moment, in a record of that time, ingested."""
    log = Log(settings, "t", "t-id")
    log.publish(0, dated("m", moment.replace(tzinfo=None), True), bad="timestamp_in_future")
    decode = log._decoder.decode
    log._decoder.decode = lambda values, _: decode(values, np.full(len(values), record_ms))  # type: ignore[method-assign]
    drained = log.drain(list(batch_of(log).ranges))
    stamped = tuple(replace(m, timestamp_ms=record_ms) for m in drained.rejected)
    log.pipeline.write(
        batch_of(log),
        replace(drained, rejected=stamped),
        log.pipeline.detect(drained),
        Origin(datetime.now(UTC)),
    )
    assert stored(settings) == want(log)
    return log


def test_max_future_is_measured_from_the_records_own_time(database_settings: Settings) -> None:
    record = datetime(2020, 1, 1, tzinfo=UTC)
    log = of_time(database_settings, int(record.timestamp() * 1000), record + timedelta(days=3))
    # From now on, years later, it would not lie ahead.
    assert replay(database_settings).bad_again == {"timestamp_in_future": 1}
    almost = timedelta(days=3) - timedelta(milliseconds=1)
    assert replay(replace(database_settings, max_future=almost)).readings == 0
    assert replay(replace(database_settings, max_future=timedelta(days=3))).readings == 1
    assert stored(database_settings) == expected([replace(m, bad=None) for m in messages(log)])
    check_verified(database_settings)


def test_where_the_records_time_was_not_kept_it_is_measured_from_when_the_message_was_rejected(
    database_settings: Settings,
) -> None:
    record = datetime(2020, 1, 1, tzinfo=UTC)
    of_time(database_settings, int(record.timestamp() * 1000), record + timedelta(days=30))
    with connect(database_settings).begin() as connection:
        older = "UPDATE rejected_messages SET kafka_timestamp_ms = NULL, first_seen = '2020-01-05 00:00:00+00'"
        connection.execute(sa.text(older))
    assert replay(replace(database_settings, max_future=timedelta(days=25))).readings == 0
    assert replay(replace(database_settings, max_future=timedelta(days=26))).readings == 1


# Twice


def test_replayed_twice_it_is_one_reading(database_settings: Settings) -> None:
    log = ingested(database_settings)
    replay(database_settings)
    before = every_row(database_settings)
    assert replay(database_settings).readings == 0
    assert every_row(database_settings) == before
    check_replayed(database_settings, log)


@pytest.mark.parametrize("stop", STOPS)
def test_of_two_replays_at_once_one_makes_the_readings_and_the_other_finds_them_gone(
    database_settings: Settings, stop: str
) -> None:
    log = ingested(database_settings)
    poison = rejected_first(log, "not_json")
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS[stop]):
            runs = [pool.submit(replay, database_settings) for _ in range(2)]
            until(lambda: len(sessions(database_settings, waiting=True)) == 2)
        first, second = sorted((run.result() for run in runs), key=lambda outcome: outcome.gone)
    assert (first.readings, first.gone) == (rejected_first(log), 0)
    assert (second.readings, second.gone) == (0, rejected_first(log))
    assert "were gone, as another replay took them meanwhile" in second.sentence(dry_run=False)
    assert first.bad_again == second.bad_again == {"not_json": poison}
    assert (len(first.batches), len(second.batches)) == (1, 0)
    check_replayed(database_settings, log)


# Bad again


def test_what_is_bad_again_keeps_its_first_record(database_settings: Settings) -> None:
    log = Log(strict(database_settings), "t", "t-id")
    log.publish(0, b"\xff" * 300, bad=TOO_LARGE)
    ingest_once(database_settings, log)
    before = every_row(database_settings)
    outcome = replay(database_settings)
    # Today it would be rejected for another reason.
    assert outcome.bad_again == {"not_utf8": 1}
    (sample,) = outcome.samples["not_utf8"]
    assert (sample.topic, sample.partition, sample.offset) == ("t", 0, 0)
    assert every_row(database_settings) == before


def test_what_the_database_refuses_stays_rejected_and_takes_no_other_with_it(database_settings: Settings) -> None:
    log = ingested(database_settings)
    hot = Log(strict(database_settings), "hot", "hot-id")
    for second in range(20):
        publish_rejected(hot, second % 2, message(f"m{second % 3}", second, second % 4 == 0))
    ingest_once(database_settings, hot)
    records = {row for row in every_row(database_settings)["rejected_messages"] if row[2].startswith("(2,")}
    assert len(records) == 20
    limit = (
        """ALTER TABLE readings ADD CONSTRAINT cool CHECK (topic_id = 1 OR ("values" ->> 'Sensor 1')::numeric < 2)"""
    )
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text(limit))
    outcome = replay(database_settings)
    assert outcome.bad_again["refused_by_database"] == 4
    assert "cool" in outcome.samples["refused_by_database"][0].detail
    assert outcome.readings == rejected_first(log) + 16
    left = {row for row in every_row(database_settings)["rejected_messages"] if row[2].startswith("(2,")}
    assert len(left) == 4
    assert left < records
    check_verified(database_settings)
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text("ALTER TABLE readings DROP CONSTRAINT cool"))
    assert replay(database_settings).readings == 4
    check_replayed(database_settings, log, hot)


def test_a_machine_that_the_database_refuses_stays_rejected(database_settings: Settings) -> None:
    log = ingested(database_settings)
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text("ALTER TABLE machines ADD CONSTRAINT known CHECK (machine_id <> 'm-new') NOT VALID"))
    outcome = replay(database_settings)
    assert (outcome.bad_again["refused_by_database"], outcome.readings) == (1, rejected_first(log) - 1)
    check_verified(database_settings)


# Failures


@pytest.mark.parametrize(
    ("order", "rejected", "failures"),
    [
        pytest.param("..##..", {2, 3}, 1, id="starts one"),
        pytest.param("..#..#", {5}, 2, id="starts one that is active"),
        pytest.param("..###.", {4}, 1, id="extends one"),
        pytest.param(".####.", {2}, 1, id="joins nothing that was apart"),
        pytest.param(".##.##.", {3}, 2, id="splits one"),
        pytest.param(".##.", {3}, 1, id="ends one"),
        pytest.param("#.#.#.", {1, 3}, 3, id="splits one twice"),
    ],
)
def test_a_replayed_reading_does_to_failures_what_it_would_have_done_in_its_time(
    database_settings: Settings, order: str, rejected: set[int], failures: int
) -> None:
    log = Log(strict(database_settings), "t", "t-id")
    for second, mark in enumerate(order):
        if second in rejected:
            publish_rejected(log, 0, message("m", second, mark == "#"))
        else:
            log.publish(0, message("m", second, mark == "#"))
    ingest_once(database_settings, log)
    assert replay(database_settings).readings == len(rejected)
    check_replayed(database_settings, log)
    assert len(stored(database_settings).failures) == failures


def test_of_readings_at_one_time_a_replayed_one_has_its_place_by_topic_partition_and_offset(
    database_settings: Settings,
) -> None:
    early, late = (Log(strict(database_settings), name, f"{name}-id") for name in ("a", "c"))
    other = Log(strict(database_settings), "b", "b-id")
    for second, mark in enumerate(".##.##."):
        other.publish(0, message("m", second, mark == "#"))
    # Before the healthy reading at the same time, after it, and one of each where it failed.
    publish_rejected(early, 0, message("m", 3, True))
    publish_rejected(late, 0, message("m", 6, True))
    for log in (early, late):
        publish_rejected(log, 1, message("m", 2, False))
        publish_rejected(log, 1, message("m", 2, True))
    for log in (other, late, early):
        ingest_once(database_settings, log)
    for log in (late, early):
        before = failure_ids(database_settings, ["m"])
        assert replay(database_settings, Filter(topics=[log.topic])).readings == 3
        told = [*messages(other), *mended(messages(late)), *messages(early)]
        told = mended(told) if log is early else told
        assert stored(database_settings) == expected(told)
        order = [places for _, (_, places) in sorted(expected(told).failures.items())]
        check_ids(before, failure_ids(database_settings, ["m"]), order)
    check_verified(database_settings)


steps = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 15), st.integers(1, 15)), min_size=1, max_size=12)


@pytest.mark.soak
@hypothesis_settings(
    max_examples=amount(15, 1_000),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(random=st.randoms(use_true_random=True), steps=steps)
def test_a_random_part_of_a_random_history_rejected_first_ends_in_the_oracles_rows(
    shared_settings: Settings, random: Random, steps: list[tuple[int, int, int]]
) -> None:
    """Batches and replays in any order, of two topics; after each the rows are the oracle's, ids follow the rule."""
    number = next(_numbers)
    machines = [f"r{number}-{i}" for i in range(2)]
    # The one that is first in order of name became known last.
    logs = [Log(strict(shared_settings), f"{name}-{number}", f"{number}-{name}") for name in ("b", "a")]
    publish_random(random, machines, logs)
    told = Told(shared_settings)
    runs: list[Callable[[], None]] = []
    for kind, start, size in steps:
        log, partition = logs[kind % 2], kind % 3
        end = min(start + size, len(log.partitions.get(partition, [])))
        if kind > 6:
            runs.append(partial(told.replay, log))
        elif start < end:
            runs.append(partial(told.ingest, log, [OffsetRange(partition, start, end)]))
    runs += [partial(told.ingest, log, list(batch_of(log).ranges)) for log in logs if log.partitions]
    runs += [partial(told.replay, log) for log in logs]
    one_part = random.random() < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_module, "_MESSAGES_A_PART", 1_000 if one_part else random.randrange(1, 5))
        for run in runs:
            before = failure_ids(shared_settings, machines)
            run()
            wanted, got = expected(told.messages.values()), stored(shared_settings, machines)
            assert got.failures == wanted.failures
            assert got.readings == wanted.readings
            assert got.machines == wanted.machines
            if one_part:
                order = [places for _, (_, places) in sorted(wanted.failures.items())]
                check_ids(before, failure_ids(shared_settings, machines), order)
    assert not [m for m in told.messages.values() if m.bad]
    check_verified(shared_settings, got.machines)


class Told:
    """Ingests and replays, and remembers what the oracle has to know."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.messages: dict[tuple[str, int, int], Published] = {}

    def ingest(self, log: Log, ranges: list[OffsetRange]) -> None:
        note(f"ingest {log.topic} {[str(r) for r in ranges]}")
        log.ingest(ranges)
        for r in ranges:
            for m in log.partitions[r.partition][r.start : r.end]:
                self.messages.setdefault(m.place, m)

    def replay(self, log: Log) -> None:
        note(f"replay {log.topic}")
        held = [m for m in self.messages.values() if m.topic == log.topic and m.bad]
        assert replay(self._settings, Filter(topics=[log.topic])).readings == len(held)
        self.messages |= {m.place: m for m in mended(held)}


def publish_random(random: Random, machines: list[str], logs: list[Log]) -> None:
    """Dense histories with late readings, of which a random share is rejected first."""
    failing, span, share = random.choice([0.2, 0.5, 0.8]), random.choice([8, 40, 400]), random.choice([0.1, 0.4, 0.9])
    for at in range(random.randrange(5, 60)):
        second = at * span // 60 - (random.randrange(span) if random.random() < 0.3 else 0)
        value = message(random.choice(machines), second, random.random() < failing)
        if random.random() < share:
            publish_rejected(logs[at % 2], random.randrange(3), value)
        else:
            logs[at % 2].publish(random.randrange(3), value)


# Beside batches


@pytest.mark.parametrize("stop", ["lock of its machines", "failures", "batch log", "commit"])
@pytest.mark.parametrize("replay_first", [True, False])
def test_a_replay_and_a_batch_with_the_same_machines_see_what_the_other_left(
    database_settings: Settings, stop: str, replay_first: bool
) -> None:
    log = Log(strict(database_settings), "t", "t-id")
    for second in range(40):
        failing = second % 8 in (1, 2, 3, 6)
        if second % 2:
            publish_rejected(log, 0, message("m1", second, failing))
        else:
            log.publish(1, message("m1", second, failing))
    ingest_once(database_settings, log, OffsetRange(0, 0, 20), OffsetRange(1, 0, 5))
    works: list[Callable[[], object]] = [
        lambda: replay(database_settings),
        lambda: ingest_once(database_settings, log, OffsetRange(1, 0, 20)),
    ]
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS[stop]):
            runs = []
            for waiting, work in enumerate(works if replay_first else works[::-1], 1):
                runs.append(pool.submit(work))
                until(lambda waiting=waiting: len(sessions(database_settings, waiting=True)) == waiting)
        for run in runs:
            run.result()
    check_replayed(database_settings, log)


def test_replays_among_random_batches_in_six_threads_end_in_the_rows_of_the_oracle(
    database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(5)
    log = rejecting_history(database_settings, readings=500)
    monkeypatch.setattr(replay_module, "_MESSAGES_A_PART", 7)
    batches = []
    for _ in range(40):
        partition = random.randrange(4)
        start = random.randrange(len(log.partitions[partition]))
        end = min(start + random.randrange(1, 60), len(log.partitions[partition]))
        batches.append(OffsetRange(partition, start, end))
    start_together = Barrier(6)

    def work(mine: list[OffsetRange] | None) -> int:
        start_together.wait()
        if mine is None:
            return sum(replay(database_settings).readings for _ in range(6))
        for span in mine:
            ingest_once(database_settings, log, span)
        return 0

    with ThreadPoolExecutor(6) as pool:
        replayed = sum(pool.map(work, [None, None, *(batches[n::4] for n in range(4))]))
    ingest_once(database_settings, log)
    replayed += replay(database_settings).readings
    assert replayed == rejected_first(log)
    check_replayed(database_settings, log)


@pytest.mark.parametrize("table", ["ingested_offsets", "rejected_messages"])
def test_the_ledgers_rows_are_locked_before_the_rejected_ones_and_both_in_order(
    database_settings: Settings, table: str
) -> None:
    log = ingested(database_settings)
    row = "SELECT FROM {} WHERE kafka_partition = {} FOR UPDATE"
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, row.format(table, 2)):
            run = pool.submit(replay, database_settings)
            until(lambda: sessions(database_settings, waiting=True))
            free = {
                name: [is_free(database_settings, row.format(name, p)) for p in range(4)]
                for name in ("ingested_offsets", "rejected_messages")
            }
        run.result()
    assert free[table] == [False, False, False, True]
    if table == "ingested_offsets":
        assert free["rejected_messages"] == [True] * 4
    else:
        assert free["ingested_offsets"] == [False] * 4
    check_replayed(database_settings, log)


# It must add up


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(
            "UPDATE ingested_offsets SET rejected = 1, readings = readings + rejected - 1",
            "the ledger counts fewer rejected messages than there are",
            id="the ledger counts fewer",
        ),
        pytest.param(
            "UPDATE ingested_offsets SET offsets = offsets - int8multirange(int8range(0, 1000))",
            r"partition 0:\d+-\d+ is rejected, but not in the ledger",
            id="the ledger does not know them",
        ),
        pytest.param(
            "CREATE FUNCTION keep_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
            "CREATE TRIGGER keep_it BEFORE DELETE ON rejected_messages FOR EACH ROW EXECUTE FUNCTION keep_it()",
            r"\d+ inserted, but 0 removed",
            id="a rejected row is not removed",
        ),
        pytest.param(
            "CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
            "CREATE TRIGGER drop_it BEFORE INSERT ON readings FOR EACH ROW WHEN (NEW.has_failure) "
            "EXECUTE FUNCTION drop_it()",
            r"\d+ inserted, but \d+ removed",
            id="a reading is dropped on its way",
        ),
    ],
)
def test_a_replay_that_does_not_add_up_writes_nothing(database_settings: Settings, damage: str, words: str) -> None:
    ingested(database_settings)
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text(damage))
    before = every_row(database_settings)
    with pytest.raises(ConservationError, match=words) as error:
        replay(database_settings)
    assert "`sensor-pipeline verify`" in str(error.value)
    assert "\n" not in str(error.value)
    assert every_row(database_settings) == before


def test_the_batch_log_names_the_replayed_offsets_as_a_batch_of_its_kind(database_settings: Settings) -> None:
    log = ingested(database_settings)
    places = [(m.partition, m.offset) for m in messages(log) if m.bad == TOO_LARGE]
    outcome = Replay(database_settings, Filter(), dagster_run_id="a run").run(lambda _: None)
    kinds = query(database_settings, "SELECT kind, count(*) FROM batches GROUP BY kind ORDER BY kind")
    assert [tuple(row) for row in kinds] == [("ingest", 1), ("replay", 1)]
    (row,) = query(database_settings, "SELECT * FROM batches WHERE kind = 'replay'")
    assert [row.id] == outcome.batches
    assert [OffsetRange(**span) for span in row.ranges] == ranges_of(places)
    assert total(ranges_of(places)) == len(places) == row.inserted == row.drained
    assert (row.already_ingested, row.rejected, row.no_record) == (0, 0, 0)
    assert (row.failures_started, row.failures_ended) == (outcome.failures_started, outcome.failures_ended)
    assert row.dagster_run_id == "a run"
    with Database(database_settings).begin() as connection:
        assert [batch["kind"] for batch in read_figures(connection, 5).last_batches] == ["replay", "ingest"]
    assert row.timings["write"] > 0


# In parts


def test_parts_are_bounded_by_number_and_by_bytes_and_leave_none_out(
    database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(strict(database_settings), "t", "t-id")
    sizes = [300, 300, 300, 5_000, 300, 300, 90_000, 300]
    for size in sizes:
        log.publish(0, b"x" * size, bad=TOO_LARGE)
    log.publish(1, None, bad="tombstone")
    ingest_once(database_settings, log)
    database = Database(database_settings)
    with database.begin() as connection:
        (topic,) = topics(connection)

    def parts(most: int, most_bytes: int) -> list[list[int]]:
        found = pages(database, topic, Filter(), most, most_bytes)
        return [[0 if value is None else len(value) for value in page.value] for page in found]

    assert parts(100, 10**9) == [[*sizes, 0]]
    assert parts(4, 10**9) == [[300, 300, 300, 5_000], [300, 300, 90_000, 300], [0]]
    assert parts(100, 700) == [[300, 300], [300], [5_000], [300, 300], [90_000], [300, 0]]
    assert parts(1, 1) == [[size] for size in [*sizes, 0]]


def test_a_part_that_fails_leaves_those_before_it_done_and_the_next_replay_does_the_rest(
    database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ingested(database_settings)
    monkeypatch.setattr(replay_module, "_MESSAGES_A_PART", 10)
    stop = "ALTER TABLE batches ADD CONSTRAINT few CHECK (id < 4)"
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text(stop))
    with pytest.raises(DataError, match="few"):
        replay(database_settings)
    assert query(database_settings, "SELECT count(*) FROM batches")[0][0] == 3
    check_verified(database_settings)
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text("ALTER TABLE batches DROP CONSTRAINT few"))
    replay(database_settings)
    check_replayed(database_settings, log)


def test_what_is_rejected_while_a_replay_goes_on_is_left_to_the_next(
    database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one that follows a producer gone wrong would have no end."""
    log = Log(strict(database_settings), "t", "t-id")
    for second in range(10):
        publish_rejected(log, 0, message("m", second, False))
    ingest_once(database_settings, log, OffsetRange(0, 0, 4))
    monkeypatch.setattr(replay_module, "_MESSAGES_A_PART", 2)
    offsets = iter(range(4, 10))

    def more(_: int) -> None:
        at = next(offsets)
        ingest_once(database_settings, log, OffsetRange(0, at, at + 1))

    assert Replay(database_settings, Filter()).run(more).readings == 4
    ingest_once(database_settings, log)
    assert replay(database_settings).readings == 6
    check_replayed(database_settings, log)


def test_a_server_that_is_away_for_a_moment_is_waited_for(database_settings: Settings, administer: Any) -> None:
    log = ingested(database_settings)
    pauses: list[float] = []
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS["batch log"]):
            work = Replay(database_settings, Filter(), sleep=pauses.append)
            run = pool.submit(work.run, lambda _: None)
            (pid,) = until(lambda: sessions(database_settings, waiting=True))
            administer(f"SELECT pg_terminate_backend({pid})")
            until(lambda: pauses)
        assert run.result().readings == rejected_first(log)
    check_replayed(database_settings, log)


# Which ones


def test_only_messages_that_the_filter_wants_are_replayed(database_settings: Settings) -> None:
    logs = [Log(strict(database_settings), name, f"{name}-id") for name in ("a", "b")]
    for log in logs:
        for second in range(6):
            publish_rejected(log, second % 2, message("m", second, second == 3))
        ingest_once(database_settings, log)
    with connect(database_settings).begin() as connection:
        days = "UPDATE rejected_messages SET first_seen = timestamptz '2026-01-01Z' + kafka_offset * interval '1 day'"
        connection.execute(sa.text(days))
    second_day = datetime(2026, 1, 2, tzinfo=UTC)
    assert replay(database_settings, Filter(reasons=["not_json"])).looked_at == 0
    assert replay(database_settings, Filter(topics=["a"], since=second_day), dry_run=True).readings == 4
    assert replay(database_settings, Filter(since=second_day, until=second_day)).readings == 4
    assert replay(database_settings, Filter(topics=["b"], reasons=[TOO_LARGE, "not_json"])).readings == 4
    assert replay(database_settings, Filter(since=datetime.now(UTC) + timedelta(days=1))).looked_at == 0
    assert replay(database_settings).readings == 4
    check_replayed(database_settings, *logs)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Filter(reasons=["not_jsn"]), "there is no reason not_jsn; the reasons are tombstone, "),
        (Filter(topics=["c"]), "there is no topic c in the database; it has t"),
        (
            Filter(since=datetime(2026, 1, 2, tzinfo=UTC), until=datetime(2026, 1, 1, tzinfo=UTC)),
            r"since \(2026-01-02.*\) lies after until \(2026-01-01.*\); exchange them",
        ),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(database_settings: Settings, wanted: Filter, words: str) -> None:
    Log(database_settings, "t", "t-id")
    with pytest.raises(ConfigurationError, match=words):
        replay(database_settings, wanted)


def test_a_topic_that_was_deleted_and_created_again_is_replayed_as_two(database_settings: Settings) -> None:
    logs = [Log(strict(database_settings), "t", f"{name}-id") for name in ("b", "a")]
    for log in logs:
        for second in range(4):
            publish_rejected(log, 0, message("m", second, log is logs[0]))
        ingest_once(database_settings, log)
    assert replay(database_settings, Filter(topics=["t"])).readings == 8
    check_replayed(database_settings, *logs)
    with Database(database_settings).begin() as connection:
        assert rejected_search.count(connection, Filter()) == {}


def test_a_value_comes_back_equal_after_its_time_among_the_rejected(database_settings: Settings) -> None:
    values = {"a": 0.1, "b": -0.0, "c": 1e300, "d": '\u00e9 " \\', "e": None, "f": True}
    log = Log(strict(database_settings), "t", "t-id")
    document = {"machine_id": "m \u00b0", "timestamp": "2026-01-01T00:00:00", "readings": {"readings": values}}
    publish_rejected(log, 0, json.dumps(document).encode())
    ingest_once(database_settings, log)
    assert replay(database_settings).readings == 1
    check_replayed(database_settings, log)
