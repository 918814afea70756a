"""Looks at each topic from outside its batches: falling behind, and rejected messages over the limit."""

from __future__ import annotations

from datetime import UTC, datetime

from sensor_pipeline.backlog import read_backlog
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.notices import RunNotice, falling_behind, rejected_over_limit
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.figures import read_throughput
from sensor_pipeline.settings import Settings


def look(settings: Settings, kafka: Kafka, database: Database, name: str) -> list[RunNotice]:
    """What there is to tell of a topic now; nothing of one that the pipeline has not begun with.

    Raises:
        SensorPipelineError: Kafka or PostgreSQL does not answer, or there is no such topic.
    """
    now = datetime.now(UTC)
    backlog = read_backlog(settings, kafka, database, name)
    then = kafka.offsets_at(backlog.topic, now - settings.alert_behind_after) if backlog.lag else {}
    with database.begin() as connection:
        throughput = read_throughput(connection, backlog.topic.kafka_topic_id, settings.alert_behind_after)
    if throughput is None:
        return []
    found = [
        falling_behind(name, backlog.partitions, then, throughput, settings.alert_behind_after, now),
        rejected_over_limit(name, throughput, settings.alert_rejected, now),
    ]
    return [notice for notice in found if notice]
