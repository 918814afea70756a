"""The environment of a command: the process's own, completed by the stack that runs in this folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sensor_pipeline.settings import with_secrets

DATA_DIR = Path(".sensor-pipeline")


def environment() -> Mapping[str, str]:
    """Environment variables; where they name no Kafka, or no PostgreSQL, that of the running stack.

    Raises:
        ConfigurationError: a secret is in a file that cannot be read.
    """
    env = with_secrets(os.environ)
    if not DATA_DIR.exists():
        return env
    from sensor_pipeline.embedded.stack_file import running_stack

    return {**env, **(running_stack(Path.cwd()) or {})}
