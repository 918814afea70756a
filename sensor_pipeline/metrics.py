"""The pipeline's state for Prometheus: PostgreSQL and Kafka are asked at each scrape, so that several agree."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sensor_pipeline.backlog import TopicBacklog, oldest_unread, read_backlog
from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.offsets import total
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.figures import Figures, read_figures
from sensor_pipeline.postgres.notices import Waiting, waiting
from sensor_pipeline.settings import Settings

log = logging.getLogger(__name__)

# Prometheus gives a scrape 10 s unless it is told otherwise.
KAFKA_SECONDS = 4.0

_PREFIX = "sensor_pipeline_"
_PLACE = ["topic", "partition"]


class PipelineCollector(Collector):
    """Metrics as docs/notices.md lists them.

    What a server that does not answer would have told is left out, and its `sensor_pipeline_up` is 0.
    """

    def __init__(self, settings: Settings, *, kafka_seconds: float = KAFKA_SECONDS) -> None:
        self._settings = settings
        self._database = Database(settings)
        self._kafka = Kafka(settings, timeout=kafka_seconds)

    def collect(self) -> Iterator[Metric]:
        """Ask both servers."""
        stored = self._ask_database()
        backlogs, ages, is_kafka_up = self._ask_kafka(with_ledger=stored is not None)
        up = _gauge("up", "Whether the server answered what it was asked for this scrape.", ["server"])
        up.add_metric(["postgresql"], float(stored is not None))
        up.add_metric(["kafka"], float(is_kafka_up))
        yield up
        if stored is not None:
            yield from _of_figures(*stored)
        yield from _of_backlogs(backlogs, ages)

    def _ask_database(self) -> tuple[Figures, Waiting] | None:
        try:
            with self._database.begin() as connection:
                self._database.check_schema(connection)
                return read_figures(connection, last_batches=1), waiting(connection)
        except SensorPipelineError as error:
            log.warning("%s", error)
            return None

    def _ask_kafka(self, *, with_ledger: bool) -> tuple[list[TopicBacklog], list[dict[int, float]], bool]:
        """Each topic's backlog with the age in seconds of each partition's oldest unread record; whether all answered.

        Without the ledger Kafka is only asked whether it is there.
        """
        backlogs: list[TopicBacklog] = []
        ages: list[dict[int, float]] = []
        try:
            for name in self._settings.kafka_topics:
                if not with_ledger:
                    self._kafka.topic(name)
                    continue
                backlog = read_backlog(self._settings, self._kafka, self._database, name)
                ages.append(self._ages(backlog))
                backlogs.append(backlog)
        except SensorPipelineError as error:
            log.warning("%s", error)
            # What one topic said is not the whole, and the next would let the scrape wait again.
            return backlogs, ages, False
        return backlogs, ages, True

    def _ages(self, backlog: TopicBacklog) -> dict[int, float]:
        """0 where nothing is unread but what Kafka no longer has; left out where the record has no time."""
        times = oldest_unread(self._kafka, backlog)
        now = datetime.now(UTC)
        ages = {p.partition: 0.0 for p in backlog.partitions if p.lag == total(p.gap)}
        return ages | {p: max(0.0, (now - moment).total_seconds()) for p, moment in times.items()}


def _of_figures(figures: Figures, outbox: Waiting) -> Iterator[Metric]:
    readings = CounterMetricFamily(f"{_PREFIX}readings", "Readings ingested since the first start.")
    readings.add_metric([], figures.readings)
    yield readings
    rejected = _gauge("rejected_messages", "Rejected messages held, by reason.", ["reason"])
    for reason, count in figures.rejected_by_reason.items():
        rejected.add_metric([reason], count)
    yield rejected
    yield _value("machines", "Machines that have published.", figures.machines)
    yield _value("active_failures", "Machines that are failing.", figures.active_failures)
    yield _value("notices_undelivered", "Notices that wait to be delivered.", outbox.undelivered)
    yield _value("notices_oldest_undelivered_seconds", "How long the oldest of them has waited.", outbox.oldest_seconds)
    yield _value(
        "notices_given_up", "Notices given up after a day of being refused, while they are kept.", outbox.given_up
    )
    if figures.last_batches:
        yield from _of_batch(figures.last_batches[0])


def _of_batch(batch: dict[str, Any]) -> Iterator[Metric]:
    seconds = _gauge("last_batch_seconds", "How long the newest batch took, in all and by stage.", ["stage"])
    seconds.add_metric(["total"], (batch["committed_at"] - batch["started_at"]).total_seconds())
    for stage, spent in sorted(batch["timings"].items()):
        seconds.add_metric([stage], spent)
    yield seconds
    yield _value(
        "last_success_timestamp_seconds", "When the newest batch was committed.", batch["committed_at"].timestamp()
    )


def _of_backlogs(backlogs: Sequence[TopicBacklog], ages: Sequence[dict[int, float]]) -> Iterator[Metric]:
    lag = _gauge("lag", "Offsets that are not ingested, as far as read_committed can read.", _PLACE)
    gap = _gauge("gap", "Those of them that Kafka no longer has.", _PLACE)
    oldest = _gauge(
        "oldest_unread_seconds", "How old the oldest record is that is not ingested; 0: there is none.", _PLACE
    )
    for backlog, of_topic in zip(backlogs, ages, strict=True):
        for partition in backlog.partitions:
            place = [backlog.topic.name, str(partition.partition)]
            lag.add_metric(place, partition.lag)
            gap.add_metric(place, total(partition.gap))
            if partition.partition in of_topic:
                oldest.add_metric(place, of_topic[partition.partition])
    yield from (lag, gap, oldest)


def _gauge(name: str, text: str, labels: Sequence[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, text, labels=labels)


def _value(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)
