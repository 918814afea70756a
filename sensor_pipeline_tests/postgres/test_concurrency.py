"""Batches that meet: the rows are those of one after the other, nobody deadlocks, and the killed leave no trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from threading import Barrier, Event
from typing import Any

import pytest
import sqlalchemy as sa

from sensor_pipeline import batch as batch_module
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.postgres import ledger
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect, stored
from sensor_pipeline_tests.postgres.tables import (
    batch_of,
    busy_history,
    dated,
    every_row,
    first_half,
    ingest_once,
    other_session,
    sessions,
    until,
    want,
)
from sensor_pipeline_tests.test_any_history import Log, message

ROOT = Path(__file__).parents[2]

# Where a batch comes to a stop, in its own order, and what another session does for that.
STOPS = {
    "ledger": "LOCK TABLE ingested_offsets IN SHARE MODE",
    "new machines": "LOCK TABLE machines IN SHARE MODE",
    "healthy readings": "LOCK TABLE readings IN SHARE MODE",
    "lock of its machines": "SELECT FROM machines WHERE machine_id = 'm1' FOR UPDATE",
    "failures": "LOCK TABLE failures IN SHARE MODE",
    "rejected messages": "LOCK TABLE rejected_messages IN SHARE MODE",
    "batch log": "LOCK TABLE batches IN SHARE MODE",
    # The check that failures do not overlap comes with the commit, and waits to see what becomes of this one.
    "commit": """
        INSERT INTO failures (machine_id, start_time, last_failing_time, is_active)
        SELECT id, '-infinity', '-infinity', true FROM machines WHERE machine_id = 'm1'
    """,
}


@pytest.fixture(autouse=True)
def nobody_deadlocks(database_settings: Settings) -> Iterator[None]:
    """PostgreSQL counts them, those that a retry hid too; a session's count is in when it has ended."""
    yield
    until(lambda: not sessions(database_settings))
    with connect(database_settings).connect() as connection:
        query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert connection.scalar(sa.text(query)) == 0


def half_ingested(settings: Settings) -> Log:
    log = busy_history(settings)
    ingest_once(settings, log, *first_half(log))
    return log


# Two at once


@pytest.mark.parametrize("stop", STOPS)
def test_of_two_runs_of_one_batch_one_writes_it_and_the_other_says_so(database_settings: Settings, stop: str) -> None:
    log = half_ingested(database_settings)
    before = sum(len(span) for span in first_half(log))
    everything = len(batch_of(log))
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS[stop]):
            runs = [pool.submit(ingest_once, database_settings, log) for _ in range(2)]
            until(lambda: len(sessions(database_settings, waiting=True)) == 2)
        first, second = sorted((run.result() for run in runs), key=lambda written: written.already_ingested)
    assert (first.already_ingested, second.already_ingested) == (before, everything)
    assert first.inserted + first.rejected == everything - before
    assert (second.batch_id, second.inserted, second.rejected) == (None, 0, 0)
    assert stored(database_settings) == want(log)


