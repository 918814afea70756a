"""`sensor-pipeline migrate`."""

import click

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.postgres.database import SCHEMA_VERSION
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.settings import Settings


@click.command("migrate")
@click.option("--writer", "writers", metavar="ROLE", multiple=True, help="Grant ROLE all that the pipeline needs.")
@click.option("--reader", "readers", metavar="ROLE", multiple=True, help="Grant ROLE reading, and nothing else.")
def command(writers: tuple[str, ...], readers: tuple[str, ...]) -> None:
    """Make or update the tables in PostgreSQL. Safe to run again, by two at once, and while batches run.

    POSTGRES_USER owns the tables. A pipeline that runs as another user is that user's --writer; those who look at the
    data are each a --reader. The roles exist; grant again after an update.
    """
    settings = Settings.from_env(environment())
    migrate(settings, writers=writers, readers=readers)
    click.echo(
        f"{settings.postgres_host}:{settings.postgres_port}/{settings.postgres_db} is at schema {SCHEMA_VERSION}"
    )
    for what, roles in (("write", writers), ("read", readers)):
        for role in roles:
            click.echo(f"{role} may {what}")
