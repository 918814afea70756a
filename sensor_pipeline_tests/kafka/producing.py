"""Messages in exact partitions of a real topic, in transactions or not, and what becomes of topics."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic, OffsetSpec

from sensor_pipeline.errors import ConfigurationError, UnavailableError
from sensor_pipeline.kafka import Kafka, Topic
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published

Headers = Sequence[tuple[str, bytes | None]]

BASE = datetime(2026, 1, 31, 23, 59, 50, tzinfo=UTC)
_numbers = itertools.count(1)
# Only a test that fails waits as long.
_PATIENCE_SECONDS = 30


def reading(machine: str, second: float, *, failing: bool = False) -> bytes:
    """A good message."""
    moment = (BASE + timedelta(seconds=second)).replace(tzinfo=None)
    inner = {"readings": {"Sensor 1": second / 8}, "has_failure": failing}
    return json.dumps({"machine_id": machine, "timestamp": moment.isoformat(), "readings": inner}).encode()


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait for what a server does by itself."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.02)


class MessageRefusedError(Exception):
    """The broker does not take a message."""


class Publisher:
    """Publishes to exact partitions of one topic; `published` holds what a reader of committed records finds."""

    def __init__(self, settings: Settings, topic: str | None = None) -> None:
        self.settings = settings
        self.topic = topic or settings.kafka_topics[0]
        self.topic_id = await_topic(settings, self.topic).kafka_topic_id
        self.published: list[Published] = []
        self._producer = Producer(self._properties())
        self._idle: list[Producer] = []
        self._seconds = itertools.count()

    def send(
        self,
        partition: int,
        value: bytes | None,
        *,
        bad: str | None = None,
        key: bytes | None = None,
        headers: Headers = (),
        timestamp_ms: int = 0,
    ) -> Published:
        """One message, in a record batch of its own; `bad` is the reason for which it must be rejected."""
        sent = self._deliver(self._producer, [(partition, value, bad, key, headers, timestamp_ms)])
        self.published += sent
        return sent[0]

    def send_all(self, messages: Iterable[tuple[int, bytes | None, str | None]]) -> None:
        """Many at once: of each its partition, its value and the reason for which it must be rejected, if it must."""
        queue = [(partition, value, bad, None, (), 0) for partition, value, bad in messages]
        self.published += self._deliver(self._producer, queue)

    def readings(self, counts: Mapping[int, int], *, machines: int = 3) -> list[Published]:
        """Good messages, so many for each partition, of some machines that fail now and then."""
        sent = self._deliver(self._producer, self._make(counts, machines))
        self.published += sent
        return sent

    def renew(self) -> Publisher:
        """Look at the topic anew: it has other partitions."""
        self._producer = Producer(self._properties())
        return self

    def begin(self) -> Transaction:
        """A transaction; several may be open at once."""
        return Transaction(self, self._idle.pop() if self._idle else self._transactional())

    def begin_and_die(self, counts: Mapping[int, int]) -> None:
        """So many good messages for each partition in a transaction that nobody will ever end but the broker."""
        Transaction(self, self._transactional(**{"transaction.timeout.ms": 1_000})).readings(counts)

    def committed(self, counts: Mapping[int, int]) -> None:
        """So many good messages for each partition, in one committed transaction."""
        transaction = self.begin()
        transaction.readings(counts)
        transaction.commit()

    def aborted(self, counts: Mapping[int, int]) -> None:
        """The same, aborted."""
        transaction = self.begin()
        transaction.readings(counts)
        transaction.abort()

    def _transactional(self, **more: Any) -> Producer:
        producer = Producer(self._properties() | {"transactional.id": f"{self.topic}-{next(_numbers)}"} | more)
        producer.init_transactions(_PATIENCE_SECONDS)
        return producer

    def _properties(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self.settings.kafka_bootstrap_servers,
            "log_level": 0,
            "linger.ms": 0,
            "message.max.bytes": 20_000_000,
        }

    def _make(self, counts: Mapping[int, int], machines: int) -> list[tuple[Any, ...]]:
        queue = [partition for partition, count in sorted(counts.items()) for _ in range(count)]
        made = []
        for partition in queue:
            second = next(self._seconds)
            value = reading(f"m{second % machines}", second, failing=second % 11 in (4, 5, 6, 7))
            made.append((partition, value, None, None, (), 0))
        return made

    def _deliver(self, producer: Producer, messages: Sequence[tuple[Any, ...]]) -> list[Published]:
        sent: list[Published] = []

        refused: list[Any] = []

        def remember(value: bytes | None, key: bytes | None, bad: str | None) -> Callable[[Any, Any], None]:
            def delivered(error: object, message: Any) -> None:
                if error is not None:
                    refused.append(error)
                    return
                sent.append(
                    Published(self.topic, self.topic_id, message.partition(), message.offset(), value, key, bad)
                )

            return delivered

        for partition, value, bad, key, headers, timestamp_ms in messages:
            producer.produce(
                self.topic,
                value,
                key,
                partition,
                on_delivery=remember(value, key, bad),
                timestamp=timestamp_ms,
                headers=list(headers),
            )
        assert producer.flush(_PATIENCE_SECONDS) == 0
        if refused:
            raise MessageRefusedError(refused[0])
        return sent


class Transaction:
    """A transaction on a publisher's topic: only its commit makes its messages published."""

    def __init__(self, publisher: Publisher, producer: Producer) -> None:
        self._publisher = publisher
        self._producer = producer
        self._sent: list[Published] = []
        producer.begin_transaction()

    def send(self, partition: int, value: bytes | None, *, bad: str | None = None) -> None:
        """One message."""
        self._sent += self._publisher._deliver(self._producer, [(partition, value, bad, None, (), 0)])

    def readings(self, counts: Mapping[int, int]) -> None:
        """Good messages, so many for each partition."""
        self._sent += self._publisher._deliver(self._producer, self._publisher._make(counts, 3))

    def commit(self) -> None:
        """Commit it, and wait for the markers."""
        self._producer.commit_transaction(_PATIENCE_SECONDS)
        self._publisher.published += self._sent
        self._await_markers()

    def abort(self) -> None:
        """Abort it, and wait for the markers."""
        self._producer.abort_transaction(_PATIENCE_SECONDS)
        self._await_markers()

    def _await_markers(self) -> None:
        self._publisher._idle.append(self._producer)
        last = {entry.partition: entry.offset for entry in self._sent}

        def written() -> bool:
            ends = high_watermarks(self._publisher.settings, self._publisher.topic)
            return all(ends[partition] >= offset + 2 for partition, offset in last.items())

        eventually(written, "the transaction's markers are written")


