"""The real labelled data that lies beside a checkout, and the wider `failures` that its labels say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SENSOR_PIPELINE_DATA") or Path(__file__).parents[2] / "shared" / "data")
NEEDS_DATA = "needs the labelled data of SENSOR_PIPELINE_DATA"

needs_data = pytest.mark.skipif(not (FOLDER / "skab").is_dir(), reason=NEEDS_DATA)


def valve_files() -> list[Path]:
    """One file a machine."""
    return sorted((FOLDER / "skab" / "valve1").glob("*.csv"))
