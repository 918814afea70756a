"""A batch as run config, and back: topic, Kafka topic id and ranges, nothing else.

So re-executing a run in the UI is running its batch again.
"""

import re
from collections.abc import Mapping
from typing import Any

from dagster import Field, IntSource, StringSource

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.offsets import Batch, OffsetRange

RESOURCE = "batch"

SCHEMA = {
    "topic": Field(StringSource, description="The topic's name."),
    "kafka_topic_id": Field(
        StringSource, description="Kafka's id of the topic, which tells it from another one of the same name."
    ),
    "ranges": Field(
        [
            {
                "partition": Field(IntSource, description="The partition."),
                "start": Field(IntSource, description="The first offset to read."),
                "end": Field(IntSource, description="The offset after the last one to read."),
            }
        ],
        description="At most one half-open range of offsets, [start, end), for each partition.",
    ),
}


_TOPIC_ID = re.compile(r"[A-Za-z0-9+/_-]{22}")


def example(topic: str) -> dict[str, Any]:
    """What the Launchpad starts with: a batch to be filled in, which is refused as long as it is not."""
    config = {
        "topic": topic,
        "kafka_topic_id": "the id that `sensor-pipeline doctor` says",
        "ranges": [{"partition": 0, "start": 0, "end": 1000}],
    }
    return {"resources": {RESOURCE: {"config": config}}}


def to_run_config(batch: Batch) -> dict[str, Any]:
    """The run config of a batch."""
    ranges = [{"partition": r.partition, "start": r.start, "end": r.end} for r in batch.ranges]
    config = {"topic": batch.topic, "kafka_topic_id": batch.kafka_topic_id, "ranges": ranges}
    return {"resources": {RESOURCE: {"config": config}}}


def to_batch(config: Mapping[str, Any]) -> Batch:
    """The batch of a validated resource config.

    Raises:
        ConfigurationError: two ranges of one partition, a range that ends before it starts, or no topic id.
    """
    topic_id = config["kafka_topic_id"]
    if not _TOPIC_ID.fullmatch(topic_id):
        raise ConfigurationError(
            f"kafka_topic_id {topic_id!r} is no topic id of Kafka (22 letters, digits, '+' or '/'): fill in the one "
            f"that `sensor-pipeline doctor` says of topic {config['topic']}, and the ranges"
        )
    ranges = tuple(OffsetRange(r["partition"], r["start"], r["end"]) for r in config["ranges"])
    return Batch(config["topic"], topic_id, ranges)


def of_run(run_config: Mapping[str, Any]) -> Batch | None:
    """The batch of some run's config; None where it is not one (a run by hand with a mistake in it)."""
    try:
        return to_batch(run_config["resources"][RESOURCE]["config"])
    except (KeyError, TypeError, ConfigurationError):
        return None
