"""`sensor-pipeline migrate`."""

import click

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.postgres.database import SCHEMA_VERSION
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.settings import Settings


@click.command("migrate")
def command() -> None:
    """Make or update the tables in PostgreSQL. Safe to run again, and by two at once."""
    settings = Settings.from_env(environment())
    migrate(settings)
    click.echo(
        f"{settings.postgres_host}:{settings.postgres_port}/{settings.postgres_db} is at schema {SCHEMA_VERSION}"
    )
