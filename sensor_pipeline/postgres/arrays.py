"""Arrays that grow with a batch, as arguments of a statement.

The driver writes a list as `ARRAY[…]`, which the server parses as one expression an element: for 20,000 machines that
took longer than what is then done with them. One literal, as PostgreSQL prints an array, is read in one go.
Format: the PostgreSQL documentation of arrays, "Array Input and Output Syntax".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd


def array(elements: Iterable[int | str | None]) -> str:
    """The literal, to be cast to an array of the elements' type; None becomes null."""
    return "{" + ",".join(map(_element, elements)) + "}"


def time_array(column: pd.Series[pd.Timestamp]) -> str:
    """The same of a column of datetime64[us, UTC]; NaT becomes null."""
    texts = np.datetime_as_string(column.to_numpy("datetime64[us]"), timezone="UTC").tolist()
    return "{" + ",".join("NULL" if text == "NaT" else text for text in texts) + "}"


def _element(value: int | str | None) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
    return "NULL" if value is None else str(value)
