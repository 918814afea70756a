"""`sensor-pipeline worker`."""

from __future__ import annotations

import os
import sys

import click

from sensor_pipeline.errors import ConfigurationError


@click.command("worker")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=os.cpu_count,
    show_default="the machine's cores",
    help="How many runs it executes at a time.",
)
def command(concurrency: int) -> None:
    """Execute runs that the daemon hands out through Redis, until Ctrl-C.

    For a site that outgrows one machine: start it on each host, with the code, the environment and the DAGSTER_HOME of
    the daemon. SIGTERM lets the runs that it executes come to their end.
    """
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        raise ConfigurationError(
            "DAGSTER_HOME is not set; set it to a folder with the daemon's dagster.yaml, with the package's "
            "orchestration/workers.yaml appended"
        )
    try:
        from sensor_pipeline.orchestration.workers import work
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"a worker needs {error.name}, which is not installed; install sensor-pipeline[celery]"
        ) from error
    sys.exit(work(home, concurrency))
