"""What users may do in the database, granted and checked by one list. The owner migrates, and may everything.

A writer is whom the pipeline runs as. A reader is whoever looks: with psql, a dashboard, a notebook, or `status` and
`verify`. Of `readings` only the table itself is granted: its partitions, those of days to come too, are read and
written through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import sqlalchemy as sa
from psycopg2 import sql

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.postgres.database import VERSION_TABLE, Database

_MISSING_ROLES = sa.text("""
    SELECT quote_ident(name) FROM unnest(CAST(:names AS text[])) AS name
    WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
""")
_PLACE = sa.text("SELECT current_database() AS database, current_schema() AS schema, current_user AS owner")
_HAS = {
    "DATABASE": sa.text("SELECT has_database_privilege(:role, :name, :right)"),
    "SCHEMA": sa.text("SELECT has_schema_privilege(:role, :name, :right)"),
    "TABLE": sa.text("SELECT has_table_privilege(:role, :name, :right)"),
    "SEQUENCE": sa.text("SELECT has_sequence_privilege(:role, :name, :right)"),
    "FUNCTION": sa.text("SELECT has_function_privilege(:role, :name, :right)"),
}


@dataclass(frozen=True)
class Rights:
    """What is needed of the tables, and which sequences and functions are used."""

    tables: Mapping[str, Sequence[str]]
    sequences: Sequence[str] = ()
    functions: Sequence[str] = ()


WRITER = Rights(
    tables={
        "topics": ("SELECT", "INSERT", "UPDATE"),  # UPDATE is what its lock asks for
        "machines": ("SELECT", "INSERT", "UPDATE"),
        "failures": ("SELECT", "INSERT", "UPDATE", "DELETE"),
        "readings": ("SELECT", "INSERT", "UPDATE"),
        "readings_horizon": ("SELECT",),
        "dropped_readings": ("SELECT",),
        "rejected_messages": ("SELECT", "INSERT", "UPDATE", "DELETE"),  # UPDATE is what its lock asks for
        "ingested_offsets": ("SELECT", "INSERT", "UPDATE"),
        "batches": ("SELECT", "INSERT", "DELETE"),
        "accepted_gaps": ("SELECT", "INSERT"),
        "notices": ("SELECT", "INSERT", "UPDATE", "DELETE"),
        VERSION_TABLE: ("SELECT",),
    },
    sequences=("failures_id_seq", "readings_id_seq"),
    functions=("make_readings_day(date)", "keep_readings_from(date)", "drop_readings()"),
)
READER = Rights(tables=dict.fromkeys(WRITER.tables, ("SELECT",)))


def missing_rights(connection: sa.Connection, rights: Rights, role: str) -> list[str]:
    """What a role lacks of these rights, such as `INSERT on machines`; the schema is this code's."""
    place = connection.execute(_PLACE).one()
    return [
        f"{right} on {name}"
        for kind, name, right in _each(rights, place)
        if not connection.scalars(_HAS[kind], {"role": role, "name": name, "right": right}).one()
    ]


def check_roles(database: Database, roles: Sequence[str]) -> None:
    """Refuse roles that do not exist.

    Raises:
        ConfigurationError: with what to do.
    """
    with database.begin() as connection:
        missing = connection.scalars(_MISSING_ROLES, {"names": list(roles)}).all()
    if missing:
        made = "; ".join(f"CREATE ROLE {name} LOGIN PASSWORD '…'" for name in missing)
        raise ConfigurationError(
            f"there is no role {', '.join(missing)} at {database.name}, and nothing was changed; have it made "
            f"({made}), then run this again"
        )


def grant(connection: sa.Connection, rights: Rights, role: str) -> None:
    """Grant a role these rights; what it has stays, and what others granted too.

    Raises:
        ConfigurationError: they are not all this user's to grant.
    """
    place = connection.execute(_PLACE).one()
    with closing(connection.connection.cursor()) as cursor:
        for kind, name, right in _each(rights, place):
            on = sql.SQL(name) if kind == "FUNCTION" else sql.Identifier(name)
            statement = sql.SQL("GRANT {} ON {} {} TO {}")
            cursor.execute(statement.format(sql.SQL(right), sql.SQL(kind), on, sql.Identifier(role)))
    if missing := missing_rights(connection, rights, role):
        raise ConfigurationError(
            f"{place.owner} may not grant {role} {', '.join(missing)}; have the owner of database {place.database} "
            "grant it, then run this again"
        )


def _each(rights: Rights, place: sa.Row[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [
        ("DATABASE", place.database, "CONNECT"),
        ("SCHEMA", place.schema, "USAGE"),
        *(("TABLE", table, right) for table, of_table in rights.tables.items() for right in of_table),
        *(("SEQUENCE", name, "USAGE") for name in rights.sequences),
        *(("FUNCTION", name, "EXECUTE") for name in rights.functions),
    ]
