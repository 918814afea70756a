"""Dagster's storage keeps its connections, and notices when one is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import resources

import pytest
import sqlalchemy as sa
import yaml

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.orchestration.storage import _TRUSTED_SECONDS, KeptConnections, url_of
from sensor_pipeline.postgres import lost_connections
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.orchestration.jobs import environment_of


def open_storage(settings: Settings) -> KeptConnections:
    login = {"username": settings.postgres_user, "password": settings.postgres_password}
    place = {"hostname": settings.postgres_host, "port": settings.postgres_port, "db_name": settings.postgres_db}
    return KeptConnections.from_config_value(None, {"postgres_db": {"scheme": "postgresql+psycopg2", **login, **place}})


@pytest.fixture
def storage(database_settings: Settings) -> Iterator[KeptConnections]:
    storage = open_storage(database_settings)
    yield storage
    for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
        part._engine.dispose()  # type: ignore[attr-defined]


def test_the_instance_settings_name_this_storage() -> None:
    text = resources.files("sensor_pipeline.orchestration").joinpath("dagster.yaml").read_text()
    named = yaml.safe_load(text)["storage"]["custom"]
    assert (named["module"], named["class"]) == (KeptConnections.__module__, KeptConnections.__name__)


def test_many_questions_are_asked_on_one_connection(storage: KeptConnections) -> None:
    made: list[object] = []
    sa.event.listen(storage.run_storage._engine, "connect", lambda *connection: made.append(connection))  # type: ignore[attr-defined]
    for _ in range(20):
        assert storage.run_storage.get_runs() == []
    assert len(made) == 1


def test_instances_of_a_process_and_their_storages_share_connections(
    storage: KeptConnections, database_settings: Settings
) -> None:
    made: list[object] = []
    sa.event.listen(storage.run_storage._engine, "connect", lambda *connection: made.append(connection))  # type: ignore[attr-defined]
    for _ in range(5):
        another = open_storage(database_settings)
        assert another.run_storage.get_runs() == []
        assert another.schedule_storage.all_instigator_state() == []
        assert another.event_log_storage.all_asset_keys() == []
    assert len(made) == 1


def test_threads_at_once_leave_no_more_connections_open_than_are_kept(storage: KeptConnections) -> None:
    pool = storage.run_storage._engine.pool  # type: ignore[attr-defined]
    held = [pool.connect() for _ in range(10)]
    for connection in held:
        connection.close()
    assert pool.checkedin() == 4


def test_tables_and_columns_are_listed_once_in_a_process_and_not_at_each_tick(
    storage: KeptConnections, database_settings: Settings
) -> None:
    def asked_in_a_tick() -> list[str]:
        another = open_storage(database_settings)
        asked: list[str] = []
        engine = another.run_storage._engine  # type: ignore[attr-defined]
        sa.event.listen(engine, "before_cursor_execute", lambda *about: asked.append(about[2]))
        assert another.schedule_storage.all_instigator_state() == []
        assert another.run_storage.get_run_records() == []
        return asked

    assert any("pg_catalog" in statement for statement in asked_in_a_tick())
    again = asked_in_a_tick()
    assert again
    assert not any("pg_catalog" in statement for statement in again)


def test_a_connection_that_the_server_ended_is_replaced_unnoticed(
    storage: KeptConnections, database_settings: Settings
) -> None:
    storage.run_storage.get_runs()
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with connect(database_settings).connect() as connection:
        assert connection.scalars(sa.text(f"SELECT pg_terminate_backend(pid) {others}")).all()
    time.sleep(_TRUSTED_SECONDS)
    assert storage.run_storage.get_runs() == []


def test_whether_a_connection_is_there_is_asked_once_for_many_questions(
    storage: KeptConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = storage.run_storage._engine  # type: ignore[attr-defined]
    asked: list[object] = []
    ping = engine.dialect.do_ping
    monkeypatch.setattr(engine.dialect, "do_ping", lambda connection: asked.append(connection) or ping(connection))
    monkeypatch.setattr(lost_connections.time, "monotonic", lambda: now)
    now = 1.0
    for _ in range(20):
        storage.run_storage.get_runs()
    del asked[:]
    for _ in range(20):
        storage.run_storage.get_runs()
    assert asked == []
    now += 2 * _TRUSTED_SECONDS
    storage.run_storage.get_runs()
    assert len(asked) == 1


def test_without_a_database_in_its_settings_the_environment_names_it(
    database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment_of(database_settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DAGSTER_POSTGRES_DB", database_settings.postgres_db)
    storage = KeptConnections.from_config_value(None, {"should_autocreate_tables": True})
    assert storage.run_storage.get_runs() == []
    for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
        part._engine.dispose()  # type: ignore[attr-defined]


def test_the_login_is_dagsters_own_or_else_the_pipelines() -> None:
    env = {"POSTGRES_HOST": "db", "POSTGRES_USER": "me", "POSTGRES_PASSWORD": "p", "DAGSTER_POSTGRES_DB": "runs"}
    assert url_of(env) == "postgresql+psycopg2://me:p@db:5432/runs"
    own = {"DAGSTER_POSTGRES_USER": "d/d", "DAGSTER_POSTGRES_PASSWORD": "a@b", "POSTGRES_SSLMODE": "verify-full"}
    assert url_of(env | own) == "postgresql+psycopg2://d%2Fd:a%40b@db:5432/runs?sslmode=verify-full"


def test_a_database_that_is_not_named_is_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="DAGSTER_POSTGRES_DB is not set; name the database"):
        url_of({"POSTGRES_HOST": "db"})
