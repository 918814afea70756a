"""An owner who migrates, a writer whom the pipeline runs as, a reader who looks: each may what it needs and no more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli.status import snapshot
from sensor_pipeline.errors import ConfigurationError, SensorPipelineError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.orchestration import house
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.days import Dropped, drop_readings, ensure_days
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.postgres.notices import add_run_notice
from sensor_pipeline.postgres.rights import READER, WRITER
from sensor_pipeline.settings import Settings
from sensor_pipeline.watch import look
from sensor_pipeline_tests.acceptance.commands import ROOT, run
from sensor_pipeline_tests.kafka.inspecting import catch_up, check_rows, query
from sensor_pipeline_tests.kafka.producing import Publisher
from sensor_pipeline_tests.oracle import connect, stored
from sensor_pipeline_tests.postgres.tables import busy_history, dated, ingest_once, want
from sensor_pipeline_tests.rejecting import check_verified, long, mended, replay, strict
from sensor_pipeline_tests.test_delivery import deliver

WORD = "word-of-a-role"  # not a secret
TODAY = datetime.now(UTC).replace(tzinfo=None)


@pytest.fixture
def as_role(database_settings: Settings, administer: Callable[[str], None]) -> Iterator[Callable[[str], Settings]]:
    """Makes a role, and settings with it; nobody may do anything that was not granted, not even look in."""
    administer(f"REVOKE ALL ON DATABASE {database_settings.postgres_db} FROM PUBLIC")
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text("REVOKE ALL ON SCHEMA public FROM PUBLIC"))
    made = []

    def make(kind: str) -> Settings:
        name = f"{kind}_of_{database_settings.postgres_db}"
        made.append('"' + name.replace('"', '""') + '"')
        administer(f"CREATE ROLE {made[-1]} LOGIN PASSWORD '{WORD}'")
        return replace(database_settings, postgres_user=name, postgres_password=WORD)

    yield make
    for role in made:
        with connect(database_settings).begin() as connection:
            connection.execute(sa.text(f"DROP OWNED BY {role}"))
        administer(f"DROP ROLE {role}")


def execute(settings: Settings, statement: str) -> None:
    with Database(settings).begin() as connection:
        connection.execute(sa.text(statement))


def refused(settings: Settings, statement: str) -> str:
    """What a role is told that may not."""
    with pytest.raises(ConfigurationError, match=r"42501|permission denied|must be owner") as error:
        execute(settings, statement)
    assert WORD not in str(error.value)
    return str(error.value)


def test_a_writer_does_all_that_the_pipeline_does(
    settings: Settings, as_role: Callable[[str], Settings], tmp_path: Path
) -> None:
    role = as_role("writer")
    migrate(settings, writers=[role.postgres_user])
    writer = replace(settings, postgres_user=role.postgres_user, postgres_password=WORD, start_from="latest")
    # A first start, with what lies before it accepted as lost.
    Publisher(settings).readings({0: 3})
    pipeline = Pipeline(strict(writer))
    catch_up(pipeline)
    publisher = Publisher(settings)
    publisher.readings({0: 20, 1: 20})
    publisher.send(2, b"poison", bad="not_json")
    publisher.send(2, long(dated("m0", TODAY, True)), bad="too_large")
    # A day that has no partition yet.
    publisher.send(3, dated("m-new", TODAY, True))
    catch_up(pipeline)
    # Late data.
    publisher.send(0, dated("m-new", TODAY - timedelta(seconds=5), False))
    publisher.send(1, dated("m0", TODAY - timedelta(days=800), True))
    catch_up(pipeline)
    check_rows(settings, publisher.published)
    assert query(settings, "SELECT sum(lost) FROM ingested_offsets") == [(3,)]

    assert replay(writer).readings == 1
    check_rows(settings, mended(publisher.published))
    notice = look(replace(writer, alert_rejected=0), Kafka(writer), Database(writer), writer.kafka_topics[0])
    with Database(writer).begin() as connection:
        add_run_notice(connection, notice[0], timedelta(hours=1), timedelta(hours=1))
    assert "logged" in str(deliver(writer, None))
    kept = replace(writer, batches_kept_days=-1, notices_kept_days=0)
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        assert house.build_job(kept, []).execute_in_process(instance=instance).success
    assert query(settings, "SELECT count(*) FROM batches") == [(0,)]

    for command in ("status", "verify", "recompute"):
        done = run(writer, "sensor-pipeline", command)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    told = run(writer, "sensor-pipeline", "doctor", DAGSTER_HOME="")
    assert f"{role.postgres_user} has all that are needed" in told.stdout
    assert told.returncode == 0, told.stdout
    check_rows(settings, mended(publisher.published))
    check_verified(writer)


def test_a_writer_changes_no_table_and_makes_none(
    database_settings: Settings, as_role: Callable[[str], Settings]
) -> None:
    writer = as_role("writer")
    migrate(database_settings, writers=[writer.postgres_user])
    for table in [*WRITER.tables, "readings_before_horizon"]:
        for statement in (
            f"DROP TABLE {table} CASCADE",
            f"TRUNCATE {table} CASCADE",
            f"ALTER TABLE {table} ADD COLUMN x int",
        ):
            refused(writer, statement)
    refused(writer, "DELETE FROM readings")
    refused(writer, "SELECT FROM readings_before_horizon")
    refused(writer, "UPDATE sensor_pipeline_schema SET version_num = '0001'")
    refused(writer, "CREATE TABLE mine ()")
    refused(writer, "ALTER FUNCTION make_readings_day OWNER TO CURRENT_USER")
    reader = as_role("reader")
    with pytest.raises(
        ConfigurationError, match=f"{writer.postgres_user} may not grant {reader.postgres_user} .*SELECT"
    ):
        migrate(writer, readers=[reader.postgres_user])


def test_a_function_of_the_owners_finds_nothing_but_the_owners_tables(
    database_settings: Settings, as_role: Callable[[str], Settings], administer: Callable[[str], None]
) -> None:
    writer = as_role("writer")
    migrate(database_settings, writers=[writer.postgres_user])
    administer(f'GRANT TEMPORARY ON DATABASE {writer.postgres_db} TO "{writer.postgres_user}"')
    day = TODAY.date()
    with Database(writer).begin() as connection:
        # In its way, were it looked for first.
        connection.exec_driver_sql("CREATE TEMP TABLE readings_horizon AS SELECT date '9999-01-01' AS horizon")
        connection.exec_driver_sql("CREATE TEMP TABLE readings ()")
        made = connection.scalar(sa.text("SELECT make_readings_day(:day)"), {"day": day})
    assert made
    assert ensure_days(Database(writer), [day]) == []


def test_a_writer_drops_days_that_it_does_not_own(
    database_settings: Settings, as_role: Callable[[str], Settings]
) -> None:
    writer = as_role("writer")
    migrate(database_settings, writers=[writer.postgres_user])
    tomorrow = TODAY.date() + timedelta(days=1)
    ensure_days(Database(writer), [TODAY.date(), tomorrow])
    assert drop_readings(Database(writer), tomorrow, 60) == Dropped(0, tomorrow)
    left = query(
        database_settings, "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'readings'::regclass"
    )
    assert sorted(name for (name,) in left) == [f"readings_{tomorrow:%Y%m%d}", "readings_before_horizon"]


def sql_of_the_readme() -> list[str]:
    found = re.findall(r"```sql\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(found) >= 3
    return found


def test_a_reader_reads_all_that_people_query_and_days_that_come_later_too(
    settings: Settings, as_role: Callable[[str], Settings]
) -> None:
    role = as_role("reader")
    migrate(settings, readers=[role.postgres_user])
    reader = replace(settings, postgres_user=role.postgres_user, postgres_password=WORD)
    log = busy_history(settings)
    log.publish(0, dated("m-new", TODAY, True))
    ingest_once(settings, log)
    assert stored(reader) == want(log)
    for statement in [*sql_of_the_readme(), *(f"SELECT * FROM {table} LIMIT 1" for table in READER.tables)]:
        query(reader, statement)
    assert snapshot(reader).readings == len(want(log).readings)
    check_verified(reader)


def test_a_reader_changes_nothing(database_settings: Settings, as_role: Callable[[str], Settings]) -> None:
    reader = as_role("reader")
    migrate(database_settings, readers=[reader.postgres_user])
    columns = {
        table: query(
            database_settings,
            f"""SELECT quote_ident(column_name) FROM information_schema.columns WHERE table_name = '{table}'
                ORDER BY ordinal_position DESC LIMIT 1""",
        )[0][0]
        for table in READER.tables
    }
    for table, column in columns.items():
        for statement in (
            f"INSERT INTO {table} DEFAULT VALUES",
            f"UPDATE {table} SET {column} = {column}",
            f"DELETE FROM {table}",
            f"TRUNCATE {table} CASCADE",
            f"SELECT FROM {table} FOR UPDATE",
        ):
            refused(reader, statement)
    refused(reader, "SELECT nextval('readings_id_seq')")
    refused(reader, "SELECT make_readings_day(current_date)")
    refused(reader, "SELECT keep_readings_from(current_date)")
    refused(reader, "SELECT drop_readings()")
    refused(reader, "CREATE TABLE mine ()")


def test_a_role_that_does_not_exist_is_named_before_anything_is_changed(
    postgres: Settings, administer: Callable[[str], None]
) -> None:
    administer("CREATE DATABASE of_nobody TEMPLATE template0")
    settings = replace(postgres, postgres_db="of_nobody")
    try:
        done = run(settings, "sensor-pipeline", "migrate", "--writer", postgres.postgres_user, "--reader", "no one")
        assert (done.returncode, done.stdout) == (1, "")
        server = f"{postgres.postgres_host}:{postgres.postgres_port}"
        assert done.stderr == (
            f'sensor-pipeline: there is no role "no one" at {server}/of_nobody, and nothing was changed; have it made '
            "(CREATE ROLE \"no one\" LOGIN PASSWORD '…'), then run this again\n"
        )
        assert query(settings, "SELECT to_regclass('machines')") == [(None,)]
    finally:
        administer("DROP DATABASE of_nobody WITH (FORCE)")


def test_granting_again_changes_nothing_and_takes_nothing_that_others_granted(
    database_settings: Settings, as_role: Callable[[str], Settings]
) -> None:
    # A name that must be quoted.
    reader, writer = as_role('a "reader"; 100%s'), as_role("writer")
    others = sa.text(f'GRANT DELETE ON machines TO "{reader.postgres_user.replace(chr(34), chr(34) * 2)}"')
    with connect(database_settings).begin() as connection:
        connection.execute(others)
    granted = []
    for _ in range(2):
        migrate(database_settings, writers=[writer.postgres_user], readers=[reader.postgres_user])
        granted.append(query(database_settings, "SELECT relname, relacl::text FROM pg_class ORDER BY 1"))
    assert granted[0] == granted[1]
    assert query(reader, "SELECT has_table_privilege('machines', 'DELETE')") == [(True,)]


def test_who_may_not_grant_is_told_what_is_missing(
    database_settings: Settings, as_role: Callable[[str], Settings], administer: Callable[[str], None]
) -> None:
    """The owner of the tables need not own the database."""
    owner, reader = as_role("owner"), as_role("reader")
    administer(f"CREATE DATABASE {owner.postgres_user}_db TEMPLATE template0")
    theirs = replace(owner, postgres_db=f"{owner.postgres_user}_db")
    try:
        administer(f"REVOKE CONNECT ON DATABASE {theirs.postgres_db} FROM PUBLIC")
        administer(f"GRANT CONNECT ON DATABASE {theirs.postgres_db} TO {owner.postgres_user}")
        with connect(replace(database_settings, postgres_db=theirs.postgres_db)).begin() as connection:
            connection.execute(sa.text(f"GRANT CREATE ON SCHEMA public TO {owner.postgres_user}"))
        with pytest.raises(ConfigurationError) as error:
            migrate(theirs, readers=[reader.postgres_user])
        assert f"{owner.postgres_user} may not grant {reader.postgres_user} CONNECT on {theirs.postgres_db}" in str(
            error.value
        )
        administer(f"GRANT CONNECT ON DATABASE {theirs.postgres_db} TO {reader.postgres_user}")
        migrate(theirs, readers=[reader.postgres_user])
        assert query(replace(reader, postgres_db=theirs.postgres_db), "SELECT count(*) FROM readings") == [(0,)]
    finally:
        administer(f"DROP DATABASE {theirs.postgres_db} WITH (FORCE)")


def test_the_roles_are_made_as_the_page_says(postgres: Settings, administer: Callable[[str], None]) -> None:
    made = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "tls.md").read_text(), re.DOTALL)[0].replace("…", WORD)
    owner = replace(postgres, postgres_user="sensor_owner", postgres_password=WORD, postgres_db="sensor_data")
    writer, reader = (replace(owner, postgres_user=f"sensor_{kind}") for kind in ("writer", "reader"))
    try:
        for statement in made.split(";\n"):
            if statement:
                administer(statement)
        migrate(owner, writers=["sensor_writer"], readers=["sensor_reader"])
        log = busy_history(writer)
        log.publish(0, dated("m-new", TODAY, True))
        ingest_once(writer, log)
        assert stored(reader) == want(log)
        # Dagster's own, which it makes by itself.
        execute(replace(writer, postgres_db="dagster"), "CREATE TABLE runs ()")
        with pytest.raises(SensorPipelineError, match='permission denied for database "dagster"'):
            execute(replace(reader, postgres_db="dagster"), "SELECT 1")
    finally:
        for database in ("sensor_data", "dagster"):
            administer(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        for kind in ("owner", "writer", "reader"):
            administer(f"DROP ROLE IF EXISTS sensor_{kind}")
