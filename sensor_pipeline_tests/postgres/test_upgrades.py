"""From every schema that there was to this one, with data in place and while somebody writes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory

from sensor_pipeline.errors import SensorPipelineError, UnavailableError
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.postgres import migrations
from sensor_pipeline.postgres.database import SCHEMA_VERSION
from sensor_pipeline.postgres.figures import read_figures
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import ROOT, run
from sensor_pipeline_tests.kafka.inspecting import query
from sensor_pipeline_tests.oracle import connect, expected, stored
from sensor_pipeline_tests.postgres.tables import (
    busy_history,
    dated,
    first_half,
    ingest_once,
    other_session,
    sessions,
    until,
    want,
)
from sensor_pipeline_tests.rejecting import check_verified
from sensor_pipeline_tests.test_any_history import Log

NOW = datetime.now(UTC).replace(tzinfo=None)
TODAYS_PARTITION = 9


def versions() -> list[str]:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return sorted(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())


@pytest.fixture
def empty(postgres: Settings, administer: Callable[[str], None]) -> Iterator[Settings]:
    """Settings with a database that has no tables."""
    administer("CREATE DATABASE upgrades TEMPLATE template0")
    yield replace(postgres, postgres_db="upgrades")
    administer("DROP DATABASE upgrades WITH (FORCE)")


def version_of(settings: Settings) -> str:
    return str(query(settings, "SELECT version_num FROM sensor_pipeline_schema")[0][0])


# As the first version wrote, by its columns

TOPIC = "INSERT INTO topics (name, kafka_topic_id) VALUES (:name, :id) RETURNING id"
MACHINE = "INSERT INTO machines (machine_id, first_seen, last_seen) VALUES (:name, :first, :last) RETURNING id"
FAILURE = """
    INSERT INTO failures (machine_id, start_time, last_failing_time, end_time, is_active)
    VALUES (:machine, :start, :last, CAST(:end AS timestamptz), CAST(:end AS timestamptz) IS NULL) RETURNING id
"""
READING = """
    INSERT INTO readings (machine_id, "timestamp", "values", has_failure, failure_id, topic_id, kafka_partition,
                          kafka_offset)
    VALUES (:machine, :moment, CAST(:values AS jsonb), CAST(:failure AS bigint) IS NOT NULL, :failure, :topic,
            :partition, :offset)
"""
REJECTED = """
    INSERT INTO rejected_messages (topic_id, kafka_partition, kafka_offset, key, payload, headers, reason, detail)
    VALUES (:topic, :partition, :offset, :key, :payload, '[]', :reason, 'bad')
"""
LEDGER = """
    INSERT INTO ingested_offsets (topic_id, kafka_partition, offsets, readings, rejected, lost)
    VALUES (:topic, :partition, int8multirange(int8range(:start, :end)), :readings, :rejected, :lost)
    ON CONFLICT (topic_id, kafka_partition) DO UPDATE SET
        offsets = ingested_offsets.offsets + excluded.offsets,
        readings = ingested_offsets.readings + excluded.readings,
        rejected = ingested_offsets.rejected + excluded.rejected
"""
BATCH = """
    INSERT INTO batches (topic_id, ranges, drained, inserted, already_ingested, rejected, no_record,
                         failures_started, failures_ended, started_at, committed_at, timings)
    VALUES (:topic, CAST(:ranges AS jsonb), :drained, :inserted, 0, :rejected, 0, 0, 0, now(), now(), '{}')
"""
GAP = """
    INSERT INTO accepted_gaps (topic_id, kafka_partition, offsets, who, why)
    VALUES (:topic, :partition, int8range(:start, :end), 'somebody', 'retention')
