"""What a person is told when PostgreSQL does not do as it should, and what the schema itself refuses."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory

from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import ConfigurationError, DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.postgres import database as database_module
from sensor_pipeline.postgres import migrations
from sensor_pipeline.postgres.database import SCHEMA_VERSION, Database
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect, stored
from sensor_pipeline_tests.postgres.tables import (
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
from sensor_pipeline_tests.test_any_history import Log

SECRET = "hunter2"


def run(settings: Settings, *statements: str) -> None:
    """Statements in one of the package's own transactions."""
    with Database(settings).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def said_by(error: pytest.ExceptionInfo[SensorPipelineError], settings: Settings) -> str:
    """The message: one line that names the database, and no password, in it or in what led to it."""
    text = str(error.value)
    assert "\n" not in text
    assert f"{settings.postgres_host}:{settings.postgres_port}/{settings.postgres_db}" in text
    everything = "".join(traceback.format_exception(error.value))
    assert settings.postgres_password not in everything
    return text


@pytest.fixture
def role(database_settings: Settings, administer: Callable[[str], None]) -> Iterator[Settings]:
    """Settings with a user who may read and write every row, but owns no table."""
    name = f"role_of_{database_settings.postgres_db}"
    administer(f"CREATE ROLE {name} LOGIN PASSWORD '{SECRET}'")
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}"))
        connection.execute(sa.text(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {name}"))
    yield replace(database_settings, postgres_user=name, postgres_password=SECRET)
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text(f"DROP OWNED BY {name}"))
    administer(f"DROP ROLE {name}")


@pytest.fixture
def empty(postgres: Settings, administer: Callable[[str], None]) -> Iterator[Settings]:
    """Settings with a database that has no tables."""
    name = "nothing_in_it"
    administer(f"CREATE DATABASE {name} TEMPLATE template0")
    yield replace(postgres, postgres_db=name)
    administer(f"DROP DATABASE {name} WITH (FORCE)")


# No connection


def test_a_wrong_password_is_said_without_the_password(postgres: Settings) -> None:
    wrong = replace(postgres, postgres_password=SECRET)
    with pytest.raises(UnavailableError, match="password authentication failed") as error:
        run(wrong, "SELECT 1")
    text = said_by(error, wrong)
    assert f"as {postgres.postgres_user}" in text
    assert "POSTGRES_HOST, _PORT, _DB, _USER and _PASSWORD" in text


def test_an_unknown_user_and_a_missing_database_are_named(postgres: Settings) -> None:
    nobody = replace(postgres, postgres_user="nobody", postgres_password=SECRET)
    with pytest.raises(UnavailableError, match="as nobody") as error:
        run(nobody, "SELECT 1")
    said_by(error, nobody)
    nowhere = replace(postgres, postgres_db="nowhere")
    with pytest.raises(UnavailableError, match='database "nowhere" does not exist') as error:
        run(nowhere, "SELECT 1")
    text = str(error.value)
    assert "\n" not in text
    assert "_DB" in text


def test_a_server_that_is_down_is_said_to_be(postgres: Settings) -> None:
    down = replace(postgres, postgres_port=ports.any_free(), postgres_password=SECRET)
    with pytest.raises(UnavailableError, match="refused") as error:
        run(down, "SELECT 1")
    assert "check that it runs" in said_by(error, down)


def test_a_server_that_has_no_room_for_one_more_is_unavailable(
    role: Settings, administer: Callable[[str], None]
) -> None:
    administer(f"ALTER ROLE {role.postgres_user} CONNECTION LIMIT 0")
    with pytest.raises(UnavailableError, match="too many connections") as error:
        run(role, "SELECT 1")
    assert "raise max_connections or the CONNECTION LIMIT, or close other sessions" in said_by(error, role)
    administer(f"ALTER ROLE {role.postgres_user} CONNECTION LIMIT 1")
    run(role, "SELECT 1")


def test_a_server_without_ssl_is_said_to_have_none(postgres: Settings) -> None:
    strict = replace(postgres, postgres_sslmode="require", postgres_password=SECRET)
    with pytest.raises(UnavailableError, match="does not support SSL") as error:
        run(strict, "SELECT 1")
    said_by(error, strict)


@contextmanager
def something_else(answer: bytes) -> Iterator[int]:
    """A port where something listens that is not PostgreSQL; it gives the same answer to all, or none."""
    with socket.create_server((ports.LOOPBACK, 0)) as server:
        held = []

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                held.append(client)
                if answer:
                    client.sendall(answer)

        thread = Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in held:
                client.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["another server", "silence"])
