"""Dagster's storage in PostgreSQL, on connections that are kept; dagster.yaml names it.

A run reads and writes its events some 110 times. Dagster's own class connects anew each time, at 8 ms of CPU on the two
sides together: under a backlog that was a sixth of all the CPU there is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from dagster._serdes import ConfigurableClassData
from dagster_postgres.storage import DagsterPostgresStorage
from dagster_postgres.utils import create_pg_engine, get_token_provider_from_config, pg_url_from_config

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.settings import Settings, with_secrets

# Each of the three storages keeps one; what threads need beside it is closed after use. A connection that was lost, as
# by a restart of the server, is seen before it is used.
_KEPT: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "pool_size": 1,
    "max_overflow": -1,
    "pool_pre_ping": True,
    "pool_recycle": 300,
}


_LOGIN = ("POSTGRES_USER", "POSTGRES_PASSWORD")
_SERVER = ("POSTGRES_HOST", "POSTGRES_PORT", "POSTGRES_SSLMODE")


class KeptConnections(DagsterPostgresStorage):
    """`DagsterPostgresStorage`, with the same settings; where they name no database, the environment does."""

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> KeptConnections:
        """What Dagster calls with the settings in dagster.yaml."""
        is_named = "postgres_db" in config_value or "postgres_url" in config_value
        url = pg_url_from_config(config_value) if is_named else url_of(os.environ)
        token_provider = get_token_provider_from_config(config_value)
        storage = cls(
            inst_data=inst_data,
            postgres_url=url,
            should_autocreate_tables=config_value.get("should_autocreate_tables", True),
            token_provider=token_provider,
        )
        parts: list[Any] = [storage.run_storage, storage.event_log_storage, storage.schedule_storage]
        for part in parts:
            part._engine = create_pg_engine(url, token_provider, **_KEPT)
        return storage


def url_of(env: Mapping[str, str]) -> str:
    """Where Dagster's tables are: `DAGSTER_POSTGRES_DB` on the pipeline's server.

    The login is `DAGSTER_POSTGRES_USER` with `DAGSTER_POSTGRES_PASSWORD` (or the file that
    `DAGSTER_POSTGRES_PASSWORD_FILE` names), or else the pipeline's own.

    Raises:
        ConfigurationError: the database is not named, or a setting is wrong.
    """
    prefix = "DAGSTER_" if env.get("DAGSTER_POSTGRES_USER") else ""
    env = with_secrets(env, [f"{prefix}POSTGRES_PASSWORD"])
    database = env.get("DAGSTER_POSTGRES_DB", "").strip()
    if not database:
        raise ConfigurationError("DAGSTER_POSTGRES_DB is not set; name the database for Dagster's own tables")
    login = {name: env.get(prefix + name, "") for name in _LOGIN}
    server = {name: env.get(name, "") for name in _SERVER}
    settings = Settings.from_env({**server, **login, "POSTGRES_DB": database})
    user, password = (quote(text, safe="") for text in (settings.postgres_user, settings.postgres_password))
    query = f"?sslmode={settings.postgres_sslmode}" if settings.postgres_sslmode else ""
    # Without the driver's name SQLAlchemy 2.1 takes another one.
    return (
        f"postgresql+psycopg2://{user}:{password}@{settings.postgres_host}:{settings.postgres_port}"
        f"/{quote(database, safe='')}{query}"
    )
