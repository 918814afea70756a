"""`sensor-pipeline catch-up`."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from logging import ERROR
from threading import Lock

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.cli.environment import environment
from sensor_pipeline.collector import spare_collector
from sensor_pipeline.delivery import Delivered, Delivery
from sensor_pipeline.errors import DataError, SensorPipelineError
from sensor_pipeline.offsets import Batch
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.settings import Settings
from sensor_pipeline.webhook import Webhook

# What is not delivered by then is for the next time.
_DELIVERY_SECONDS = 20.0


@click.command("catch-up")
@click.option("--lanes", type=click.IntRange(1, 1024), help="Lanes that run side by side (default: LANES).")
def command(lanes: int | None) -> None:
    """Run batches in this process until what is in Kafka now is in PostgreSQL.

    For cron, tests and a first import; the same batches as Dagster's runs, without Dagster. At the end it delivers
    notices to ALERT_WEBHOOK_URL, where that is set.
    """
    settings = Settings.from_env(environment())
    if lanes is not None:
        settings = replace(settings, lanes=lanes)
    spare_collector()
    totals = {"batches": 0, "inserted": 0, "rejected": 0, "started": 0, "ended": 0}
    lock = Lock()
    console = Console(stderr=True)
    with Progress(
        TextColumn("catching up"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None, rate="")

        def count(batch: Batch, written: Written) -> None:
            with lock:
                totals["batches"] += 1
                totals["inserted"] += written.inserted
                totals["rejected"] += written.rejected
                totals["started"] += len(written.failures_started)
                totals["ended"] += len(written.failures_ended)
                progress.advance(task, len(batch))
                seconds = progress.tasks[0].elapsed or 0
                progress.update(task, rate=f"{totals['inserted'] / seconds:,.0f} readings/s" if seconds else "")

        catch_up = CatchUp(Pipeline(settings), count)
        backlogs = catch_up.backlog()
        progress.update(task, total=sum(backlog.lag for backlog in backlogs))
        try:
            catch_up.run(backlogs)
        except DataError:
            # All else was ingested, and is told.
            _deliver(settings)
            raise
    click.echo(
        f"{totals['inserted']} readings inserted in {totals['batches']} batches, {totals['rejected']} rejected, "
        f"{totals['started']} failures started, {totals['ended']} ended"
    )
    _deliver(settings)


def _deliver(settings: Settings) -> None:
    """Deliver what is in the outbox. The readings are in, so that a webhook that is down is said, and fails nothing."""
    if not settings.alert_webhook_url:
        return

    def log(level: int, line: str) -> None:
        # What is wrong is said at the end, once.
        if level < ERROR:
            click.echo(line, err=True)

    delivery = Delivery(Database(settings), Webhook(settings.alert_webhook_url), log)
    try:
        delivered = delivery.run(_DELIVERY_SECONDS)
        delivery.delete_old(timedelta(days=settings.notices_kept_days))
    except SensorPipelineError as error:
        click.echo(f"notices: {error}", err=True)
    else:
        if delivered != Delivered():
            click.echo(f"notices: {delivered}", err=True)
