"""The environment of a command: the process's own, completed by the stack that runs in this folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DATA_DIR = Path(".sensor-pipeline")


def environment() -> Mapping[str, str]:
    """Environment variables; where they name no Kafka, or no PostgreSQL, that of the running stack."""
    if not DATA_DIR.exists():
        return os.environ
    from sensor_pipeline.embedded.stack_file import running_stack

    return {**os.environ, **(running_stack(Path.cwd()) or {})}
