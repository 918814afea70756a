"""Dagster's storage keeps its connections, and notices when one is gone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import pytest
import sqlalchemy as sa
import yaml

from sensor_pipeline.orchestration.storage import KeptConnections
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect


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
    asked: list[str] = []
    sa.event.listen(storage.run_storage._engine, "before_cursor_execute", lambda *about: asked.append(about[2]))  # type: ignore[attr-defined]
    for first in (True, False):
        asked.clear()
        another = open_storage(database_settings)
        assert another.schedule_storage.all_instigator_state() == []
        assert another.run_storage.get_run_records() == []
        assert any("pg_catalog" in statement for statement in asked) == first


def test_a_connection_that_the_server_ended_is_replaced_unnoticed(
    storage: KeptConnections, database_settings: Settings
) -> None:
    storage.run_storage.get_runs()
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with connect(database_settings).connect() as connection:
        assert connection.scalars(sa.text(f"SELECT pg_terminate_backend(pid) {others}")).all()
    assert storage.run_storage.get_runs() == []