@pytest.mark.parametrize("stop", ["new machines", "batch log", "commit"])
@pytest.mark.parametrize("turn", [1, -1])
def test_overlapping_batches_share_what_both_own(database_settings: Settings, stop: str, turn: int) -> None:
    log = half_ingested(database_settings)
    parts = [
        [OffsetRange(p, 0, len(messages) * (2 + p % 2) // 4) for p, messages in log.partitions.items()],
        [OffsetRange(p, len(messages) * (1 + p % 2) // 4, len(messages)) for p, messages in log.partitions.items()],
    ][::turn]
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS[stop]):
            runs = []
            for waiting, ranges in enumerate(parts, 1):
                runs.append(pool.submit(ingest_once, database_settings, log, *ranges))
                until(lambda waiting=waiting: len(sessions(database_settings, waiting=True)) == waiting)
        for run in runs:
            run.result()
    ingest_once(database_settings, log)
    assert stored(database_settings) == want(log)


@pytest.mark.parametrize("stop", ["lock of its machines", "failures", "rejected messages", "batch log", "commit"])
@pytest.mark.parametrize("lanes", [(0, 1), (1, 0)])
def test_a_lane_that_waited_for_another_sees_the_failures_it_left(
    database_settings: Settings, stop: str, lanes: tuple[int, int]
) -> None:
    """The readings of one machine alternate between the lanes, so each lane's failures are the other's too."""
    log = Log(database_settings, "t", "t-id")
    for second in range(40):
        log.publish(second % 2, message("m1", second, second % 8 in (1, 2, 3, 6)))
    for partition in (0, 1):
        log.publish(partition, b"poison", bad="not_json")
    ingest_once(database_settings, log, OffsetRange(0, 0, 5), OffsetRange(1, 0, 5))
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS[stop]):
            runs = []
            for waiting, lane in enumerate(lanes, 1):
                runs.append(pool.submit(ingest_once, database_settings, log, OffsetRange(lane, 0, 21)))
                until(lambda waiting=waiting: len(sessions(database_settings, waiting=True)) == waiting)
        for run in runs:
            run.result()
    assert stored(database_settings) == want(log)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_server_that_isolates_more_by_default_changes_nothing(database_settings: Settings, level: str) -> None:
    log = half_ingested(database_settings)
    with Database(database_settings).begin() as connection:
        name = database_settings.postgres_db
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS["batch log"]):
            runs = []
            for waiting, lane in enumerate((0, 1), 1):
                mine = [span for span in batch_of(log).ranges if span.partition % 2 == lane]
                runs.append(pool.submit(ingest_once, database_settings, log, *mine))
                until(lambda waiting=waiting: len(sessions(database_settings, waiting=True)) == waiting)
        for run in runs:
            run.result()
    assert stored(database_settings) == want(log)


def test_two_lanes_that_meet_thousands_of_new_machines_in_opposite_order_do_not_deadlock(
    database_settings: Settings,
) -> None:
    log = Log(database_settings, "t", "t-id")
    names = [f"machine {number:04}" for number in range(3_000)]
    for lane, ordered in enumerate((names, names[::-1])):
        for second, name in enumerate(ordered):
            log.publish(lane, message(name, second, second % 50 == lane))
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS["new machines"]):
            runs = [pool.submit(ingest_once, database_settings, log, OffsetRange(lane, 0, 3_000)) for lane in (0, 1)]
            until(lambda: len(sessions(database_settings, waiting=True)) == 2)
        for run in runs:
            run.result()
    assert stored(database_settings) == want(log)


@pytest.mark.parametrize("seed", range(2))
def test_six_threads_with_sixty_overlapping_batches_end_in_the_rows_of_the_oracle(
    database_settings: Settings, seed: int
) -> None:
    random = Random(seed)
    log = busy_history(database_settings, seed=seed, readings=600)
    tomorrow = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    for number in range(20):
        log.publish(number % 4, dated(f"m{number % 3}", tomorrow + timedelta(days=number // 5), number % 4 == 0))
    batches = []
    for _ in range(60):
        ranges = []
        for partition in random.sample(sorted(log.partitions), random.randrange(1, 5)):
            start = random.randrange(len(log.partitions[partition]))
            end = min(start + random.randrange(1, 60), len(log.partitions[partition]))
            ranges.append(OffsetRange(partition, start, end))
        batches.append(ranges)
    start_together = Barrier(6)

    def run(mine: list[list[OffsetRange]]) -> list[Written]:
        start_together.wait()
        return [ingest_once(database_settings, log, *ranges) for ranges in mine]

    with ThreadPoolExecutor(6) as pool:
        written = [one for done in pool.map(run, [batches[n::6] for n in range(6)]) for one in done]
    written.append(ingest_once(database_settings, log))
    everything = len(batch_of(log))
    assert sum(one.inserted + one.rejected for one in written) == everything
    asked = sum(len(span) for ranges in batches for span in ranges) + everything
    assert sum(one.already_ingested for one in written) == asked - everything
    assert stored(database_settings) == want(log)


def test_two_batches_that_need_the_same_new_day_at_once_make_it_once(database_settings: Settings) -> None:
    log = Log(database_settings, "t", "t-id")
    tomorrow = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    for lane in (0, 1):
        log.publish(lane, dated("m", tomorrow, lane == 0))
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS["healthy readings"]):
            runs = [pool.submit(ingest_once, database_settings, log, OffsetRange(lane, 0, 1)) for lane in (0, 1)]
            until(lambda: len(sessions(database_settings, waiting=True)) == 2)
        for run in runs:
            run.result()
    assert stored(database_settings) == want(log)


def test_a_topic_that_becomes_known_while_a_batch_waits_is_ordered_before_it(database_settings: Settings) -> None:
    late = Log(database_settings, "b", "1")
    for second in range(4):
        late.publish(0, message("m", second, False))
    ingest_once(database_settings, late, OffsetRange(0, 0, 2))
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, "SELECT FROM ingested_offsets FOR UPDATE"):
            run = pool.submit(ingest_once, database_settings, late)
            until(lambda: sessions(database_settings, waiting=True))
            early = Log(database_settings, "a", "2")
            for second in range(4):
                early.publish(0, message("m", second, True))
            ingest_once(database_settings, early)
        run.result()
    assert stored(database_settings) == want(early, late)


def test_a_topic_that_two_make_known_at_once_is_one_topic(database_settings: Settings) -> None:
    start_together = Barrier(4)

    def add() -> None:
        with Database(database_settings).begin() as connection:
            start_together.wait()
            ledger.add_topic(connection, "t", "t-id", {0: ledger.FirstStart(5, "why"), 1: ledger.FirstStart(0, "")})

    with ThreadPoolExecutor(4) as pool:
        for run in [pool.submit(add) for _ in range(4)]:
            run.result()
    rows = every_row(database_settings)
    assert (len(rows["topics"]), len(rows["accepted_gaps"]), len(rows["ingested_offsets"])) == (1, 1, 2)


# The order of locks


def is_free(settings: Settings, statement: str) -> bool:
    """Whether a statement gets its lock at once."""
    with connect(settings).connect() as connection:
        connection.execute(sa.text("SET LOCAL lock_timeout = '10ms'"))
        try:
            connection.execute(sa.text(statement))
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "pgcode", None) != "55P03":  # lock_not_available
                raise
            return False
        return True


