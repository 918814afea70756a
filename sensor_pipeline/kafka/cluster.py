"""Topics, their offsets, and the consumer group's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, IsolationLevel, KafkaError, TopicCollection, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from sensor_pipeline.drained import Records
from sensor_pipeline.errors import ConfigurationError, TopicReplacedError, UnavailableError
from sensor_pipeline.kafka.connection import Connection
from sensor_pipeline.kafka.drain import Drain
from sensor_pipeline.kafka.errors import OUT_OF_RANGE
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.settings import Settings

_NO_TOPIC_ID = "AAAAAAAAAAAAAAAAAAAAAA"
# Stands beside each offset that mirrors a ledger, and so tells it from one that another consumer has got to.
_MIRROR = "mirror of sensor_pipeline's ledger"
# One record is wanted of each partition. Of a partition that is not the first in its answer a broker gives no record
# batch that is larger, so what has been read is paused: each then has its turn to be the first.
_ONE_RECORD = {"fetch.message.max.bytes": 65_536, "queued.min.messages": 1}


@dataclass(frozen=True)
class Topic:
    """A topic as it is now: its name, its Kafka topic id and its partitions, ascending."""

    name: str
    kafka_topic_id: str
    partitions: tuple[int, ...]


class Kafka(Connection):
    """A connection to the settings' brokers.

    Every method raises `UnavailableError` where waiting can help and `ConfigurationError` where it cannot.

    Args:
        settings: where the brokers are and how to speak to them.
        timeout: seconds that one request may take.
        stall_timeout: seconds that a drain may go without any progress.
    """

    def __init__(self, settings: Settings, *, timeout: float = 20, stall_timeout: float = 60) -> None:
        super().__init__(settings, timeout)
        self._stall_timeout = stall_timeout

    def topic(self, name: str) -> Topic:
        """Look a topic up.

        Raises:
            ConfigurationError: there is none of this name, or the broker is too old to have topic ids.
        """
        description = self.ask(lambda: self.answer(self.admin().describe_topics(TopicCollection([name]))[name]), name)
        topic_id = str(description.topic_id)
        if topic_id == _NO_TOPIC_ID:
            raise ConfigurationError(
                f"the broker at {self.servers} gives topic {name} no topic id, which tells a topic from another "
                "of the same name; Kafka 2.8 or newer is needed"
            )
        return Topic(name, topic_id, tuple(sorted(p.id for p in description.partitions)))

    def first_offsets(self, topic: Topic) -> dict[int, int]:
        """For each partition the first offset that Kafka still has."""
        return self._list_offsets(topic, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def end_offsets(self, topic: Topic) -> dict[int, int]:
        """For each partition the last stable offset: what read_committed can read up to."""
        return self._list_offsets(topic, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def high_watermarks(self, topic: Topic) -> dict[int, int]:
        """For each partition the end of its log, open transactions included."""
        return self._list_offsets(topic, OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED)  # type: ignore[no-untyped-call]

    def offsets_at(self, topic: Topic, moment: datetime) -> dict[int, int]:
        """For each partition the first offset whose record is not older than `moment`; the end if none is."""
        found = self._list_offsets(topic, OffsetSpec.for_timestamp(round(moment.timestamp() * 1000)))
        ends = self.end_offsets(topic)
        return {p: offset if offset >= 0 else ends[p] for p, offset in found.items()}

    def record_times(self, topic: Topic, offsets: Mapping[int, int]) -> dict[int, datetime]:
        """For each partition the time of its first record from an offset on, as Kafka has it with the record.

        A partition is left out where there is no such record, or none any more, or where records have no time.
        """
        found: dict[int, datetime] = {}
        if not offsets:
            return found
        left = set(offsets)
        deadline = time.monotonic() + self.timeout
        with self.consumer(_ONE_RECORD) as consumer:
            consumer.assign([TopicPartition(topic.name, p, offset) for p, offset in offsets.items()])
            while left:
                message = consumer.poll(max(0.0, deadline - time.monotonic()))
                if message is None:
                    raise UnavailableError(
                        f"Kafka at {self.servers} gave no record of topic {topic.name} in {self.timeout:g} s"
                        f"{self.said()}; check that it runs, then try again"
                    )
                partition, error = message.partition(), message.error()
                if error is not None and error.code() not in {KafkaError._PARTITION_EOF, *OUT_OF_RANGE}:
                    raise self.error(error, topic.name)
                if partition not in left:
                    continue
                left.remove(partition)
                consumer.pause([TopicPartition(topic.name, partition)])
                kind, milliseconds = message.timestamp()
                if error is None and kind != TIMESTAMP_NOT_AVAILABLE:
                    found[partition] = datetime.fromtimestamp(milliseconds / 1000, UTC)
        return found

    def committed_offsets(self, topic: Topic) -> dict[int, int]:
        """The group's committed offset for each partition that has one."""
        return {entry.partition: entry.offset for entry in self._committed(topic)}

    def consumed_offsets(self, topic: Topic) -> dict[int, int]:
        """Those of them that a consumer committed: a mirror says how far some ledger is, not how far a consumer."""
        return {entry.partition: entry.offset for entry in self._committed(topic) if entry.metadata != _MIRROR}

    def commit_offsets(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Commit the group's offset for each partition, synchronously, each partition's answer checked."""
        wanted = [TopicPartition(topic, p, offset, _MIRROR) for p, offset in sorted(offsets.items())]
        # Through a consumer: librdkafka 2.16 aborts the process when such a request of an admin client times out
        # while the broker is away and comes back.
        with self.consumer() as consumer:
            self.ask_group(consumer, partial(consumer.commit, offsets=wanted, asynchronous=False), topic)

    def check_topic(self, batch: Batch) -> Topic:
        """The batch's topic, if it still is the one that the batch was planned for.

        Raises:
            TopicReplacedError: the topic was deleted and created again since.
        """
        topic = self.topic(batch.topic)
        if topic.kafka_topic_id != batch.kafka_topic_id:
            raise TopicReplacedError(
                f"topic {batch.topic} has id {topic.kafka_topic_id} and not {batch.kafka_topic_id}: it was deleted and "
                "created again after this batch was planned; the sensor plans the new one from offset 0"
            )
        return topic

    def drain(self, batch: Batch, wanted: Sequence[OffsetRange]) -> Iterator[Records | list[OffsetRange]]:
        """Read offsets of the batch's topic; what lies between two wanted ranges of a partition is read too.

        Yields:
            Chunks of records as they come, and at last the list of offsets that hold no record.

        Raises:
            GapError: Kafka no longer has some of the wanted offsets.
            TopicReplacedError: the topic is not, or no longer, the one that the batch was planned for.
        """
        return Drain(self, batch, wanted, self._stall_timeout).run()

    def _committed(self, topic: Topic) -> list[TopicPartition]:
        wanted = [TopicPartition(topic.name, p) for p in topic.partitions]
        with self.consumer() as consumer:
            request = partial(consumer.committed, wanted, timeout=self.timeout)
            found = self.ask_group(consumer, request, topic.name)
        return [entry for entry in found if entry.offset >= 0]

    def _list_offsets(
        self, topic: Topic, spec: OffsetSpec, isolation: IsolationLevel = IsolationLevel.READ_COMMITTED
    ) -> dict[int, int]:
        request = {TopicPartition(topic.name, p): spec for p in topic.partitions}

        def ask() -> dict[int, int]:
            futures = self.admin().list_offsets(request, isolation_level=isolation, request_timeout=self.timeout)
            return {tp.partition: self.answer(future).offset for tp, future in futures.items()}

        return self.ask(ask, topic.name)
