"""`sensor-pipeline env`: the running stack as shell variables."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from sensor_pipeline.embedded import stack_file
from sensor_pipeline.errors import UnavailableError

# What psql and everything else on libpq reads.
_LIBPQ = {
    "PGHOST": "POSTGRES_HOST",
    "PGPORT": "POSTGRES_PORT",
    "PGUSER": "POSTGRES_USER",
    "PGPASSWORD": "POSTGRES_PASSWORD",
    "PGDATABASE": "POSTGRES_DB",
}


@click.command("env")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=stack_file.DATA_DIR,
    show_default=True,
    help="The running stack's.",
)
def command(data_dir: Path) -> None:
    """Print the running stack as `export` lines: eval "$(sensor-pipeline env)"."""
    stack = stack_file.running(data_dir)
    if stack is None:
        raise UnavailableError(f"no stack runs on {data_dir.absolute()}: start one with `sensor-pipeline up`")
    variables = dict(stack.env) | {name: stack.env[source] for name, source in _LIBPQ.items()}
    for name, value in variables.items():
        click.echo(f"export {name}={shlex.quote(value)}")
