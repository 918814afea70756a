"""Looks at each topic from outside its batches: falling behind, and rejected messages over the limit."""

from __future__ import annotations

from datetime import UTC, datetime

from sensor_pipeline.backlog import TopicBacklog, read_backlog
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.notices import REJECTED_WITHIN, RunNotice, falling_behind, rejected_over_limit
from sensor_pipeline.pace import Pace, measure
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.figures import read_throughput, rejected_within
from sensor_pipeline.settings import Settings


def read_pace(settings: Settings, kafka: Kafka, database: Database, backlog: TopicBacklog) -> Pace | None:
    """A topic's pace over `ALERT_BEHIND_AFTER`; None where nothing is left, or it is not known for so long yet.

    Raises:
        SensorPipelineError: Kafka or PostgreSQL does not answer.
    """
    if not backlog.lag:
        return None
    within = settings.alert_behind_after
    with database.begin() as connection:
        throughput = read_throughput(connection, backlog.topic.kafka_topic_id, within)
    if throughput is None or throughput.known_for < within:
        return None
    then = kafka.offsets_at(backlog.topic, datetime.now(UTC) - within)
    return measure(backlog.partitions, then, throughput.done, within)


def look(settings: Settings, kafka: Kafka, database: Database, name: str) -> list[RunNotice]:
    """What there is to tell of a topic now; nothing of one that the pipeline has not begun with.

    Raises:
        SensorPipelineError: Kafka or PostgreSQL does not answer, or there is no such topic.
    """
    now = datetime.now(UTC)
    backlog = read_backlog(settings, kafka, database, name)
    pace = read_pace(settings, kafka, database, backlog)
    with database.begin() as connection:
        rejected = rejected_within(connection, backlog.topic.kafka_topic_id, REJECTED_WITHIN)
    found = []
    if pace and pace.falls_behind:
        found.append(falling_behind(name, pace, now))
    if rejected > settings.alert_rejected:
        found.append(rejected_over_limit(name, rejected, settings.alert_rejected, now))
    return found
