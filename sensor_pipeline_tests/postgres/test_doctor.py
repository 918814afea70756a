"""`sensor-pipeline doctor` against the rights that a batch really needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli.doctor import _rights
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.postgres.tables import busy_history, ingest_once
from sensor_pipeline_tests.test_any_history import Log

# Each grant that a writer needs, and what doctor says where it is missing.
GRANTS = {
    "GRANT EXECUTE ON FUNCTION make_readings_day TO {role}": r"EXECUTE on make_readings_day\(date\)",
    "GRANT EXECUTE ON FUNCTION keep_readings_from TO {role}": r"EXECUTE on keep_readings_from\(date\)",
    "GRANT EXECUTE ON FUNCTION drop_readings TO {role}": r"EXECUTE on drop_readings\(\)",
    "GRANT SELECT ON dropped_readings TO {role}": "SELECT on dropped_readings",
    "GRANT SELECT, INSERT, UPDATE ON readings TO {role}": "SELECT on readings, INSERT on readings, UPDATE on readings",
    "GRANT SELECT, INSERT ON topics TO {role}": "SELECT on topics, INSERT on topics",
    "GRANT UPDATE ON topics TO {role}": "UPDATE on topics",
    "GRANT SELECT, INSERT, UPDATE ON machines, ingested_offsets TO {role}": "INSERT on machines, UPDATE on machines",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON failures TO {role}": "DELETE on failures",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON rejected_messages TO {role}": "DELETE on rejected_messages",
    "GRANT DELETE ON batches TO {role}": "DELETE on batches",
    "GRANT SELECT, INSERT ON batches, accepted_gaps TO {role}": "INSERT on batches",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON notices TO {role}": "DELETE on notices",
    "GRANT SELECT ON readings_horizon, sensor_pipeline_schema TO {role}": "SELECT on readings_horizon",
    "GRANT USAGE ON SEQUENCE failures_id_seq TO {role}": "USAGE on failures_id_seq",
    "GRANT USAGE ON SEQUENCE readings_id_seq TO {role}": "USAGE on readings_id_seq",
}


@pytest.fixture
def writer(database_settings: Settings, administer: Callable[[str], None]) -> Iterator[Settings]:
    """A user without any right of its own."""
    role = f"writer_of_{database_settings.postgres_db}"
    administer(f"CREATE ROLE {role} LOGIN PASSWORD 'word'")
    yield replace(database_settings, postgres_user=role, postgres_password="word")
    with Pipeline(database_settings).database.begin() as connection:
        connection.exec_driver_sql(f"REASSIGN OWNED BY {role} TO {database_settings.postgres_user}")
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
    administer(f"DROP ROLE {role}")


def grant(owner: Settings, writer: Settings, statements: Iterable[str]) -> None:
    with Pipeline(owner).database.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement.format(role=writer.postgres_user))


def test_a_user_whom_doctor_calls_fit_can_write_a_batch(database_settings: Settings, writer: Settings) -> None:
    log: Log = busy_history(database_settings)
    grant(database_settings, writer, GRANTS)
    assert _rights(Pipeline(writer)) == f"{writer.postgres_user} has all that are needed"
    log.pipeline = Pipeline(writer)
    assert ingest_once(writer, log).inserted > 0


@pytest.mark.parametrize("left_out", GRANTS)
def test_a_missing_right_is_named(database_settings: Settings, writer: Settings, left_out: str) -> None:
    grant(database_settings, writer, [statement for statement in GRANTS if statement != left_out])
    with pytest.raises(ConfigurationError, match=GRANTS[left_out]):
        _rights(Pipeline(writer))


def test_rights_in_an_older_schema_are_not_said_to_be_missing_tables(database_settings: Settings) -> None:
    with Pipeline(database_settings).database.begin() as connection:
        connection.exec_driver_sql("DROP FUNCTION drop_readings")
        connection.exec_driver_sql("UPDATE sensor_pipeline_schema SET version_num = '0005'")
    with pytest.raises(ConfigurationError, match=r"is at version 0005, this code needs \d+; run: sensor-pipeline"):
        _rights(Pipeline(database_settings))
