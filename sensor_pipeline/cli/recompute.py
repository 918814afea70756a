"""`sensor-pipeline recompute`."""

from __future__ import annotations

from datetime import datetime

import click

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.cli.moment import Moment
from sensor_pipeline.cli.progress import progress
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.recompute import Recompute
from sensor_pipeline.settings import Settings


@click.command("recompute")
@click.option("--machine", "names", multiple=True, help="Only this machine; may be given several times.")
@click.option("--since", type=Moment(), help="Only failures that touch the time from then on: ISO 8601, or 7 days.")
@click.option("--until", type=Moment(), help="Only failures that touch the time up to then.")
def command(names: tuple[str, ...], since: datetime | None, until: datetime | None) -> None:
    """Mend failures from the readings, machine by machine, while ingestion goes on.

    Where nothing is wrong, nothing is locked or written. A failure that touches the time is mended whole, and keeps its
    id by the rule that batches follow.
    """
    settings = Settings.from_env(environment())
    recompute = Recompute(Database(settings), names, since, until, settings.alert_max_age)
    with progress() as (bar, say):
        task = bar.add_task("failures by their readings", total=len(recompute.machines))
        for machine, mended in recompute.run():
            for difference in mended.examples() if mended else ():
                say(f"machine {machine.name}: {difference}")
            bar.advance(task)
    click.echo(recompute.total.sentence())
