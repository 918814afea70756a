"""`sensor-pipeline accept-gap`."""

from __future__ import annotations

import getpass

import click

from sensor_pipeline.backlog import read_backlog, register_topic
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli.environment import environment
from sensor_pipeline.errors import ConfigurationError, DataError
from sensor_pipeline.offsets import total
from sensor_pipeline.postgres import ledger
from sensor_pipeline.settings import Settings


@click.command("accept-gap")
@click.option("--topic", required=True, help="The topic's name.")
@click.option("--partition", required=True, type=click.IntRange(min=0), help="The partition with the gap.")
@click.option("--reason", required=True, help="Why the loss is accepted; it is kept, with who and when.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(topic: str, partition: int, reason: str, yes: bool) -> None:
    """Accept that Kafka lost offsets which were never ingested, and go on after them."""
    pipeline = Pipeline(Settings.from_env(environment()))
    backlog = read_backlog(pipeline.settings, pipeline.kafka, pipeline.database, topic)
    if partition not in backlog.topic.partitions:
        raise ConfigurationError(f"topic {topic} has no partition {partition}")
    gap = [span for p in backlog.partitions if p.partition == partition for span in p.gap]
    if not gap:
        raise DataError(f"topic {topic} partition {partition} has no gap: Kafka still has all that was never ingested")
    named = ", ".join(f"[{span.start}, {span.end})" for span in gap)
    click.echo(f"topic {topic} partition {partition}: {total(gap)} offsets are lost: {named}")
    if not yes:
        click.confirm("Accept the loss?", abort=True)
    # One that was created anew may have lost records before any batch of it was run.
    register_topic(pipeline.settings, pipeline.kafka, pipeline.database, backlog.topic)
    with pipeline.database.begin() as connection:
        stored = ledger.find_topic(connection, backlog.topic.kafka_topic_id)
        assert stored is not None
        ledger.lock(connection, stored.id, [partition])
        accepted = ledger.accept_gap(connection, stored.id, gap, who=getpass.getuser(), why=reason)
    click.echo("accepted; ingestion goes on after it" if accepted else "it was ingested or accepted meanwhile")