def locked_tables(settings: Settings, pid: int) -> set[str]:
    """The tables that a session has locked to write to them."""
    with connect(settings).connect() as connection:
        query = """
            SELECT relation::regclass::text FROM pg_locks
            WHERE pid = :pid AND locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
              AND relation IN (SELECT oid FROM pg_class WHERE relkind IN ('r', 'p'))
        """
        return set(connection.scalars(sa.text(query), {"pid": pid}))


def test_machines_are_locked_in_order_of_their_ids_after_the_healthy_readings_and_before_anything_of_failures(
    database_settings: Settings,
) -> None:
    log = Log(database_settings, "t", "t-id")
    # The ids are not in the order of the names.
    for at, name in enumerate(("c", "a", "d", "b")):
        log.publish(0, message(name, at, False))
        ingest_once(database_settings, log, OffsetRange(0, at, at + 1))
    for second, name in enumerate("dbca" * 3, 10):
        log.publish(0, message(name, second, second % 2 == 0))
    log.publish(0, b"poison", bad="not_json")
    row = "SELECT FROM machines WHERE machine_id = '{}' FOR NO KEY UPDATE"
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, row.format("d")):
            run = pool.submit(ingest_once, database_settings, log)
            (pid,) = until(lambda: sessions(database_settings, waiting=True))
            free = {name: is_free(database_settings, row.format(name)) for name in "cadb"}
            assert free == {"c": False, "a": False, "d": False, "b": True}
            assert not is_free(database_settings, "SELECT FROM ingested_offsets FOR UPDATE NOWAIT")
            written = locked_tables(database_settings, pid)
            assert {"readings", "readings_before_horizon"} <= written
            assert not written & {"failures", "rejected_messages", "batches"}
        run.result()
    assert stored(database_settings) == want(log)


def test_a_machine_can_be_referred_to_while_a_batch_has_it_locked(database_settings: Settings) -> None:
    """The lock is one that a foreign key's check does not wait for: with a stronger one batches deadlock."""
    log = half_ingested(database_settings)
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS["batch log"]):
            run = pool.submit(ingest_once, database_settings, log)
            until(lambda: sessions(database_settings, waiting=True))
            assert is_free(database_settings, "SELECT FROM machines FOR KEY SHARE")
            assert not is_free(database_settings, "SELECT FROM machines FOR NO KEY UPDATE")
        run.result()


