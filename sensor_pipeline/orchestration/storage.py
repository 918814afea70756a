"""Dagster's storage in PostgreSQL, on connections that are kept; dagster.yaml names it.

A run reads and writes its events some 110 times. Dagster's own class connects anew each time, at 8 ms of CPU on the two
sides together: under a backlog that was a sixth of all the CPU there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster._serdes import ConfigurableClassData
from dagster_postgres.storage import DagsterPostgresStorage
from dagster_postgres.utils import create_pg_engine, get_token_provider_from_config, pg_url_from_config

# Each of the three storages keeps one; what threads need beside it is closed after use. A connection that was lost, as
# by a restart of the server, is seen before it is used.
_KEPT: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "pool_size": 1,
    "max_overflow": -1,
    "pool_pre_ping": True,
    "pool_recycle": 300,
}


class KeptConnections(DagsterPostgresStorage):
    """`DagsterPostgresStorage`, with the same settings."""

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> KeptConnections:
        """What Dagster calls with the settings in dagster.yaml."""
        url = pg_url_from_config(config_value)
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
