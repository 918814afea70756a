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
from sensor_pipeline.rules import Rejection

T = TypeVar("T")


@dataclass(frozen=True)
class Refused:
    """One reading, and why it cannot be stored."""

    partition: int
    offset: int
    rejection: Rejection


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
        O(log n) attempts each. In that case the transaction is to be rolled back. Of items that refuse each other (by
        a unique index) the later ones are refused.

    Raises:
        DBAPIError, DriverError: anything else, also where the database takes each single item and not all together.
    """
    try:
        with connection.begin_nested():
            return attempt(items), {}
    except (DBAPIError, DriverError) as error:
        if not about_content(_driver_error(error)):
            raise
        refused = _search(connection, items, attempt, error)
        if not refused:
            raise
        return 0, refused


def _search(
    connection: sa.Connection,
    items: Sequence[T],
    attempt: Callable[[Sequence[T]], int],
    error: DBAPIError | DriverError,
) -> dict[T, str]:
    """Which of these items are refused, of which all together are; the others are inserted."""
    if len(items) == 1:
        return {items[0]: _words(error)}
    middle = len(items) // 2
    refused: dict[T, str] = {}
    for half in (items[:middle], items[middle:]):
        try:
            with connection.begin_nested():
                attempt(half)
        except (DBAPIError, DriverError) as of_half:
            if not about_content(_driver_error(of_half)):
                raise
            refused |= _search(connection, half, attempt, of_half)
    return refused


def _driver_error(error: DBAPIError | DriverError) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error


def _words(error: DBAPIError | DriverError) -> str:
    driver = _driver_error(error)
    assert isinstance(driver, DriverError)
    return f"{driver.pgcode}: {driver.diag.message_primary}"