def test_what_is_no_postgresql_is_unavailable(
    postgres: Settings, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_CONNECT_SECONDS", 2)
    with ThreadPoolExecutor() as pool, something_else(answer) as port:
        wrong = replace(postgres, postgres_port=port, postgres_password=SECRET)
        # In a thread, so that one that waits for ever is cut off with the server.
        attempt = pool.submit(run, wrong, "SELECT 1")
        with pytest.raises(UnavailableError, match="no connection to PostgreSQL") as error:
            attempt.result(timeout=60)
        said_by(error, wrong)


# By SQLSTATE

REMEDIES = {
    "25006": "nothing was changed; switch off default_transaction_read_only",
    "25P03": "nothing was changed; raise idle_in_transaction_session_timeout",
    "25P04": "nothing was changed; raise transaction_timeout",
    "40001": "nothing was changed; wait a moment: another session was in the way",
    "40P01": "nothing was changed; wait a moment: another session was in the way",
    "53100": "nothing was changed; make room on the server's disk",
    "53200": "nothing was changed; give the server more memory",
    "53300": "nothing was changed; raise max_connections .*or close other sessions",
    "53400": "nothing was changed; raise the limit that it speaks of",
    "54000": "nothing was changed; mend what exceeds the limit that it speaks of",
    "55P03": "nothing was changed; end the session that holds the lock .*or raise lock_timeout",
    "57014": "nothing was changed; raise statement_timeout",
    # Who is cut off in a commit does not know whether it happened.
    "57P01": "in a; wait a moment: the server stops or starts",
    "57P02": "in a; wait a moment: the server stops or starts",
    "57P05": "in a; raise idle_session_timeout",
    "08006": "in a; look at the server's log",
    "58030": "nothing was changed; look at the server's disk and log",
    "XX000": "nothing was changed; look at the server's log: its data may be damaged",
    "XX001": "nothing was changed; look at the server's log: its data may be damaged",
    "0B000": "nothing was changed; look at the server's log",
}
BY_STATE: list[tuple[str, type[SensorPipelineError], str]] = [
    *((state, UnavailableError, f"{remedy}.*, then try again$") for state, remedy in REMEDIES.items()),
    *((state, ConfigurationError, "have the right granted") for state in ("42501", "28000", "28P01", "3D000")),
    *((state, ConfigurationError, "sensor-pipeline migrate") for state in ("42P01", "42703", "42883", "3F000")),
    *(
        (state, ConfigurationError, "look at the database's own tables")
        for state in ("42804", "0A000", "22P03", "22P04")
    ),
    *((state, DataError, "refuses a row for its content") for state in ("22003", "22P05", "22001", "22021")),
    ("P0001", DataError, "Mend it, then try again; one that means a single row should raise check_violation"),
]


@pytest.mark.parametrize(("state", "kind", "remedy"), BY_STATE)
def test_an_error_is_told_apart_by_its_state(
    postgres: Settings, state: str, kind: type[SensorPipelineError], remedy: str
) -> None:
    with pytest.raises(kind, match=remedy) as error:
        run(postgres, f"DO $$ BEGIN RAISE EXCEPTION E'in a\\nfew words' USING ERRCODE = '{state}'; END $$")
    assert type(error.value) is kind
    said_by(error, postgres)


@pytest.mark.parametrize("state", ["23502", "23503", "23505", "23514", "23P01"])
@pytest.mark.parametrize("named", ["CONSTRAINT = 'c', TABLE = 't'", "COLUMN = 'c', TABLE = 't'", "TABLE = 't'", ""])
def test_what_an_error_names_tells_whether_it_is_about_a_row(postgres: Settings, state: str, named: str) -> None:
    """Where a row has no partition, that names a table and nothing else; a trigger's own error names nothing."""
    more = f", {named}" if named else ""
    with pytest.raises(UnavailableError if named == "TABLE = 't'" else DataError, match=state):
        run(postgres, f"DO $$ BEGIN RAISE EXCEPTION 'words' USING ERRCODE = '{state}'{more}; END $$")


def test_a_reading_of_a_day_whose_partition_was_dropped_meanwhile_is_not_the_rows_fault(
    database_settings: Settings,
) -> None:
    run(database_settings, "DROP TABLE readings_before_horizon")
    log = busy_history(database_settings)
    with pytest.raises(UnavailableError, match="no partition of relation"):
        ingest_once(database_settings, log)


@pytest.mark.parametrize(
    "statement",
    ["CREATE TABLE machines (id int)", "CREATE TABLE readings_horizon (id int)"],
)
def test_a_table_of_somebody_elses_in_the_way_is_not_something_that_passes(empty: Settings, statement: str) -> None:
    run(empty, statement)
    with pytest.raises(ConfigurationError, match="already exists"):
        migrate(empty)


# The environment is not the data


def fail_on(table: str, state: str) -> str:
    return f"""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '{state}'; END $$;
        CREATE TRIGGER fail BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION fail();
    """


HINDRANCES: dict[str, tuple[str, str, type[SensorPipelineError], str]] = {
    "read only": (
        "ALTER DATABASE {db} SET default_transaction_read_only = on",
        "ALTER DATABASE {db} RESET default_transaction_read_only",
        UnavailableError,
        "25006.*read-only transaction; nothing was changed; switch off default_transaction_read_only",
    ),
    "idle in transaction": (
        "ALTER DATABASE {db} SET idle_in_transaction_session_timeout = 1",
        "ALTER DATABASE {db} RESET idle_in_transaction_session_timeout",
        UnavailableError,
        # Already while it connects, on a slow machine.
        "no connection to PostgreSQL|25P03",
    ),
    "disk full at the readings": (
        fail_on("readings_before_horizon", "53100"),
        "DROP FUNCTION fail CASCADE",
        UnavailableError,
        "53100.*could not extend file; nothing was changed; make room",
    ),
    "disk full at the failures": (
        fail_on("failures", "53100"),
        "DROP FUNCTION fail CASCADE",
        UnavailableError,
        "53100.*could not extend file; nothing was changed; make room",
    ),
    "disk full at the batch log": (
        fail_on("batches", "53100"),
        "DROP FUNCTION fail CASCADE",
        UnavailableError,
        "53100.*could not extend file; nothing was changed; make room",
    ),
    "a damaged index": (
        fail_on("rejected_messages", "XX002"),
        "DROP FUNCTION fail CASCADE",
        UnavailableError,
        "XX002.*could not extend file; nothing was changed; look at the server's log",
    ),
    **{
        f"no right to insert into {table}": (
            f"REVOKE INSERT ON {table} FROM {{user}}",
            f"GRANT INSERT ON {table} TO {{user}}",
            ConfigurationError,
            f"permission denied for table {table}.*have the right granted",
        )
        for table in ("readings", "machines", "failures", "rejected_messages", "ingested_offsets", "batches")
    },
    "no right to read the ledger": (
        "REVOKE SELECT ON ingested_offsets FROM {user}",
        "GRANT SELECT ON ingested_offsets TO {user}",
        ConfigurationError,
        "permission denied for table ingested_offsets",
    ),
    "no right to use a sequence": (
        "REVOKE ALL ON readings_id_seq FROM {user}",
        "GRANT ALL ON readings_id_seq TO {user}",
        ConfigurationError,
        "permission denied for sequence readings_id_seq",
    ),
}


@pytest.mark.parametrize("name", HINDRANCES)
def test_a_hindrance_fails_the_batch_unchanged_and_the_next_try_after_it_succeeds(
    database_settings: Settings, role: Settings, administer: Callable[[str], None], name: str
) -> None:
    hinder, mend, kind, words = HINDRANCES[name]
    log = busy_history(role)
    ingest_once(role, log, *first_half(log))
    before = every_row(database_settings)
    terms = {"db": role.postgres_db, "user": role.postgres_user}

    def run_as_owner(statement: str) -> None:
        if statement.startswith("ALTER DATABASE"):  # from another one, where it does not hold
            administer(statement.format(**terms))
        else:
            with connect(database_settings).begin() as connection:
                connection.exec_driver_sql(statement.format(**terms))

    run_as_owner(hinder)
    with pytest.raises(kind, match=words) as error:
        ingest_once(role, log)
    said_by(error, role)
    run_as_owner(mend)
    assert every_row(database_settings) == before
    ingest_once(role, log)
    assert stored(database_settings) == want(log)


def test_a_session_that_was_ended_while_it_was_idle_is_told_what_may_have_ended_it(
    database_settings: Settings, administer: Callable[[str], None]
) -> None:
    administer(f"ALTER DATABASE {database_settings.postgres_db} SET idle_in_transaction_session_timeout = '1s'")

    def be_idle() -> None:
        with Database(database_settings).begin() as connection:
            (pid,) = connection.exec_driver_sql("SELECT pg_backend_pid()").scalars()
            until(lambda: pid not in sessions(database_settings))
            connection.exec_driver_sql("SELECT 1")

    with pytest.raises(UnavailableError, match=r"any more.*raise idle_in_transaction_session_timeout") as error:
        be_idle()
    said_by(error, database_settings)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("lock_timeout = '500ms'", "55P03.*end the session that holds the lock .*or raise lock_timeout"),
        ("statement_timeout = '500ms'", "57014.*raise statement_timeout"),
        ("transaction_timeout = '2s'", "raise .*transaction_timeout"),
    ],
)
def test_a_limit_on_waiting_set_on_the_server_fails_the_batch_unchanged(
    database_settings: Settings, administer: Callable[[str], None], limit: str, words: str
) -> None:
    log = busy_history(database_settings)
    ingest_once(database_settings, log, *first_half(log))
    before = every_row(database_settings)
    with other_session(database_settings, "LOCK TABLE failures IN SHARE MODE"):
        administer(f"ALTER DATABASE {database_settings.postgres_db} SET {limit}")
        with pytest.raises(UnavailableError, match=words) as error:
            ingest_once(database_settings, log)
        said_by(error, database_settings)
        administer(f"ALTER DATABASE {database_settings.postgres_db} RESET {limit.split()[0]}")
        assert every_row(database_settings) == before
    ingest_once(database_settings, log)
    assert stored(database_settings) == want(log)