"""


def write_as_the_first_version(settings: Settings, log: Log, ranges: list[OffsetRange]) -> None:
    """The rows that the first version left of these ranges, and a gap that was accepted."""
    messages = [m for span in ranges for m in log.partitions[span.partition][span.start : span.end]]
    rows = expected(messages)
    with connect(settings).begin() as connection:

        def execute(statement: str, **values: object) -> sa.CursorResult[tuple[object, ...]]:
            return connection.execute(sa.text(statement), values)

        topic = execute("SELECT id FROM topics WHERE kafka_topic_id = :id", id=log.topic_id).scalar_one()
        ids = {
            name: execute(MACHINE, name=name, first=first, last=last).scalar_one()
            for name, (first, last) in rows.machines.items()
        }
        failure_of = {}
        for (machine, start, _), (end, places) in rows.failures.items():
            last = max(rows.readings[place][1] for place in places)
            failure = execute(FAILURE, machine=ids[machine], start=start, last=last, end=end).scalar_one()
            failure_of |= dict.fromkeys(places, failure)
        for place, (machine, moment, _, values) in rows.readings.items():
            at = {"topic": topic, "partition": place[1], "offset": place[2]}
            text = json.dumps(values, default=float)
            execute(READING, machine=ids[machine], moment=moment, values=text, failure=failure_of.get(place), **at)
        for place, (reason, payload, key) in rows.rejected.items():
            at = {"topic": topic, "partition": place[1], "offset": place[2]}
            execute(REJECTED, reason=reason, payload=payload, key=key, **at)
        good, bad = Counter(place[1] for place in rows.readings), Counter(place[1] for place in rows.rejected)
        for span in ranges:
            p = span.partition
            done = {"partition": p, "start": span.start, "end": span.end, "readings": good[p], "rejected": bad[p]}
            execute(LEDGER, topic=topic, lost=0, **done)
        counts = {"drained": len(messages), "inserted": good.total(), "rejected": bad.total()}
        execute(BATCH, topic=topic, ranges=json.dumps([vars(span) for span in ranges]), **counts)
        lost = {"topic": topic, "partition": 17, "start": 0, "end": 5}
        execute(LEDGER, **lost, readings=0, rejected=0, lost=5)
        execute(GAP, **lost)


def make_today_as_the_first_version(settings: Settings) -> None:
    start = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    name = f"readings_{start:%Y%m%d}"
    with connect(settings).begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE {name} (LIKE readings INCLUDING ALL)")
        bounds = f"FROM ('{start}') TO ('{start + timedelta(days=1)}')"
        connection.exec_driver_sql(f"ALTER TABLE readings ATTACH PARTITION {name} FOR VALUES {bounds}")


@pytest.mark.parametrize("version", versions())
def test_data_of_every_version_goes_to_the_last_one_and_ingestion_goes_on(empty: Settings, version: str) -> None:
    migrate(empty, version=version)
    assert version_of(empty) == version
    log = busy_history(empty, readings=60)
    log.publish(TODAYS_PARTITION, dated("m-today", NOW, True))
    make_today_as_the_first_version(empty)
    old = [span for span in first_half(log) if span.partition != TODAYS_PARTITION]
    old.append(OffsetRange(TODAYS_PARTITION, 0, 1))
    write_as_the_first_version(empty, log, old)
    before = stored(empty)

    migrate(empty)

    assert version_of(empty) == SCHEMA_VERSION
    assert stored(empty) == before
    check_verified(empty)
    log.publish(TODAYS_PARTITION, dated("m-today", NOW + timedelta(seconds=1), False))
    written = ingest_once(empty, log)
    assert written.already_ingested == sum(map(len, old))
    assert stored(empty) == want(log)
    check_verified(empty)
    with connect(empty).begin() as connection:
        assert read_figures(connection, 5).readings == len(want(log).readings)


def test_migrate_refuses_a_schema_that_is_newer_in_one_line(database_settings: Settings) -> None:
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text("UPDATE sensor_pipeline_schema SET version_num = '9999'"))
    done = run(database_settings, "sensor-pipeline", "migrate")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"at version 9999, this code needs {SCHEMA_VERSION}; install that newer sensor_pipeline" in done.stderr


# While somebody writes


class OldWriter:
    """Batches of the first version's: the same tables in the same order, one reading and one rejected message each."""

    def __init__(self, settings: Settings, partition: int = 0) -> None:
        self._engine = connect(settings)
        self._partition = partition
        self.written = 0
        with self._engine.begin() as connection:
            self._topic = connection.scalar(sa.text(TOPIC), {"name": "old", "id": f"old-{partition}"})

    def write(self, lock_timeout: str = "0") -> None:
        """One batch; what waits for a lock for longer than `lock_timeout` fails."""
        start = 2 * self.written
        at = {"topic": self._topic, "partition": self._partition}
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=start)
        ranges = json.dumps([{"partition": self._partition, "start": start, "end": start + 2}])
        with self._engine.begin() as connection:

            def execute(statement: str, **values: object) -> sa.CursorResult[tuple[object, ...]]:
                return connection.execute(sa.text(statement), values)

            execute(f"SET LOCAL lock_timeout = '{lock_timeout}'")
            execute(LEDGER, **at, start=start, end=start + 2, readings=1, rejected=1, lost=0)
            name = f"m-{self._partition}-{start}"
            machine = execute(MACHINE, name=name, first=moment, last=moment).scalar_one()
            failure = execute(FAILURE, machine=machine, start=moment, last=moment, end=None).scalar_one()
            execute(READING, **at, machine=machine, moment=moment, values="{}", failure=failure, offset=start)
            execute(REJECTED, **at, offset=start + 1, key=None, payload=b"x", reason="not_json")
            execute(BATCH, topic=self._topic, ranges=ranges, drained=2, inserted=1, rejected=1)
        self.written += 1


