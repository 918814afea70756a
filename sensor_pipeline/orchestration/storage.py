"""Dagster's storage in PostgreSQL, on connections that are kept; dagster.yaml names it.

A run reads and writes its events some 110 times. Dagster's own class connects anew each time, at 8 ms of CPU on the two
sides together: under a backlog that was a sixth of all the CPU there is. With nothing to ingest, connections were a
quarter of what the stack costs: each tick has an instance of its own, and the daemon asks from several threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any
from urllib.parse import quote, urlencode

from dagster._serdes import ConfigurableClassData
from dagster_postgres.storage import DagsterPostgresStorage
from dagster_postgres.utils import create_pg_engine, get_token_provider_from_config, pg_url_from_config

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.postgres.lost_connections import replace_lost
from sensor_pipeline.settings import Settings, with_secrets

# What threads need beside these is closed after use.
_KEPT: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "pool_size": 4,
    "max_overflow": -1,
    "pool_use_lifo": True,
    "pool_recycle": 300,
    # It would ask each new connection for a type that Dagster has no use for.
    "use_native_hstore": False,
}
# To ask before each use whether a connection is still there was half of all that Dagster asked. It asks in bursts, and
# within one the first answer holds.
_TRUSTED_SECONDS = 0.1
# By process and address: a process's instances and their three storages share the connections, and what is known. One
# that was forked, such as a worker's, must not share those of its parent.
_shared: dict[tuple[int, str], tuple[Any, set[str]]] = {}
_lock = Lock()

_LOGIN = ("POSTGRES_USER", "POSTGRES_PASSWORD")
_SERVER = ("POSTGRES_HOST", "POSTGRES_PORT", "POSTGRES_SSLMODE", "POSTGRES_SSLROOTCERT")


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
        place = os.getpid(), url
        with _lock:
            known = place in _shared
            storage = cls(
                inst_data=inst_data,
                postgres_url=url,
                # Looked for once: to look takes three connections.
                should_autocreate_tables=not known and config_value.get("should_autocreate_tables", True),
                token_provider=token_provider,
            )
            engine, true = _shared[place] if known else (_connect(url, token_provider), set())
            # Whose tokens are whose is not for this module to know.
            if token_provider is None:
                _shared[place] = engine, true
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


def _connect(url: str, token_provider: Any) -> Any:
    engine = create_pg_engine(url, token_provider, **_KEPT)
    replace_lost(engine, _TRUSTED_SECONDS)
    return engine


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
    query = f"?{urlencode(settings.postgres_tls)}" if settings.postgres_tls else ""
    # Without the driver's name SQLAlchemy 2.1 takes another one.
    return (
        f"postgresql+psycopg2://{user}:{password}@{settings.postgres_host}:{settings.postgres_port}"
        f"/{quote(database, safe='')}{query}"
    )


def _until_true(ask: Callable[..., bool], question: str, true: set[str]) -> Callable[..., bool]:
    """Dagster lists tables and columns a dozen times a tick, to find what only the databases of old releases lack."""

    def answer(*about: Any) -> bool:
        # About a migration of this name; anything else is the connection to ask on.
        name = " ".join([question, *(of for of in about if isinstance(of, str))])
        if name not in true and ask(*about):
            true.add(name)
        return name in true

    return answer