def test_the_ledgers_rows_are_locked_in_order_of_partition(database_settings: Settings) -> None:
    log = half_ingested(database_settings)
    row = "SELECT FROM ingested_offsets WHERE kafka_partition = {} FOR UPDATE"
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, row.format(2)):
            run = pool.submit(ingest_once, database_settings, log)
            until(lambda: sessions(database_settings, waiting=True))
            assert [is_free(database_settings, row.format(p)) for p in range(4)] == [False, False, False, True]
        run.result()


def test_the_ledgers_rows_are_made_in_order_of_partition(database_settings: Settings) -> None:
    log = busy_history(database_settings)
    row = "INSERT INTO ingested_offsets (topic_id, kafka_partition) SELECT id, {} FROM topics ON CONFLICT DO NOTHING"
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, row.format(2)):
            run = pool.submit(ingest_once, database_settings, log)
            until(lambda: sessions(database_settings, waiting=True))
            assert [is_free(database_settings, row.format(p)) for p in range(4)] == [False, False, False, True]
        run.result()


# Cut off and killed


@pytest.mark.parametrize("stop", STOPS)
def test_a_session_cut_off_at_any_step_is_tried_again_and_leaves_no_trace(
    database_settings: Settings, stop: str, administer: Any
) -> None:
    log = half_ingested(database_settings)
    before = every_row(database_settings)
    cut, go_on = Event(), Event()
    tries: list[dict[str, Any]] = []

    def sleep(seconds: float) -> None:
        tries.append(every_row(database_settings))
        cut.set()
        assert go_on.wait(60)

    log.pipeline._sleep = sleep
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, STOPS[stop]):
            run = pool.submit(log.ingest, list(batch_of(log).ranges))
            (pid,) = until(lambda: sessions(database_settings, waiting=True))
            administer(f"SELECT pg_terminate_backend({pid})")
            assert cut.wait(60)
        go_on.set()
        written = run.result()
    assert tries == [before]
    assert written.already_ingested == sum(len(span) for span in first_half(log))
    assert stored(database_settings) == want(log)


def test_a_session_that_is_cut_off_every_time_fails_the_batch_with_one_line(
    database_settings: Settings, administer: Any
) -> None:
    log = half_ingested(database_settings)
    before = every_row(database_settings)
    log.pipeline._sleep = lambda seconds: None
    with ThreadPoolExecutor() as pool, other_session(database_settings, STOPS["failures"]):
        run = pool.submit(log.ingest, list(batch_of(log).ranges))
        while not run.done():
            for pid in sessions(database_settings, waiting=True):
                administer(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(UnavailableError, match=r"^no connection to PostgreSQL|57P01") as caught:
            run.result()
    assert "\n" not in str(caught.value)
    assert every_row(database_settings) == before


def test_a_commit_whose_answer_is_lost_is_not_written_again(
    database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = half_ingested(database_settings)
    write = batch_module.write
    results: list[Written] = []

    def write_and_lose_the_answer(*arguments: Any) -> Written:
        results.append(write(*arguments))
        if len(results) == 1:
            raise UnavailableError("server closed the connection unexpectedly")
        return results[-1]

    monkeypatch.setattr(batch_module, "write", write_and_lose_the_answer)
    log.pipeline._sleep = lambda seconds: None
    written = log.ingest(list(batch_of(log).ranges))
    assert results[0].inserted > 0
    assert (written.inserted, written.already_ingested) == (0, len(batch_of(log)))
    assert stored(database_settings) == want(log)


@pytest.mark.parametrize("stop", [*STOPS, "after the commit"])
def test_a_process_killed_at_any_step_leaves_what_the_next_run_brings_to_the_same_end(
    database_settings: Settings, stop: str
) -> None:
    log = half_ingested(database_settings)
    command = [sys.executable, "-m", "sensor_pipeline_tests.postgres.writer"]
    command += [database_settings.postgres_host, str(database_settings.postgres_port), database_settings.postgres_db]
    statement = STOPS.get(stop, "SELECT 1")
    with other_session(database_settings, statement):
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "drained\n"
        if stop == "after the commit":
            assert process.stdout.readline() == "written\n"
        else:
            until(lambda: sessions(database_settings, waiting=True))
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    until(lambda: not sessions(database_settings))
    written = log.ingest(list(batch_of(log).ranges))
    # The server had all it needed of the one that it was told to commit.
    was_written = stop in ("commit", "after the commit")
    assert (written.batch_id is None) == was_written
    assert stored(database_settings) == want(log)
