"""The batch log is kept for some time; what the ledger holds of its batches stays for good."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from sensor_pipeline.postgres.database import Database

_ROWS_A_PIECE = 10_000

_DELETE = sa.text("""
    DELETE FROM batches WHERE id IN (
        SELECT id FROM batches WHERE committed_at < :before ORDER BY committed_at LIMIT :rows
    )
""")


def forget_batches(database: Database, before: datetime) -> int:
    """Delete the rows of batches that were committed before some time, in pieces; returns how many."""
    deleted = 0
    while True:
        with database.begin() as connection:
            database.check_schema(connection)
            piece = connection.execute(_DELETE, {"before": before, "rows": _ROWS_A_PIECE}).rowcount
        deleted += piece
        if piece < _ROWS_A_PIECE:
            return deleted
