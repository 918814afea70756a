"""The schema, as Alembic migrations.

A version that was released is never edited: a change is a new file in `versions/`. Each is a transaction of its own, so
that a run that was broken off goes on where it stopped. Batches may be written meanwhile: a lock that is not to be had
at once is given up and asked for again, since everybody else would queue behind the one who waits for it, and indexes
are built by `add_index`, which takes none that a writer needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from pathlib import Path

import sqlalchemy as sa
from alembic import command, op
from alembic.config import Config
from sqlalchemy.exc import DBAPIError

from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.rights import READER, WRITER, check_roles, grant
from sensor_pipeline.settings import Settings

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0

# Two that migrate run one after the other; any number that no other program uses for an advisory lock in this database.
_LOCK = 7_360_712_915
# Asked for again and again: who waits in the server has a snapshot, and an index that is built waits for its end.
_TRY_LOCK = sa.text("SELECT pg_try_advisory_lock(:lock)")
_TRY_AGAIN_SECONDS = 0.1

# Less than PostgreSQL's deadlock_timeout: where a migration and a batch wait for each other, it is the migration that
# gives way.
_LOCK_TIMEOUT = sa.text("SET lock_timeout = '500ms'")
_NO_LOCK_TIMEOUT = sa.text("SET lock_timeout = 0")
_IN_THE_WAY = {"55P03", "40P01"}
_FIRST_PAUSES = (0.5, 1.0, 2.0, 4.0)
_LONGEST_PAUSE = 5.0


def migrate(
    settings: Settings,
    *,
    writers: Sequence[str] = (),
    readers: Sequence[str] = (),
    version: str = "head",
    patience: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Bring the schema to this package's version; two at once run one after the other.

    Args:
        settings: as who owns the tables, or will.
        writers: roles to which all that the pipeline needs is granted afterwards.
        readers: roles to which reading is granted afterwards.
        version: where to stop.
        patience: seconds for which a lock that another session holds is asked for again.
        sleep: how to wait in between.

    Raises:
        ConfigurationError: the user may not create tables or grant rights, a role is missing, the database is not in
            UTF-8, or its schema is newer than this package.
        UnavailableError: the database does not answer, or a lock was not to be had. Versions that were done stay.
    """
    database = Database(settings)
    check_roles(database, [*writers, *readers])
    with database.session() as connection:
        while not connection.scalars(_TRY_LOCK, {"lock": _LOCK}).one():
            connection.rollback()
            sleep(_TRY_AGAIN_SECONDS)
        database.check_encoding(connection)
        database.check_not_newer(connection)
        connection.execute(_LOCK_TIMEOUT)
        connection.commit()
        _upgrade(connection, database.name, version, patience, sleep)
        for rights, roles in ((WRITER, writers), (READER, readers)):
            for role in roles:
                grant(connection, rights, role)
        connection.commit()


def add_index(name: str, definition: str) -> None:
    """For migrations: index a table, not a partitioned one, that is read and written meanwhile.

    It takes as long as it takes, and longer while older transactions go on, but nobody waits for it.
    """
    with op.get_context().autocommit_block():
        op.execute(_NO_LOCK_TIMEOUT)
        # One that was broken off left its index, which is no good.
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {definition}")
        op.execute(_LOCK_TIMEOUT)


def _upgrade(
    connection: sa.Connection, where: str, version: str, patience: float, sleep: Callable[[float], None]
) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    deadline = time.monotonic() + patience
    for pause in chain(_FIRST_PAUSES, repeat(_LONGEST_PAUSE)):
        try:
            command.upgrade(config, version)
        except DBAPIError as error:
            if getattr(error.orig, "pgcode", None) not in _IN_THE_WAY or time.monotonic() > deadline:
                raise
            connection.rollback()
            log.warning(
                "%s: another session is in the way of the migration (see pg_locks), next try in %s s", where, pause
            )
            sleep(pause)
        else:
            return
