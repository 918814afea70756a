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
# Of this process, by address: its instances and their three storages share the connections, and what is known.
_shared: dict[str, tuple[Any, set[str]]] = {}
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
            known = url in _shared
            storage = cls(
                inst_data=inst_data,
                postgres_url=url,
                # Looked for once: to look takes three connections.
                should_autocreate_tables=not known and config_value.get("should_autocreate_tables", True),
                token_provider=token_provider,
            )
            engine, true = _shared[url] if known else (create_pg_engine(url, token_provider, **_KEPT), set())
            # Whose tokens are whose is not for this module to know.
            if token_provider is None:
                _shared[url] = engine, true
        runs: Any = storage.run_storage
        events: Any = storage.event_log_storage
        schedules: Any = storage.schedule_storage
        for part in (runs, events, schedules):
            part._engine = engine
        for part, name in (
            (runs, "has_run_stats_index_cols"),
            (runs, "has_backfill_id_column"),
            (schedules, "_has_instigators_table"),
            (schedules, "has_built_index"),
        ):
            setattr(part, name, _until_true(getattr(part, name), name, true))
        return storage


def _until_true(ask: Callable[..., bool], question: str, true: set[str]) -> Callable[..., bool]:
    """Dagster lists tables and columns a dozen times a tick, to find what only the databases of old releases lack."""

    def answer(*about: Any) -> bool:
        # About a migration of this name; anything else is the connection to ask on.
        name = " ".join([question, *(of for of in about if isinstance(of, str))])
        if name not in true and ask(*about):
            true.add(name)
        return name in true

    return answer
