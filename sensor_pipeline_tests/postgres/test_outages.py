"""A PostgreSQL that goes away, is full, only reads, or has forgotten: the batch fails unchanged and then succeeds."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from threading import Event
from typing import Any

import pytest
import sqlalchemy as sa

from sensor_pipeline.batch import RETRY_PAUSES, Pipeline
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.errors import SensorPipelineError, UnavailableError
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import backlog, batch, catch_up, check_rows, ledger_ranges
from sensor_pipeline_tests.kafka.producing import Publisher, create_topic, group_offsets
from sensor_pipeline_tests.oracle import connect, stored
from sensor_pipeline_tests.postgres.servers import Disk, TrialServer, mounted, only_root_mounts
from sensor_pipeline_tests.postgres.tables import (
    batch_of,
    busy_history,
    dated,
    every_row,
    first_half,
    ingest_once,
    sessions,
    until,
    want,
)
from sensor_pipeline_tests.postgres.test_concurrency import STOPS, half_ingested
from sensor_pipeline_tests.postgres.test_database import said_by
from sensor_pipeline_tests.soak import amount
from sensor_pipeline_tests.test_any_history import Log


@pytest.fixture(scope="module")
def running_server(server_folder: Any) -> Iterator[TrialServer]:
    """The server, started once."""
    server = TrialServer(server_folder / "trial-postgres")
    server.start_migrated()
    yield server
    server.stop()


@pytest.fixture
def server(running_server: TrialServer) -> Iterator[TrialServer]:
    """The server, running at the start and at the end of the test."""
    yield running_server
    if running_server.child is None:
        running_server.start()


@pytest.fixture
def settings(server: TrialServer) -> Iterator[Settings]:
    """Settings with a fresh database of that server; no Kafka."""
    with server.new_database() as settings:
        yield settings


def fails(log: Log, kind: type[SensorPipelineError], words: str) -> str:
    """Ingest all of a log, with all tries and no pause between them; returns the one line of the error."""
    log.pipeline._sleep = lambda seconds: None
    with pytest.raises(kind, match=words) as error:
        log.ingest(list(batch_of(log).ranges))
    return said_by(error, log.pipeline.settings)


def succeeds(log: Log) -> Written:
    """Ingest all of a log; the rows are the oracle's, and nothing that is good was rejected."""
    written = log.ingest(list(batch_of(log).ranges))
    assert stored(log.pipeline.settings) == want(log)
    return written


# Restarted at each step


@contextmanager
def held(settings: Settings, statement: str) -> Iterator[None]:
    """As `other_session`, of one that a restart of the server ends."""
    connection = connect(settings).connect()
    try:
        connection.execute(sa.text(statement))
        yield
    finally:
        connection.invalidate()
        connection.close()


def crash(server: TrialServer, pid: int) -> None:
    server.crash()
    server.start()


def restart(server: TrialServer, pid: int) -> None:
    server.shut_down()
    server.start()


def kill_its_session(server: TrialServer, pid: int) -> None:
    """The server then throws out all others and recovers by itself."""
    os.kill(pid, signal.SIGKILL)


def answers(settings: Settings) -> bool:
    with suppress(sa.exc.OperationalError), connect(settings).connect():
        return True
    return False


Interrupt = Callable[[TrialServer, int], None]


def ingest_through(server: TrialServer, log: Log, interrupt: Interrupt, stop: str) -> bool:
    """Ingest all of a log, half of which is; at that step of the batch the server goes down, and comes back.

    Returns:
        Whether the batch came by there.
    """
    settings = log.pipeline.settings
    before = every_row(settings)
    is_up = Event()
    seen: list[Any] = []

    def sleep(seconds: float) -> None:
        assert is_up.wait(60)
        until(lambda: answers(settings))
        seen.append(every_row(settings))

    log.pipeline._sleep = sleep
    with ThreadPoolExecutor() as pool:
        with held(settings, STOPS[stop]):
            run = pool.submit(log.ingest, list(batch_of(log).ranges))
            until(lambda: run.done() or sessions(settings, waiting=True))
            waiting = sessions(settings, waiting=True)
            for pid in waiting:
                interrupt(server, pid)
        is_up.set()
        written = run.result()
    assert seen == [before] * len(waiting)
    assert written.already_ingested == sum(len(span) for span in first_half(log))
    assert stored(settings) == want(log)
    return bool(waiting)


