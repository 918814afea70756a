"""Connections, and the database's errors as this package's own, told apart by SQLSTATE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from psycopg2 import DataError as DriverDataError
from psycopg2 import Error as DriverError
from psycopg2 import IntegrityError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from sensor_pipeline.errors import ConfigurationError, DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.settings import Settings

# The newest migration; a test holds it to the scripts, which would take Alembic to ask at run time.
SCHEMA_VERSION = "0001"
VERSION_TABLE = "sensor_pipeline_schema"

_CONNECT_SECONDS = 10
# A host that vanishes in the middle of a transaction keeps its locks until its connection is given up; the default
# of most systems is two hours. Both ends are told: this one, and the server.
_KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_TCP_USER_TIMEOUT_MS = 60_000
_NOT_MIGRATED = {"42P01", "42703", "3F000", "42883"}
# Another program's table in the way, a feature that the version lacks.
_WRONG_STATEMENT = {"42", "0A"}
_RIGHTS = {"28", "42501", "3D"}


class Database:
    """The settings' database. Every transaction has a connection of its own, closed after it.

    A connection that is kept would have to be tested before each use, after a restart of the server and
    between batches minutes apart; a new one takes about 5 ms.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = f"{settings.postgres_host}:{settings.postgres_port}/{settings.postgres_db}"
        self._user = settings.postgres_user
        ssl = {"sslmode": settings.postgres_sslmode} if settings.postgres_sslmode else {}
        self._engine = sa.create_engine(
            sa.URL.create(
                "postgresql+psycopg2",
                username=settings.postgres_user,
                password=settings.postgres_password,
                host=settings.postgres_host,
                port=settings.postgres_port,
                database=settings.postgres_db,
            ),
            poolclass=NullPool,
            connect_args={
                "connect_timeout": _CONNECT_SECONDS,
                "application_name": "sensor_pipeline",
                # COPY's bytes are UTF-8, whatever the server, the role or PGCLIENTENCODING say.
                "client_encoding": "utf8",
                # Timestamps come back in UTC: year 1 has no earlier local time in Python. The transaction's order of
                # statements is made for READ COMMITTED.
                "options": r"-c timezone=UTC -c default_transaction_isolation=read\ committed "
                + " ".join(f"-c tcp_{name}={value}" for name, value in _KEEPALIVE.items())
                + f" -c tcp_user_timeout={_TCP_USER_TIMEOUT_MS}",
                **_KEEPALIVE,
                "tcp_user_timeout": _TCP_USER_TIMEOUT_MS,
                **ssl,
            },
        )

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction, committed at the end of the block and rolled back on any error.

        Raises:
            UnavailableError, ConfigurationError, DataError: what the database refused, by SQLSTATE.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            raise self._translate(error.orig) from error
        except DriverError as error:
            raise self._translate(error) from error

    def check_schema(self, connection: sa.Connection) -> None:
        """Refuse a schema that is not the one of this code.

        Raises:
            ConfigurationError: with what to do.
        """
        exists = connection.scalar(sa.text("SELECT to_regclass(:name) IS NOT NULL"), {"name": VERSION_TABLE})
        found = connection.scalar(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")) if exists else None
        if found is None:
            raise self._not_migrated()
        if found != SCHEMA_VERSION:
            newer = str(found) > SCHEMA_VERSION
            remedy = "install that newer sensor_pipeline" if newer else "run: sensor-pipeline migrate"
            raise ConfigurationError(
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

    def _translate(self, error: BaseException | None) -> SensorPipelineError:
        said = " ".join(str(error).split("\n")[0].split())
        state = getattr(error, "pgcode", None) or ""
        if not state:  # libpq could not connect, or lost the connection
            return UnavailableError(
                f"no connection to PostgreSQL at {self.name} as {self._user}: {said or 'it was closed'}; check that it "
                "runs and POSTGRES_HOST, _PORT, _DB, _USER and _PASSWORD, then try again"
            )
        if state in _NOT_MIGRATED:
            return self._not_migrated()
        if state in _RIGHTS or state[:2] in _RIGHTS:
            return ConfigurationError(
                f"PostgreSQL at {self.name} does not let {self._user} do this: {said}; have the right granted, or "
                "correct POSTGRES_USER, _PASSWORD and _DB"
            )
        if about_content(error):
            return DataError(f"PostgreSQL at {self.name} refuses a row for its content ({state}): {said}")
        if state[:2] in _WRONG_STATEMENT:
            return ConfigurationError(
                f"PostgreSQL at {self.name} does not take it ({state}): {said}; nothing was changed, and trying again "
                "will not help: look at the database's own tables and version"
            )
        return UnavailableError(
            f"PostgreSQL at {self.name} could not do it now ({state}): {said}; nothing was changed, try again"
        )


def about_content(error: BaseException | None) -> bool:
    """Whether the database refused a row for what it holds, rather than for the state that the database is in."""
    if isinstance(error, IntegrityError):
        # One that names neither says that a partition is missing.
        return bool(error.diag.constraint_name or error.diag.column_name)
    return isinstance(error, DriverDataError)