def test_a_user_who_may_not_make_days_is_told_so(role: Settings) -> None:
    log = Log(role, "t", "t-id")
    log.publish(0, dated("m", datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1), False))
    with pytest.raises(ConfigurationError, match="have the right granted") as error:
        ingest_once(role, log)
    said_by(error, role)


# The schema


def test_the_version_in_the_code_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [SCHEMA_VERSION]


def schema_of(settings: Settings) -> list[tuple[str, ...]]:
    with connect(settings).connect() as connection:
        query = """
            SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns
            WHERE table_schema = 'public' ORDER BY table_name, column_name
        """
        return [tuple(row) for row in connection.execute(sa.text(query))]


def check(settings: Settings) -> None:
    database = Database(settings)
    with database.begin() as connection:
        database.check_schema(connection)


def test_migrating_again_changes_nothing(database_settings: Settings) -> None:
    check(database_settings)
    before = every_row(database_settings)
    migrate(database_settings)
    migrate(database_settings)
    assert every_row(database_settings) == before


def test_two_that_migrate_at_once_run_one_after_the_other(empty: Settings, database_settings: Settings) -> None:
    asked: list[float] = []
    with ThreadPoolExecutor() as pool:
        with other_session(empty, f"SELECT pg_advisory_xact_lock({migrations._LOCK})"):
            runs = [pool.submit(migrate, empty, sleep=asked.append) for _ in range(3)]
            until(lambda: len(sessions(empty)) == 4 and len(asked) > 10)
            assert every_row(empty) == {}
        for done in runs:
            done.result()
    check(empty)
    assert schema_of(empty) == schema_of(database_settings)
    assert len(every_row(empty)["sensor_pipeline_schema"]) == 1