@pytest.mark.parametrize(
    ("interrupt", "stop"),
    [
        *((interrupt, stop) for interrupt in (crash, restart) for stop in STOPS),
        *((kill_its_session, stop) for stop in ("failures", "commit")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_server_that_goes_down_at_any_step_of_a_batch_is_waited_for(
    server: TrialServer, settings: Settings, interrupt: Interrupt, stop: str
) -> None:
    assert ingest_through(server, half_ingested(settings), interrupt, stop)


@pytest.mark.soak
def test_random_histories_outlive_random_outages(server: TrialServer) -> None:
    survived = 0
    for seed in range(amount(3, 300)):
        random = Random(seed)
        with server.new_database() as settings:
            log = busy_history(settings, seed=seed, readings=random.randrange(100, 600))
            ingest_once(settings, log, *first_half(log))
            interrupt = random.choice((crash, restart, kill_its_session))
            survived += ingest_through(server, log, interrupt, random.choice(list(STOPS)))
    print(f"{survived} outages survived")


def test_a_batch_whose_commit_the_server_made_and_could_not_answer_is_not_written_again(
    server: TrialServer, settings: Settings
) -> None:
    log = half_ingested(settings)
    is_up = Event()
    seen: list[Any] = []

    def sleep(seconds: float) -> None:
        assert is_up.wait(60)
        seen.append(stored(settings))

    log.pipeline._sleep = sleep
    with ThreadPoolExecutor() as pool:
        # A commit is on disk before it waits for a standby, here for one that does not exist.
        server.administer("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
        try:
            run = pool.submit(log.ingest, list(batch_of(log).ranges))
            until(lambda: run.done() or waits_for_a_standby(settings))
        finally:  # or nothing would ever be committed there
            server.administer("ALTER SYSTEM RESET synchronous_standby_names")
            server.crash()
            server.start()
            is_up.set()
        written = run.result()
    assert seen == [want(log)]
    assert (written.batch_id, written.inserted, written.already_ingested) == (None, 0, len(batch_of(log)))
    assert stored(settings) == want(log)


def waits_for_a_standby(settings: Settings) -> bool:
    with connect(settings).connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()"
        return bool(connection.scalar(sa.text(query)))


def test_a_server_that_stays_away_for_longer_than_all_tries_fails_the_batch_with_one_line(
    server: TrialServer, settings: Settings
) -> None:
    log = half_ingested(settings)
    before = every_row(settings)
    pauses: list[float] = []
    log.pipeline._sleep = pauses.append
    with ThreadPoolExecutor() as pool:
        with held(settings, STOPS["failures"]):
            run = pool.submit(log.ingest, list(batch_of(log).ranges))
            until(lambda: sessions(settings, waiting=True))
            server.crash()
        with pytest.raises(UnavailableError, match=r"check that it runs .* and POSTGRES_HOST") as error:
            run.result()
    said_by(error, settings)
    assert pauses == list(RETRY_PAUSES)
    server.start()
    assert every_row(settings) == before
    succeeds(log)


# Full


def blob(at: int, size: int) -> bytes:
    """A message that cannot be compressed."""
    values = {"Sensor 1": at, "text": Random(at).randbytes(size // 2).hex()}
    inner = {"readings": values, "has_failure": at % 3 == 0}
    moment = datetime(2026, 1, 1) + timedelta(seconds=at)
    return json.dumps({"machine_id": "big", "timestamp": moment.isoformat(), "readings": inner}).encode()


def publish_blobs(log: Log, count: int, size: int) -> None:
    for at in range(count):
        log.publish(at % 4, blob(at, size))


def publish_tomorrow(log: Log) -> None:
    tomorrow = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    for at in range(8):
        log.publish(0, dated("m", tomorrow + timedelta(seconds=at), at % 3 == 0))


FILLS = {
    "readings_before_horizon": lambda log: publish_blobs(log, 8, 100_000),
    "a day to be made": publish_tomorrow,
    "rejected_messages": lambda log: [log.publish(0, bytes([200]) * 50_000, bad="not_utf8") for _ in range(200)],
    "failures": lambda log: None,
    "batches": lambda log: None,
}


@pytest.fixture
def small_disk(server: TrialServer) -> Iterator[Disk]:
    """A tablespace `small` on a disk of its own."""
    folder = server.folder / "small"
    with mounted(folder, 8_000_000, server.owner) as disk:
        server.administer(f"CREATE TABLESPACE small LOCATION '{folder}'")
        try:
            yield disk
        finally:
            server.administer("DROP TABLESPACE small")
    folder.rmdir()


@only_root_mounts
@pytest.mark.parametrize("table", FILLS)
def test_a_disk_that_is_full_fails_the_batch_unchanged_and_with_room_it_goes_in(
    server: TrialServer, small_disk: Disk, table: str
) -> None:
    with server.new_database() as settings:
        server.administer(f"ALTER DATABASE {settings.postgres_db} SET default_tablespace = small")
        log = busy_history(settings)
        if table in ("readings_before_horizon", "rejected_messages"):
            ingest_once(settings, log, *first_half(log))
        if table != "a day to be made":
            with connect(settings).begin() as connection:
                connection.exec_driver_sql(f"ALTER TABLE {table} SET TABLESPACE small")
        FILLS[table](log)
        small_disk.fill()
        before = every_row(settings)

        said = fails(log, UnavailableError, "53100")

        assert "make room on the server's disk" in said
        assert "pg_tblspc" in said
        assert every_row(settings) == before
        small_disk.make_room()
        succeeds(log)


@only_root_mounts
def test_a_write_ahead_log_without_room_stops_the_server_and_the_batch_goes_in_once_there_is_some(
    server_folder: Any,
) -> None:
    folder = server_folder / "full-postgres"
    server = TrialServer(folder, wal=folder / "wal" / "log")
    with mounted(folder / "wal", 48_000_000, server.owner) as disk, ExitStack() as at_end:
        server.start_migrated()
        at_end.callback(server.stop)
        settings = server.settings()
        log = half_ingested(settings)
        before = every_row(settings)
        publish_blobs(log, 16, 400_000)
        disk.fill()

        fails(log, UnavailableError, r"check that it runs \(if not, its log says why\)")

        assert "No space left on device" in server.log.read_text()
        assert "PANIC" in server.log.read_text()
        disk.make_room()
        server.stop()
        server.start()
        assert every_row(settings) == before
        succeeds(log)


# Read-only


def test_a_standby_is_said_to_be_one_and_takes_the_batch_once_it_is_promoted(
    server: TrialServer, settings: Settings, server_folder: Any
) -> None:
    log = half_ingested(settings)
    before = every_row(settings)
    standby = server.make_standby(server_folder / "standby")
    try:
        there = replace(settings, postgres_port=standby.port)
        log.pipeline = Pipeline(there)
        assert every_row(there) == before
        remedy = r"25006.*it is a standby: set POSTGRES_HOST \(and _PORT\) to the primary, or promote it"

        fails(log, UnavailableError, remedy)
        with pytest.raises(UnavailableError, match=remedy):
            Log(there, "new", "new-id")
        publish_tomorrow(log)
        fails(log, UnavailableError, remedy)

        assert every_row(there) == before == every_row(settings)
        standby.administer("SELECT pg_promote()")
        succeeds(log)
        assert every_row(settings) == before
    finally:
        standby.stop()


# No room for one more


def test_a_server_with_all_its_connections_taken_is_unavailable_until_one_is_given_back(
    server: TrialServer, settings: Settings
) -> None:
    log = half_ingested(settings)
    before = every_row(settings)
    with ExitStack() as taken:
        while answers(settings):
            # One may still be on its way out when the next one is refused.
            with suppress(sa.exc.OperationalError):
                taken.enter_context(connect(settings).connect())
        said = fails(log, UnavailableError, "no connection to PostgreSQL")
        assert "raise max_connections or the CONNECTION LIMIT, or close other sessions" in said
    assert every_row(settings) == before
    succeeds(log)


# An older backup


@pytest.fixture
def with_topic(settings: Settings, broker: KafkaBroker) -> Settings:
    """Settings with a topic of the broker and a group of their own."""
    topic = f"restored-{settings.postgres_db}"
    with_kafka = replace(
        settings,
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_topics=(topic,),
        kafka_group_id=f"group-of-{topic}",
    )
    create_topic(with_kafka, topic, 2)
    return with_kafka


def test_a_server_restored_from_an_older_backup_takes_the_pipeline_back_with_it(
    server: TrialServer, with_topic: Settings, server_folder: Any
) -> None:
    publisher = Publisher(with_topic)
    old = list(publisher.readings({0: 30, 1: 20}))
    pipeline = Pipeline(with_topic)
    catch_up(pipeline)
    server.copy(server_folder / "backup")
    publisher.readings({0: 25, 1: 35})
    publisher.send(1, b"poison", bad="not_json")
    catch_up(pipeline)
    check_rows(with_topic, publisher.published)
    # Planned and drained with what the ledger held before it was set back.
    publisher.readings({0: 10, 1: 10})
    planned = batch(with_topic, {0: (55, 65), 1: (56, 66)})
    drained = pipeline.drain(planned)

    server.restore(server_folder / "backup")

    check_rows(with_topic, old)
    assert group_offsets(with_topic) == {0: 55, 1: 56}
    assert {p.partition: p.next_range for p in backlog(pipeline).partitions} == {
        0: OffsetRange(0, 30, 65),
        1: OffsetRange(1, 20, 66),
    }
    pipeline.drain = lambda _: drained  # type: ignore[method-assign]
    pipeline.run(planned)
    assert ledger_ranges(with_topic, publisher.topic_id) == {0: [(0, 30), (55, 65)], 1: [(0, 20), (56, 66)]}
    # The mirror is set back to where the ledger's first hole begins.
    assert group_offsets(with_topic) == {0: 30, 1: 20}
    catch_up(Pipeline(with_topic))
    check_rows(with_topic, publisher.published)
    assert group_offsets(with_topic) == {0: 65, 1: 66}


def test_a_server_restored_to_before_the_topics_first_start_starts_it_again_from_the_earliest(
    server: TrialServer, with_topic: Settings, server_folder: Any
) -> None:
    server.copy(server_folder / "empty-backup")
    publisher = Publisher(with_topic)
    publisher.readings({0: 30, 1: 20})
    pipeline = Pipeline(with_topic)
    catch_up(pipeline)
    publisher.readings({0: 5})

    server.restore(server_folder / "empty-backup")

    check_rows(with_topic, [])
    assert group_offsets(with_topic) == {0: 30, 1: 20}
    catch_up(pipeline)
    check_rows(with_topic, publisher.published)
    assert group_offsets(with_topic) == {0: 35, 1: 20}


def test_a_server_restored_to_before_its_tables_were_made_is_to_be_migrated_and_starts_again(
    server: TrialServer, with_topic: Settings
) -> None:
    publisher = Publisher(with_topic)
    publisher.readings({0: 5, 1: 5})
    pipeline = Pipeline(with_topic)
    catch_up(pipeline)
    name = with_topic.postgres_db
    server.administer(f"DROP DATABASE {name}", f"CREATE DATABASE {name} TEMPLATE template0")

    with pytest.raises(SensorPipelineError, match="run: sensor-pipeline migrate"):
        catch_up(pipeline)

    migrate(with_topic)
    catch_up(pipeline)
    check_rows(with_topic, publisher.published)
    assert group_offsets(with_topic) == {0: 5, 1: 5}
