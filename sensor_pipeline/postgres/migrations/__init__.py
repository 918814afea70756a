"""The schema, as Alembic migrations.

A version that was released is never edited: a change is a new file in `versions/`.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from sensor_pipeline.postgres.database import Database
from sensor_pipeline.settings import Settings

# Any number that no other program uses for an advisory lock in this database.
_LOCK = 7_360_712_915


def migrate(settings: Settings) -> None:
    """Bring the schema to this package's version; two at once run one after the other.

    Raises:
        ConfigurationError: the user may not create tables, or the database is not in UTF-8.
        UnavailableError: the database does not answer.
    """
    database = Database(settings)
    with database.begin() as connection:
        database.check_encoding(connection)
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
