"""Python's garbage collector, told what a process that runs batches is like."""

from __future__ import annotations

import gc


def spare_collector() -> None:
    """Look for cycles seldom: the objects of a batch come and go by the thousand and form none.

    With Python's own thresholds that took a tenth of a batch's CPU, and a fifth of that of the imports before it.
    """
    gc.set_threshold(50_000, 20, 100)
