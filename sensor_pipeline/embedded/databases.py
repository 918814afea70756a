"""Databases made on a server, whoever's it is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from sensor_pipeline.errors import ConfigurationError, UnavailableError


def create_database(
    name: str, *, host: str, port: int, user: str, password: str, login_database: str, tls: Mapping[str, Any]
) -> bool:
    """Create a database unless it is there; whether it was created. `tls`: libpq's parameters for it.

    Raises:
        ConfigurationError: the user may not create one.
        UnavailableError: the server cannot be reached, or refuses the login.
    """
    import psycopg2
    from psycopg2 import errors, sql

    where = f"{host}:{port}"
    try:
        with closing(
            psycopg2.connect(host=host, port=port, user=user, password=password, dbname=login_database, **tls)
        ) as connection:
            connection.autocommit = True  # CREATE DATABASE runs in no transaction
            with connection.cursor() as cursor:
                cursor.execute("SELECT FROM pg_database WHERE datname = %s", (name,))
                if cursor.fetchone() is not None:
                    return False
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
                return True
    except errors.DuplicateDatabase:  # made by another in between
        return False
    except errors.InsufficientPrivilege as error:
        raise ConfigurationError(
            f"database {name} is missing on PostgreSQL {where} and user {user} may not create it: have it made "
            f'with CREATE DATABASE "{name}" OWNER "{user}"'
        ) from error
    except psycopg2.OperationalError as error:
        said = " ".join(str(error).split())
        raise UnavailableError(
            f"cannot log in to PostgreSQL {where} as {user}, database {login_database}: {said}; "
            "check POSTGRES_HOST, POSTGRES_PORT, POSTGRES_USER, POSTGRES_PASSWORD and POSTGRES_DB"
        ) from error
