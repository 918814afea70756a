"""Connections, and the database's errors as this package's own, told apart by SQLSTATE."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from psycopg2 import DataError as DriverDataError
from psycopg2 import Error as DriverError
from psycopg2 import IntegrityError, InterfaceError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool, QueuePool

from sensor_pipeline.errors import ConfigurationError, DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.postgres.lost_connections import replace_lost
from sensor_pipeline.settings import Settings
from sensor_pipeline.tls import certificate_problem

# The newest migration; a test holds it to the scripts, which would take Alembic to ask at run time.
SCHEMA_VERSION = "0007"
VERSION_TABLE = "sensor_pipeline_schema"

_CONNECT_SECONDS = 10
# Another host may have taken over the server's name meanwhile.
_KEPT_SECONDS = 300
_VERIFYING = {"verify-ca", "verify-full"}
# Asks a server whether it speaks TLS; it answers with a byte ("SSL Request" in PostgreSQL's protocol).
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
# A host that vanishes in the middle of a transaction keeps its locks until its connection is given up; the default
# of most systems is two hours. Both ends are told: this one, and the server.
_KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_TCP_USER_TIMEOUT_MS = 60_000
_NOT_MIGRATED = {"42P01", "42703", "3F000", "42883"}
# Another program's table in the way, a column of another type (so that the binary copy does not fit), a feature that
# the version lacks.
_WRONG_STATEMENT = {"42", "0A", "22P03", "22P04"}
_RIGHTS = {"28", "42501", "3D"}
# RAISE in somebody's trigger without a state of its own: it may mean the row, or anything.
_TRIGGER = "P0"
# Of a row: too large for an index. Of any other statement: nothing of its content.
_LIMIT = "54"
_STANDBY = "it is a standby: set POSTGRES_HOST (and _PORT) to the primary, or promote it"
# What helps, by SQLSTATE or by its class; "then try again" follows.
_REMEDIES = {
    "25006": "switch off default_transaction_read_only (of the server, the database or the user)",
    "25P03": "raise idle_in_transaction_session_timeout (of the server, the database or the user)",
    "25P04": "raise transaction_timeout (of the server, the database or the user)",
    "40": "wait a moment: another session was in the way",
    "53100": "make room on the server's disk (for its data, its tablespaces or its WAL)",
    "53200": "give the server more memory (or, if it speaks of locks, raise max_locks_per_transaction)",
    "53300": "raise max_connections (or the database's or user's CONNECTION LIMIT), or close other sessions",
    "53400": "raise the limit that it speaks of",
    _LIMIT: "mend what exceeds the limit that it speaks of",
    "55P03": "end the session that holds the lock (see pg_blocking_pids), or raise lock_timeout (of the server, the "
    "database or the user) where it is set",
    "57014": "raise statement_timeout (of the server, the database or the user), or ask who cancelled it",
    "57P05": "raise idle_session_timeout (of the server, the database or the user)",
    "57P": "wait a moment: the server stops or starts, or was told to end this session",
    "58": "look at the server's disk and log",
    "XX": "look at the server's log: its data may be damaged",
}
_OTHERWISE = "look at the server's log"


class Database:
    """The settings' database. Every transaction has a connection of its own, closed after it.

    To connect takes about 5 ms on either side, which is little for a batch. For who asks little and every few seconds,
    without an end, it is most of the work.

    Args:
        settings: where it is, and the login.
        kept: so many connections stay open for the next transaction; whether one is still there is asked before it, and
            one on which something failed is not used again.
    """

    def __init__(self, settings: Settings, *, kept: int = 0) -> None:
        self.name = f"{settings.postgres_host}:{settings.postgres_port}/{settings.postgres_db}"
        self._user = settings.postgres_user
        self._tls = settings.postgres_tls
        self._server = (settings.postgres_host, settings.postgres_port)
        tcp_user_timeout = _TCP_USER_TIMEOUT_MS if not kept else _CONNECT_SECONDS * 1000
        self._engine = sa.create_engine(
            sa.URL.create(
                "postgresql+psycopg2",
                username=settings.postgres_user,
                password=settings.postgres_password,
                host=settings.postgres_host,
                port=settings.postgres_port,
                database=settings.postgres_db,
            ),
            poolclass=QueuePool if kept else NullPool,
            **({"pool_size": kept, "max_overflow": -1, "pool_recycle": _KEPT_SECONDS} if kept else {}),
            # It would ask each new connection for a type that no table here has.
            use_native_hstore=False,
            connect_args={
                "connect_timeout": _CONNECT_SECONDS,
                "application_name": "sensor_pipeline",
                # COPY's bytes are UTF-8, whatever the server, the role or PGCLIENTENCODING say.
                "client_encoding": "utf8",
                # Timestamps come back in UTC: year 1 has no earlier local time in Python. The transaction's order of
                # statements is made for READ COMMITTED.
                "options": r"-c timezone=UTC -c default_transaction_isolation=read\ committed "
                + " ".join(f"-c tcp_{name}={value}" for name, value in _KEEPALIVE.items())
                + f" -c tcp_user_timeout={tcp_user_timeout}",
                **_KEEPALIVE,
                "tcp_user_timeout": tcp_user_timeout,
                **self._tls,
            },
        )
        if kept:
            replace_lost(self._engine, trusted_seconds=0)

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction, committed at the end of the block and rolled back on any error.

        Raises:
            UnavailableError, ConfigurationError, DataError: what the database refused, by SQLSTATE.
        """
        with self.session() as connection, connection.begin():
            yield connection

    @contextmanager
    def session(self) -> Iterator[sa.Connection]:
        """A connection whose block begins and ends transactions by itself; raises as `begin` does."""
        is_standby: bool | None = None
        try:
            with self._engine.connect() as connection:
                is_standby = _is_standby(connection)
                try:
                    yield connection
                except BaseException:
                    # What is set for a database or a user, a session sees only when it is made: what is mended there
                    # is to be seen by the next try, so that this session is not kept.
                    connection.invalidate()
                    raise
        except DBAPIError as error:
            raise self._translate(error.orig, is_standby) from error
        except DriverError as error:
            raise self._translate(error, is_standby) from error

    def check_schema(self, connection: sa.Connection) -> None:
        """Refuse a schema that is not the one of this code.

        Raises:
            ConfigurationError: with what to do.
        """
        found = self._schema_version(connection)
        if found is None:
            raise self._not_migrated()
        if found != SCHEMA_VERSION:
            raise self._other_schema(found)

    def check_not_newer(self, connection: sa.Connection) -> None:
        """Refuse a schema that this code does not know yet.

        Raises:
            ConfigurationError: with what to do.
        """
        found = self._schema_version(connection)
        if found is not None and found > SCHEMA_VERSION:
            raise self._other_schema(found)

    def _schema_version(self, connection: sa.Connection) -> str | None:
        exists = connection.scalar(sa.text("SELECT to_regclass(:name) IS NOT NULL"), {"name": VERSION_TABLE})
        return connection.scalar(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")) if exists else None

    def _other_schema(self, found: str) -> ConfigurationError:
        remedy = "install that newer sensor_pipeline" if found > SCHEMA_VERSION else "run: sensor-pipeline migrate"
        return ConfigurationError(
            f"the schema of {self.name} is at version {found}, this code needs {SCHEMA_VERSION}; {remedy}"
        )

    def check_encoding(self, connection: sa.Connection) -> None:
        """Refuse a database that cannot hold every text that a message may have.

        Raises:
            ConfigurationError: with what to do.
        """
        encoding = connection.scalars(sa.text("SELECT getdatabaseencoding()")).one()
        if encoding != "UTF8":
            raise ConfigurationError(
                f"database {self.name} is in {encoding}, and sensor_pipeline needs one in UTF-8: "
                "createdb --encoding UTF8 --template template0 NAME, then set POSTGRES_DB"
            )

    def _not_migrated(self) -> ConfigurationError:
        return ConfigurationError(
            f"database {self.name} does not have the tables of sensor_pipeline yet; run: sensor-pipeline migrate"
        )

    def _translate(self, error: BaseException | None, is_standby: bool | None) -> SensorPipelineError:
        """An error as one of ours; `is_standby` is None where there was no connection."""
        error = _cause(error)
        said = " ".join(str(error).split("\n")[0].split())
        state = getattr(error, "pgcode", None) or ""
        if not state:
            return self._no_connection(said, connected=is_standby is not None)
        if state in _NOT_MIGRATED:
            return self._not_migrated()
        if state in _RIGHTS or state[:2] in _RIGHTS:
            return ConfigurationError(
                f"PostgreSQL at {self.name} does not let {self._user} do this: {said}; have the right granted, or "
                "correct POSTGRES_USER, _PASSWORD and _DB"
            )
        if about_content(error) and state[:2] != _LIMIT:
            return DataError(
                f"PostgreSQL at {self.name} refuses a row for its content ({state}): {said}; nothing was changed. Mend "
                "what refuses it (a constraint, an index, a trigger), then try again"
            )
        if state[:2] == _TRIGGER:
            return DataError(
                f"a trigger or function of PostgreSQL at {self.name} refuses this ({state}): {said}; nothing was "
                "changed. Mend it, then try again; one that means a single row should raise check_violation, and only "
                "that row is rejected"
            )
        if state in _WRONG_STATEMENT or state[:2] in _WRONG_STATEMENT:
            return ConfigurationError(
                f"PostgreSQL at {self.name} does not take it ({state}): {said}; nothing was changed, and trying again "
                "will not help: look at the database's own tables and version"
            )
        # A session that is cut off may have been so in its commit: whether that happened is in the ledger.
        unchanged = "" if state.startswith(("57P", "08")) else "nothing was changed; "
        remedy = _remedy(state, is_standby=bool(is_standby))
        return UnavailableError(
            f"PostgreSQL at {self.name} could not do it now ({state}): {said}; {unchanged}{remedy}, then try again"
        )

    def _no_connection(self, said: str, *, connected: bool) -> SensorPipelineError:
        """Libpq gives no SQLSTATE here, also where the server sent one, so that all that it may be is named."""
        if connected:
            return UnavailableError(
                f"no connection to PostgreSQL at {self.name} as {self._user} any more: {said or 'it was closed'}; if "
                "the server was restarted or the network failed, that passes by itself; if the server's log says that "
                "it ended the session, raise idle_in_transaction_session_timeout or transaction_timeout; then try again"
            )
        if problem := self._certificate_problem():
            return ConfigurationError(f"the certificate of PostgreSQL at {self.name} is refused: {problem}")
        return UnavailableError(
            f"no connection to PostgreSQL at {self.name} as {self._user}: {said or 'it was closed'}; check that it "
            "runs (if not, its log says why) and POSTGRES_HOST, _PORT, _DB, _USER and _PASSWORD; if this is about "
            "SSL or encryption, POSTGRES_SSLMODE and _SSLROOTCERT; if it only starts up, that passes by itself; if it "
            "has too many connections, raise max_connections or the CONNECTION LIMIT, or close other sessions; then "
            "try again"
        )

    def _certificate_problem(self) -> str | None:
        mode, authorities = self._tls.get("sslmode"), self._tls.get("sslrootcert")
        if mode not in _VERIFYING or authorities is None:
            return None
        return certificate_problem(
            *self._server,
            authorities=None if authorities == "system" else authorities,
            setting="POSTGRES_SSLROOTCERT",
            check_name=mode == "verify-full",
            ask_for_tls=_ask_for_tls,
        )


def _ask_for_tls(connection: socket.socket) -> None:
    connection.sendall(_SSL_REQUEST)
    connection.recv(1)


def _cause(error: BaseException | None) -> BaseException | None:
    """What came first, where a rollback then only found the connection closed."""
    while isinstance(error, InterfaceError) and isinstance(error.__context__, DriverError):
        error = error.__context__
    return error


def _is_standby(connection: sa.Connection) -> bool:
    driver = connection.connection.driver_connection
    # Not asked for: the server reports it, from version 14 on, and the driver keeps it.
    return driver is not None and driver.get_parameter_status("in_hot_standby") == "on"


def _remedy(state: str, *, is_standby: bool) -> str:
    if state == "25006" and is_standby:
        return _STANDBY
    return next((_REMEDIES[key] for key in (state, state[:3], state[:2]) if key in _REMEDIES), _OTHERWISE)


def about_content(error: BaseException | None) -> bool:
    """Whether the database refused a row for what it holds, rather than for the state that the database is in."""
    if not isinstance(error, DriverError) or error.pgcode in _WRONG_STATEMENT:
        return False
    if isinstance(error, IntegrityError):
        # One that names a table and neither of these says that a partition is missing; a trigger's names nothing.
        return bool(error.diag.constraint_name or error.diag.column_name or not error.diag.table_name)
    return isinstance(error, DriverDataError) or (error.pgcode or "").startswith(_LIMIT)
