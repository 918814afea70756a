"""How much of a random thing a test tries: little in `make test`, much in `make soak`."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

IS_SOAK = bool(os.environ.get("SOAK"))


def amount(short: T, long: T) -> T:
    """The first for `make test`, the second for `make soak`, which runs what is marked `soak`."""
    return long if IS_SOAK else short
