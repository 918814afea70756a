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


@pytest.fixture
def storage(database_settings: Settings) -> Iterator[KeptConnections]:
    settings = database_settings
    login = {"username": settings.postgres_user, "password": settings.postgres_password}
    place = {"hostname": settings.postgres_host, "port": settings.postgres_port, "db_name": settings.postgres_db}
    storage = KeptConnections.from_config_value(
        None, {"postgres_db": {"scheme": "postgresql+psycopg2", **login, **place}}
    )
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


def test_a_connection_that_the_server_ended_is_replaced_unnoticed(
    storage: KeptConnections, database_settings: Settings
) -> None:
    storage.run_storage.get_runs()
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with connect(database_settings).connect() as connection:
        assert connection.scalars(sa.text(f"SELECT pg_terminate_backend(pid) {others}")).all()
    assert storage.run_storage.get_runs() == []