def admin(settings: Settings) -> AdminClient:
    """An admin client of the tests' own."""
    return AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers, "log_level": 0})


def create_topic(settings: Settings, name: str, partitions: int, config: Mapping[str, str] | None = None) -> None:
    """Create a topic and wait until it is there."""
    client = admin(settings)
    topic = NewTopic(name, partitions, 1, config=dict(config or {}))
    client.create_topics([topic], operation_timeout=30)[name].result(30)
    await_topic(settings, name, partitions)


def await_topic(settings: Settings, name: str, partitions: int | None = None) -> Topic:
    """Wait until the broker leads all partitions of a topic: it answers a little before that."""
    kafka = Kafka(settings)
    found: list[Topic] = []

    def is_there() -> bool:
        try:
            found.append(kafka.topic(name))
            return len(kafka.end_offsets(found[-1])) == (partitions or len(found[-1].partitions))
        except (ConfigurationError, UnavailableError):
            return False

    eventually(is_there, f"topic {name} is there")
    return found[-1]


def delete_topic(settings: Settings, name: str) -> None:
    """Delete a topic and wait until it is gone."""
    client = admin(settings)
    client.delete_topics([name], operation_timeout=30)[name].result(30)
    eventually(lambda: name not in client.list_topics(timeout=30).topics, f"topic {name} is gone")


def recreate_topic(settings: Settings, name: str, partitions: int = 4) -> None:
    """Delete a topic and create another of the same name."""
    delete_topic(settings, name)
    create_topic(settings, name, partitions)


def add_partitions(settings: Settings, name: str, total: int) -> None:
    """Give a topic more partitions, and wait until it has them."""
    client = admin(settings)
    client.create_partitions([NewPartitions(name, total)])[name].result(30)
    await_topic(settings, name, total)


def delete_records(settings: Settings, name: str, before: Mapping[int, int]) -> None:
    """Delete all records before an offset of each partition, as retention does."""
    client = admin(settings)
    for future in client.delete_records([TopicPartition(name, p, offset) for p, offset in before.items()]).values():
        future.result(30)


def delete_group(settings: Settings) -> None:
    """Delete the settings' group, with all its offsets."""
    group = settings.kafka_group_id
    client = admin(settings)
    client.delete_consumer_groups([group])[group].result(30)


def high_watermarks(settings: Settings, name: str) -> dict[int, int]:
    """Where each partition ends, with open transactions."""
    client = admin(settings)
    topic = Kafka(settings).topic(name)
    request = {TopicPartition(name, p): OffsetSpec.latest() for p in topic.partitions}
    futures = client.list_offsets(request, isolation_level=IsolationLevel.READ_UNCOMMITTED)
    return {tp.partition: future.result(30).offset for tp, future in futures.items()}


def group_offsets(settings: Settings, topic: str | None = None) -> dict[int, int]:
    """What the settings' group has committed of a topic, as lag tools see it."""
    client = admin(settings)
    group = settings.kafka_group_id
    future = client.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group]
    wanted = topic or settings.kafka_topics[0]
    return {tp.partition: tp.offset for tp in future.result(30).topic_partitions if tp.topic == wanted}


def set_group_offsets(settings: Settings, offsets: Mapping[int, int], topic: str | None = None) -> None:
    """Move the settings' group by hand."""
    client = admin(settings)
    group = settings.kafka_group_id
    wanted = [TopicPartition(topic or settings.kafka_topics[0], p, offset) for p, offset in offsets.items()]
    future = client.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, wanted)])[group]
    assert all(tp.error is None for tp in future.result(30).topic_partitions)
