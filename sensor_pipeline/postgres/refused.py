"""Rows that the database refuses for their own content, such as by a CHECK that somebody added: found by bisection.

Anything else that goes wrong (a full disk, a lost connection, a right taken away) is not the rows' fault and is not
caught here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from psycopg2 import Error as DriverError
from sqlalchemy.exc import DBAPIError

from sensor_pipeline.postgres.database import about_content

T = TypeVar("T")


@dataclass(frozen=True)
class Refused:
    """One reading, and the database's words."""

    partition: int
    offset: int
    said: str


class RowsRefusedError(Exception):
    """The transaction is lost; without these readings it can be tried again."""

    def __init__(self, refused: Sequence[Refused]) -> None:
        super().__init__(f"the database refuses {len(refused)} readings")
        self.refused = refused


def insert(
    connection: sa.Connection, items: Sequence[T], attempt: Callable[[Sequence[T]], int]
) -> tuple[int, dict[T, str]]:
    """Insert items by `attempt`, which returns how many rows the database took.

    Returns:
        That count and nothing refused, or 0 and the refused items with the database's words, found in
        O(log n) attempts each. In that case nothing was inserted.
    """
    try:
        with connection.begin_nested():
            return attempt(items), {}
    except (DBAPIError, DriverError) as error:
        driver = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(driver, DriverError) or not about_content(driver):
            raise
        words = f"{driver.pgcode}: {driver.diag.message_primary}"
    if len(items) == 1:
        return 0, {items[0]: words}
    middle = len(items) // 2
    refused: dict[T, str] = {}
    for half in (items[:middle], items[middle:]):
        trial = connection.begin_nested()
        refused |= insert(connection, half, attempt)[1]
        trial.rollback()
    return 0, refused