def test_what_reads_for_long_holds_up_the_migration_and_not_those_who_write(empty: Settings) -> None:
    migrate(empty, version="0001")
    writer = OldWriter(empty)
    next_table = iter(["rejected_messages"])

    with connect(empty).connect() as reader:

        def read_on(seconds: float) -> None:
            """The migration has given way: who writes is let in at once, and then somebody reads another table."""
            writer.write(lock_timeout="100ms")
            reader.rollback()
            if table := next(next_table, None):
                reader.execute(sa.text(f"SELECT * FROM {table}"))

        reader.execute(sa.text("SELECT * FROM batches"))
        migrate(empty, sleep=read_on)
    assert writer.written == 2
    assert version_of(empty) == SCHEMA_VERSION
    check_verified(empty)


def test_a_migration_gives_up_in_the_end_and_says_what_to_do(empty: Settings) -> None:
    migrate(empty, version="0003")
    with other_session(empty, "SELECT * FROM batches"), pytest.raises(UnavailableError) as error:
        migrate(empty, patience=0)
    assert "end the session that holds the lock (see pg_blocking_pids)" in str(error.value)
    assert version_of(empty) == "0003"
    migrate(empty)
    assert version_of(empty) == SCHEMA_VERSION


def test_who_writes_all_the_time_is_not_stopped_by_all_migrations(empty: Settings) -> None:
    migrate(empty, version="0001")
    done = Event()
    writers = [OldWriter(empty, partition) for partition in range(2)]

    def go_on(writer: OldWriter) -> int:
        while not done.is_set():
            writer.write()
        return writer.written

    with ThreadPoolExecutor() as pool:
        going_on = [pool.submit(go_on, writer) for writer in writers]
        try:
            until(lambda: all(writer.written > 2 for writer in writers))
            migrate(empty)
        finally:
            done.set()
        written = sum(each.result() for each in going_on)
    assert query(empty, "SELECT count(*) FROM readings") == [(written,)]
    check_verified(empty, machines=["m-0-0", "m-1-0"])


# Indexes


def test_an_index_of_ones_own_on_readings_holds_up_nobody(database_settings: Settings) -> None:
    """As docs/upgrading.md says."""
    (recipe,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "upgrading.md").read_text(), re.DOTALL)
    log = busy_history(database_settings, readings=40)
    with connect(database_settings).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement, run_rows in re.findall(r"(.*?)(;| \\gexec)\n", recipe, re.DOTALL):
            rows = connection.exec_driver_sql(statement.replace("%", "%%"), ())
            for (each,) in rows.all() if run_rows != ";" else ():
                with other_session(
                    database_settings, "LOCK TABLE readings_before_horizon IN ROW EXCLUSIVE MODE"
                ) as other:
                    # Who writes is not in the way of ATTACH; CONCURRENTLY waits for the end of what is open.
                    if "CONCURRENTLY" in each:
                        other.rollback()
                    connection.exec_driver_sql(each)
            if "ON ONLY" in statement:
                # A batch makes a day.
                log.publish(TODAYS_PARTITION, dated("m-today", NOW, True))
                ingest_once(database_settings, log)
    assert is_valid(database_settings, "my_index")
    assert stored(database_settings) == want(log)


def is_valid(settings: Settings, index: str) -> bool:
    found = query(settings, f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{index}')")
    return [tuple(row) for row in found] == [(True,)]


def test_an_index_is_built_while_others_write(empty: Settings) -> None:
    migrate(empty, version="0002")
    writer = OldWriter(empty)
    with ThreadPoolExecutor(1) as pool, connect(empty).connect() as open_batch:
        open_batch.execute(sa.text(MACHINE), {"name": "m", "first": NOW, "last": NOW})
        open_batch.execute(sa.text("INSERT INTO failures SELECT 1000, id, now(), now(), NULL, true FROM machines"))
        migrating = pool.submit(migrate, empty, version="0003")
        until(lambda: sessions(empty, waiting=True))
        # It waits for that batch, and nobody for it.
        writer.write(lock_timeout="100ms")
        assert not migrating.done()
        open_batch.commit()
        migrating.result()
    assert is_valid(empty, "failures_active")
    assert version_of(empty) == "0003"


def test_an_index_that_was_broken_off_is_built_by_the_next_migration(empty: Settings) -> None:
    migrate(empty, version="0002")
    with ThreadPoolExecutor(1) as pool, connect(empty).connect() as open_batch:
        open_batch.execute(sa.text(MACHINE), {"name": "m", "first": NOW, "last": NOW})
        open_batch.execute(sa.text("INSERT INTO failures SELECT 1000, id, now(), now(), NULL, true FROM machines"))
        migrating = pool.submit(migrate, empty)
        (pid,) = until(lambda: sessions(empty, waiting=True))
        query(empty, f"SELECT pg_cancel_backend({pid})")
        with pytest.raises(SensorPipelineError, match="57014"):
            migrating.result()
        open_batch.commit()
    assert (version_of(empty), is_valid(empty, "failures_active")) == ("0002", False)
    migrate(empty)
    assert is_valid(empty, "failures_active")
    assert version_of(empty) == SCHEMA_VERSION
