"""`sensor-pipeline recompute`."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import click

from sensor_pipeline.cli.environment import environment
from sensor_pipeline.cli.moment import Moment
from sensor_pipeline.cli.progress import progress
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.recompute import Mended, recompute_machine
from sensor_pipeline.postgres.verify import EXAMPLES, find_machines
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
    if since and until and since > until:
        raise ConfigurationError("--since lies after --until; exchange them")
    settings = Settings.from_env(environment())
    database = Database(settings)
    with database.begin() as connection:
        database.check_schema(connection)
        machines = find_machines(connection, names)
    rows: Counter[str] = Counter()
    with progress() as (bar, say):
        task = bar.add_task("failures by their readings", total=len(machines))
        for machine in machines:
            mended = recompute_machine(database, machine, since, until, settings.alert_max_age)
            if mended is not None:
                for difference in mended.differences[:EXAMPLES]:
                    say(f"machine {machine.name}: {difference}")
                if more := len(mended.differences[EXAMPLES:]):
                    say(f"machine {machine.name}: … and {more:,} more")
                rows.update(_rows(mended))
            bar.advance(task)
    click.echo(
        f"{len(machines):,} machines looked at, {rows['machines']:,} mended: {rows['made']:,} failures made, "
        f"{rows['changed']:,} changed, {rows['removed']:,} removed, {rows['readings']:,} readings moved"
    )


def _rows(mended: Mended) -> dict[str, int]:
    return {
        "machines": 1,
        "made": mended.failures_made,
        "changed": mended.failures_changed,
        "removed": mended.failures_removed,
        "readings": mended.readings_moved,
    }
