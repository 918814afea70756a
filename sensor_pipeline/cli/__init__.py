"""The command line, `sensor-pipeline`: one file a command."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from sensor_pipeline.errors import SensorPipelineError

# Command → its module here. A module is imported when its command is asked for: each needs other libraries.
_COMMANDS = {
    "up": "up",
    "env": "env",
    "simulate": "simulate",
    "publish-csv": "publish_csv",
    "catch-up": "catch_up",
    "status": "status",
    "doctor": "doctor",
    "metrics": "metrics",
    "worker": "worker",
    "migrate": "migrate",
    "rejected": "rejected",
    "accept-gap": "accept_gap",
    "verify": "verify",
    "recompute": "recompute",
    "bench": "bench",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"sensor_pipeline.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SensorPipelineError as error:
            click.echo(f"sensor-pipeline: {error}", err=True)
            sys.exit(1)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sensor-pipeline")
def main() -> None:
    """Machine-sensor readings from Kafka to PostgreSQL, effectively once, in Dagster micro-batches.

    Settings are environment variables (README, "Settings"). In a folder where `sensor-pipeline up` runs, every
    other command finds its servers by itself.

    Exit code: 0 when all is well, 1 when the work failed, 2 for wrong use.
    """
