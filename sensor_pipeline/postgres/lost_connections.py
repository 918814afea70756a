"""Seeing before it is used that a kept connection was lost, such as by a restart of the server."""

from __future__ import annotations

import math
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry


def replace_lost(engine: sa.Engine, trusted_seconds: float) -> None:
    """Ask the server whether a connection of the engine's pool is still there, and connect anew where it is not.

    SQLAlchemy's `pool_pre_ping` asks before every use. This asks where the connection was not used for so many seconds.
    """

    def note_use(_: Any, record: ConnectionPoolEntry) -> None:
        record.info["used"] = time.monotonic()

    def ask(connection: Any, record: ConnectionPoolEntry, _: object) -> None:
        if time.monotonic() - record.info.get("used", math.inf) > trusted_seconds:
            try:
                engine.dialect.do_ping(connection)
            except engine.dialect.loaded_dbapi.Error as error:
                raise sa.exc.InvalidatePoolError from error

    sa.event.listen(engine, "checkin", note_use)
    sa.event.listen(engine, "checkout", ask)