def test_a_migration_by_a_user_without_the_right_makes_nothing(role: Settings, empty: Settings) -> None:
    poor = replace(empty, postgres_user=role.postgres_user, postgres_password=SECRET)
    with pytest.raises(ConfigurationError, match="have the right granted") as error:
        migrate(poor)
    said_by(error, poor)
    assert every_row(empty) == {}


def test_a_migration_that_breaks_off_leaves_nothing_behind(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run(empty, "CREATE TABLE accepted_gaps ()")
    with pytest.raises(SensorPipelineError):
        migrate(empty)
    assert every_row(empty) == {"accepted_gaps": []}
    run(empty, "DROP TABLE accepted_gaps")
    migrate(empty)
    check(empty)


def test_a_database_that_is_not_utf_8_is_refused_when_the_tables_are_made(
    postgres: Settings, administer: Callable[[str], None]
) -> None:
    administer("CREATE DATABASE western TEMPLATE template0 ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C'")
    western = replace(postgres, postgres_db="western")
    try:
        with pytest.raises(ConfigurationError, match=r"LATIN1.*UTF8") as error:
            migrate(western)
        said_by(error, western)
        assert every_row(western) == {}
    finally:
        administer("DROP DATABASE western WITH (FORCE)")


def test_a_database_without_the_tables_is_to_be_migrated(empty: Settings) -> None:
    for attempt in (lambda: check(empty), lambda: run(empty, "SELECT count(*) FROM readings")):
        with pytest.raises(ConfigurationError, match="run: sensor-pipeline migrate") as error:
            attempt()
        said_by(error, empty)
    run(empty, "CREATE TABLE sensor_pipeline_schema (version_num text)")
    with pytest.raises(ConfigurationError, match="run: sensor-pipeline migrate"):
        check(empty)


@pytest.mark.parametrize(
    ("version", "remedy"), [("0000", "run: sensor-pipeline migrate"), ("9999", "install that newer sensor_pipeline")]
)
def test_a_schema_of_another_version_is_refused_with_the_remedy(
    database_settings: Settings, version: str, remedy: str
) -> None:
    run(database_settings, f"UPDATE sensor_pipeline_schema SET version_num = '{version}'")
    with pytest.raises(ConfigurationError, match=f"at version {version}, this code needs {SCHEMA_VERSION}") as error:
        check(database_settings)
    assert remedy in said_by(error, database_settings)


# What the schema refuses


@pytest.fixture
def two_machines(database_settings: Settings) -> Settings:
    """A database with machines 1 and 2."""
    run(
        database_settings,
        "INSERT INTO machines (machine_id, first_seen, last_seen) VALUES ('a', now(), now()), ('b', now(), now())",
    )
    return database_settings


def failure(
    start: int, end: int | None, *, machine: int = 1, last: int | None = None, active: bool | None = None
) -> str:
    """The SQL of a failure; times are days of January."""
    is_active = (end is None) if active is None else active
    last = start if last is None else last
    closed = "NULL" if end is None else f"'2026-01-{end:02}'"
    return (
        "INSERT INTO failures (machine_id, start_time, last_failing_time, end_time, is_active) VALUES "
        f"({machine}, '2026-01-{start:02}', '2026-01-{last:02}', {closed}, {is_active})"
    )


READING = """
    INSERT INTO readings (machine_id, "timestamp", kafka_offset, kafka_partition, topic_id, "values", has_failure{})
    VALUES (1, '2020-01-01', 0, 0, 1, '{{}}', {}{})
"""
REFUSED = {
    "overlap": ("failures_do_not_overlap", failure(1, 5), failure(4, 8)),
    "inside": ("failures_do_not_overlap", failure(1, 9), failure(3, 4)),
    "the same": ("failures_do_not_overlap", failure(1, 5), failure(1, 5)),
    "a second active": ("failures_do_not_overlap", failure(1, None), failure(5, None)),
    "one after an active one": ("failures_do_not_overlap", failure(1, None), failure(5, 6)),
    "one before an active one that reaches into it": ("failures_do_not_overlap", failure(5, None), failure(1, 6)),
    "active with an end": ("failures_check", failure(1, 2, active=True)),
    "ended without an end": ("failures_check", failure(1, None, active=False)),
    "its last failing reading after its end": ("failures_check1", failure(1, 2, last=3)),
    "its last failing reading before its start": ("failures_check1", failure(5, 9, last=4)),
    "of no machine": ("failures_machine_id_fkey", failure(1, 2, machine=3)),
    "a machine without a name": (
        "machines_machine_id_check",
        "INSERT INTO machines (machine_id, first_seen, last_seen) VALUES ('', now(), now())",
    ),
    "a machine with too long a name": (
        "machines_machine_id_check",
        "INSERT INTO machines (machine_id, first_seen, last_seen) VALUES (repeat('x', 256), now(), now())",
    ),
    "a machine of the same name": (
        "machines_machine_id_key",
        "INSERT INTO machines (machine_id, first_seen, last_seen) VALUES ('a', now(), now())",
    ),
    "a second horizon": ("readings_horizon", "INSERT INTO readings_horizon (horizon) VALUES ('2026-01-01')"),
    "the same topic twice": (
        "topics_kafka_topic_id_key",
        "INSERT INTO topics (name, kafka_topic_id) VALUES ('a', 'x'), ('b', 'x')",
    ),
    "a failing reading of no failure": (
        "readings_check",
        READING.format("", "true", ""),
    ),
    "a healthy reading of a failure": (
        "readings_check",
        READING.format(", failure_id", "false", ", 1"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_schema_refuses(two_machines: Settings, name: str) -> None:
    constraint, *statements = REFUSED[name]
    before = every_row(two_machines)
    with pytest.raises(DataError, match=constraint):
        run(two_machines, *statements)
    assert every_row(two_machines) == before


TAKEN = {
    "one after the other": (failure(1, 5), failure(5, 9), failure(9, None)),
    "the same times of two machines": (failure(1, None), failure(1, None, machine=2)),
    "failures of no length beside others": (failure(1, 5), failure(5, 5), failure(5, 7)),
    "an overlap that is over at the commit": (
        failure(1, 5),
        failure(4, 8),
        "UPDATE failures SET end_time = '2026-01-04' WHERE start_time = '2026-01-01'",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_schema_takes(two_machines: Settings, name: str) -> None:
    run(two_machines, *TAKEN[name])
    inserted = sum(statement.startswith("INSERT") for statement in TAKEN[name])
    assert len(every_row(two_machines)["failures"]) == inserted


COLUMNS = {
    "machines": {"id", "machine_id", "first_seen", "last_seen"},
    "failures": {"id", "machine_id", "start_time", "end_time", "is_active"},
    "readings": {
        *("id", "machine_id", "timestamp", "values", "has_failure", "failure_id", "topic_id"),
        *("kafka_partition", "kafka_offset"),
    },
    "rejected_messages": {
        *("topic_id", "kafka_partition", "kafka_offset", "key", "payload", "headers", "reason", "detail", "first_seen"),
    },
    "topics": {"id", "name", "kafka_topic_id"},
    "ingested_offsets": {
        *("topic_id", "kafka_partition", "offsets", "readings", "rejected", "no_record", "lost"),
    },
    "batches": {
        *("id", "topic_id", "ranges", "dagster_run_id", "drained", "inserted", "already_ingested", "rejected"),
        *("no_record", "failures_started", "failures_ended", "started_at", "committed_at"),
    },
    "accepted_gaps": {"topic_id", "kafka_partition", "offsets", "who", "when", "why"},
    "notices": {
        *("id", "kind", "machine_id", "failure_id", "start_time", "end_time", "event_time", "found_at", "subject"),
        *("details", "attempts", "retry_at", "refused_since", "outcome", "closed_at"),
    },
}


def test_the_columns_that_other_programs_read_are_there(postgres: Settings) -> None:
    found: dict[str, set[str]] = {}
    for table, column, *_ in schema_of(postgres):
        found.setdefault(table, set()).add(column)
    for table, columns in COLUMNS.items():
        assert columns <= found[table], table


def test_both_ends_notice_within_about_a_minute_that_the_other_has_vanished(database_settings: Settings) -> None:
    """Otherwise its locks stay for the operating system's two hours."""
    with Database(database_settings).begin() as connection:
        told = [
            int(connection.exec_driver_sql(f"SHOW tcp_{name}").scalar_one().removesuffix("s").removesuffix("min"))
            for name in ("keepalives_idle", "keepalives_interval", "keepalives_count")
        ]
        own = connection.connection.driver_connection.info.dsn_parameters
    assert told[0] + told[1] * told[2] <= 60
    assert (own["keepalives_idle"], own["keepalives_interval"], own["keepalives_count"]) == ("30", "10", "3")
    assert int(own["tcp_user_timeout"]) <= 60_000


def test_the_batch_log_has_the_seconds_of_the_write(database_settings: Settings) -> None:
    ingest_once(database_settings, busy_history(database_settings))
    with Database(database_settings).begin() as connection:
        timings = connection.exec_driver_sql("SELECT timings FROM batches").scalar_one()
    assert timings["write"] > 0


def backend(database: Database) -> int:
    with database.begin() as connection:
        return int(connection.scalars(sa.text("SELECT pg_backend_pid()")).one())


def test_each_transaction_has_a_connection_of_its_own_unless_some_are_kept(database_settings: Settings) -> None:
    own, kept = Database(database_settings), Database(database_settings, kept=1)
    assert backend(own) != backend(own)
    assert backend(kept) == backend(kept)


def test_a_kept_connection_that_was_lost_is_replaced_unnoticed(database_settings: Settings) -> None:
    own, kept = Database(database_settings), Database(database_settings, kept=1)
    lost = backend(kept)
    with own.begin() as connection:
        assert connection.scalars(sa.text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": lost}).one()
    assert backend(kept) != lost


def test_what_was_mended_for_the_whole_database_is_seen_by_the_next_try_on_a_kept_connection(
    database_settings: Settings, administer: Callable[[str], None]
) -> None:
    name = database_settings.postgres_db
    administer(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    kept = Database(database_settings, kept=1)
    with pytest.raises(UnavailableError, match="25006"), kept.begin() as connection:
        connection.execute(sa.text("DELETE FROM topics"))
    administer(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with kept.begin() as connection:
        connection.execute(sa.text("DELETE FROM topics"))


def test_a_transaction_that_failed_leaves_nothing_behind_on_a_kept_connection(database_settings: Settings) -> None:
    kept = Database(database_settings, kept=1)
    with pytest.raises(DataError), kept.begin() as connection:
        connection.execute(sa.text("SET timezone = 'Asia/Tokyo'; SELECT 1 / 0"))
    with kept.begin() as connection:
        assert connection.scalars(sa.text("SHOW timezone")).one() == "UTC"
