"""Dagster's storage in PostgreSQL, on connections that are kept; dagster.yaml names it.

A run reads and writes its events some 110 times. Dagster's own class connects anew each time, at 8 ms of CPU on the two
sides together: under a backlog that was a sixth of all the CPU there is. With nothing to ingest, connections were a
quarter of what the stack costs: each tick has an instance of its own, and the daemon asks from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

from dagster._serdes import ConfigurableClassData
from dagster_postgres.storage import DagsterPostgresStorage
from dagster_postgres.utils import create_pg_engine, get_token_provider_from_config, pg_url_from_config

# What threads need beside these is closed after use. A connection that was lost, as by a restart of the server, is seen
# before it is used.
_KEPT: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "pool_size": 4,
    "max_overflow": -1,
    "pool_use_lifo": True,
    "pool_pre_ping": True,
    "pool_recycle": 300,
    # It would ask each new connection for a type that Dagster has no use for.
    "use_native_hstore": False,
}
# Of this process, by address: its instances and their three storages share the connections.
_engines: dict[str, Any] = {}
_lock = Lock()


class KeptConnections(DagsterPostgresStorage):
    """`DagsterPostgresStorage`, with the same settings."""

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> KeptConnections:
        """What Dagster calls with the settings in dagster.yaml."""
        url = pg_url_from_config(config_value)
        token_provider = get_token_provider_from_config(config_value)
        with _lock:
            known = _engines.get(url)
            storage = cls(
                inst_data=inst_data,
                postgres_url=url,
                # Looked for once: to look takes three connections.
                should_autocreate_tables=known is None and config_value.get("should_autocreate_tables", True),
                token_provider=token_provider,
            )
            engine = known or create_pg_engine(url, token_provider, **_KEPT)
            # Whose tokens are whose is not for this module to know.
            if token_provider is None:
                _engines[url] = engine
        parts: list[Any] = [storage.run_storage, storage.event_log_storage, storage.schedule_storage]
        for part in parts:
            part._engine = engine
        schedules: Any = storage.schedule_storage
        schedules._has_instigators_table = _until_true(schedules._has_instigators_table)
        schedules.has_built_index = _until_true(schedules.has_built_index)
        return storage


def _until_true(ask: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Dagster lists the database's tables a dozen times a tick, for what only older releases lacked."""
    true: set[str] = set()

    def answer(of: Any) -> bool:
        name = of if isinstance(of, str) else ""  # a migration's name, or the connection to ask on
        if name not in true and ask(of):
            true.add(name)
        return name in true

    return answer
