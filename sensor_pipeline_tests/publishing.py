"""Messages for tests: made, published to exact partitions, and remembered for the oracle."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from confluent_kafka import Producer

from sensor_pipeline.kafka import Kafka
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published

BASE = datetime(2026, 1, 31, 23, 59, 40, tzinfo=UTC)


def message(machine: str, second: float, failing: bool, values: dict[str, Any] | None = None) -> bytes:
    """A reading, `second` seconds after `BASE`, just before the end of a day and a month."""
    moment = (BASE + timedelta(seconds=second)).replace(tzinfo=None)
    inner = {"readings": {"Sensor 1": second / 8} if values is None else values, "has_failure": failing}
    return json.dumps({"machine_id": machine, "timestamp": moment.isoformat(), "readings": inner}).encode()


class Publisher:
    """Publishes to the settings' first topic; `published` is what the oracle takes."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.kafka_topics[0]
        self._topic_id = Kafka(settings).topic(self._topic).kafka_topic_id
        self._producer = Producer({"bootstrap.servers": settings.kafka_bootstrap_servers, "acks": "all"})
        self.published: list[Published] = []

    def send(self, partition: int, value: bytes | None, *, bad: str | None = None, key: bytes | None = None) -> None:
        """Queue one message; `bad` is the reason for which it must be rejected."""

        def delivered(error: Any, sent: Any) -> None:
            assert error is None, error
            entry = Published(self._topic, self._topic_id, partition, sent.offset(), value, key, bad)
            self.published.append(entry)

        self._producer.produce(self._topic, value, key, partition, on_delivery=delivered)

    def flush(self) -> Publisher:
        """Wait until all are delivered."""
        assert self._producer.flush(30) == 0
        return self
