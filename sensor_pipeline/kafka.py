"""Everything that speaks to Kafka: topic ids, offsets, the drain, the commit.

The only module with confluent_kafka. Its errors are told apart by code, never by message text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]
from numpy.typing import NDArray

from sensor_pipeline.drained import Headers, Records
from sensor_pipeline.errors import (
    ConfigurationError,
    GapError,
    SensorPipelineError,
    TopicReplacedError,
    UnavailableError,
)
from sensor_pipeline.offsets import Batch, OffsetRange, hull, intersect, total
from sensor_pipeline.settings import KAFKA_CLIENT_PREFIX, Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

# Large enough that the work in Python for each chunk is lost among that for each message, small enough that a
# chunk's Message objects (about 1 kB each) do not count.
_CHUNK_MESSAGES = 5_000
# How long the drain waits for a full chunk: a batch's last messages wait that long where offsets hold no record.
_POLL_SECONDS = 0.1
_NO_TOPIC_ID = "AAAAAAAAAAAAAAAAAAAAAA"

_AUTHORIZATION = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "may not read the topic (it needs READ and DESCRIBE on it)",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "may not use the consumer group (it needs READ on it)",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "may not use the cluster",
}
_AUTHENTICATION = {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL}
_NO_SUCH_TOPIC = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
# Said for a moment after a topic is made, a broker starts or a leader changes; not every client call waits it out.
_ASK_AGAIN = {
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError._WAIT_COORD,
    KafkaError._NOENT,
}
_ASK_AGAIN_SECONDS = 0.1
_GROUP_IN_USE = {
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError.UNRELEASED_INSTANCE_ID,
}
_OUT_OF_RANGE = {KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET}


@dataclass(frozen=True)
class Topic:
    """A topic as it is now: its name, its Kafka topic id and its partitions, ascending."""

    name: str
    kafka_topic_id: str
    partitions: tuple[int, ...]


class Kafka:
    """A connection to the settings' brokers.

    Every method raises `UnavailableError` where waiting can help and `ConfigurationError` where it cannot.

    Args:
        settings: where the brokers are and how to speak to them.
        timeout: seconds that one request may take.
        stall_timeout: seconds that a drain may go without any progress.
    """

    def __init__(self, settings: Settings, *, timeout: float = 20, stall_timeout: float = 60) -> None:
        self._servers = settings.kafka_bootstrap_servers
        self._group = settings.kafka_group_id
        self._properties = settings.kafka_client
        self._timeout = timeout
        self._stall_timeout = stall_timeout
        self._last_error: KafkaError | None = None
        self._admin: AdminClient | None = None

    def topic(self, name: str) -> Topic:
        """Look a topic up.

        Raises:
            ConfigurationError: there is none of this name, or the broker is too old to have topic ids.
        """
        description = self._ask(
            lambda: self._admin_client().describe_topics(TopicCollection([name]))[name].result(self._timeout + 10), name
        )
        topic_id = str(description.topic_id)
        if topic_id == _NO_TOPIC_ID:
            raise ConfigurationError(
                f"the broker at {self._servers} gives topic {name} no topic id, which tells a topic from another "
                "of the same name; Kafka 2.8 or newer is needed"
            )
        return Topic(name, topic_id, tuple(sorted(p.id for p in description.partitions)))

    def first_offsets(self, topic: Topic) -> dict[int, int]:
        """For each partition the first offset that Kafka still has."""
        return self._list_offsets(topic, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def end_offsets(self, topic: Topic) -> dict[int, int]:
        """For each partition the last stable offset: what read_committed can read up to."""
        return self._list_offsets(topic, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def offsets_at(self, topic: Topic, moment: datetime) -> dict[int, int]:
        """For each partition the first offset whose record is not older than `moment`; the end if none is."""
        found = self._list_offsets(topic, OffsetSpec.for_timestamp(round(moment.timestamp() * 1000)))
        ends = self.end_offsets(topic)
        return {p: offset if offset >= 0 else ends[p] for p, offset in found.items()}

    def committed_offsets(self, topic: Topic) -> dict[int, int]:
        """The group's committed offset for each partition that has one."""
        wanted = [TopicPartition(topic.name, p) for p in topic.partitions]
        with self._consumer() as consumer:
            request = partial(consumer.committed, wanted, timeout=self._timeout)
            found = self._ask_group(consumer, request, topic.name)
        return {entry.partition: entry.offset for entry in found if entry.offset >= 0}

    def commit_offsets(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Commit the group's offset for each partition, synchronously, each partition's answer checked."""
        wanted = [TopicPartition(topic, p, offset) for p, offset in sorted(offsets.items())]
        # Through a consumer: librdkafka 2.16 aborts the process when such a request of an admin client times out
        # while the broker is away and comes back.
        with self._consumer() as consumer:
            self._ask_group(consumer, partial(consumer.commit, offsets=wanted, asynchronous=False), topic)

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
        topic = self.check_topic(batch)
        self._check_ranges(topic, wanted)
        progress = _Progress(hull(wanted))
        with self._consumer() as consumer:
            consumer.assign([TopicPartition(topic.name, r.partition, r.start) for r in progress.open])
            stalled_at = time.monotonic() + self._stall_timeout
            while left := progress.open:
                most = min(_CHUNK_MESSAGES, total(left))
                before = progress.position()
                messages = self._call(partial(consumer.consume, most, _POLL_SECONDS), topic.name)
                if records := self._take(batch, messages, progress, wanted):
                    yield records
                if len(messages) < most:
                    self._advance_by_position(consumer, topic, progress)
                if progress.position() != before:
                    stalled_at = time.monotonic() + self._stall_timeout
                elif time.monotonic() > stalled_at:
                    self.check_topic(batch)
                    raise UnavailableError(
                        f"no progress for {self._stall_timeout:.0f} s while reading {topic.name} "
                        f"{' '.join(map(str, left))} from {self._servers}{self._said()}; check it, then try again"
                    )
        self.check_topic(batch)
        yield progress.no_record

    def _check_ranges(self, topic: Topic, wanted: Sequence[OffsetRange]) -> None:
        unknown = sorted({r.partition for r in wanted} - set(topic.partitions))
        if unknown:
            raise ConfigurationError(f"topic {topic.name} has no partition {', '.join(map(str, unknown))}")
        self._check_gap(topic, wanted)
        end = self.end_offsets(topic)
        early = [f"{r} (its end is {end[r.partition]})" for r in wanted if r.end > end[r.partition]]
        if early:
            raise UnavailableError(
                f"topic {topic.name} does not reach as far as the batch yet, or an open transaction holds it back: "
                f"{', '.join(early)}; correct the ranges, or try again later"
            )

    def _check_gap(self, topic: Topic, wanted: Sequence[OffsetRange]) -> None:
        gone = [OffsetRange(p, 0, first) for p, first in self.first_offsets(topic).items()]
        if lost := intersect(wanted, gone):
            raise gap_error(topic.name, lost)

    def _take(
        self, batch: Batch, messages: Sequence[Message], progress: _Progress, wanted: Sequence[OffsetRange]
    ) -> Records | None:
        delivered = [message for message in messages if message.error() is None]
        partition = np.array([message.partition() for message in delivered], np.int32)
        offset = np.array([message.offset() for message in delivered], np.int64)
        keep = progress.delivered(partition, offset)
        # Only now: an end of partition that stands in this chunk comes after the records that stand in it.
        for message in messages:
            if (error := message.error()) is None:
                continue
            topic = self.check_topic(batch)
            if error.code() in _OUT_OF_RANGE:
                self._check_gap(topic, wanted)
            if error.code() != KafkaError._PARTITION_EOF:
                raise self._error(error, topic.name)
            progress.reached(message.partition(), message.offset())  # type: ignore[arg-type]
        kept = [message for message, is_kept in zip(delivered, keep, strict=True) if is_kept]
        if not kept:
            return None
        return Records(
            partition=partition[keep],
            offset=offset[keep],
            timestamp_ms=np.array([message.timestamp()[1] for message in kept], np.int64),
            value=[message.value() for message in kept],
            key_and_headers=lambda at: (_bytes(kept[at].key()), _headers(kept[at])),
        )

    def _advance_by_position(self, consumer: Consumer, topic: Topic, progress: _Progress) -> None:
        """Transaction markers move the position and deliver nothing."""
        wanted = [TopicPartition(topic.name, r.partition) for r in progress.open]
        for entry in self._call(lambda: consumer.position(wanted), topic.name):
            if entry.offset != OFFSET_INVALID:
                progress.reached(entry.partition, entry.offset)

    def _list_offsets(self, topic: Topic, spec: OffsetSpec) -> dict[int, int]:
        request = {TopicPartition(topic.name, p): spec for p in topic.partitions}

        def ask() -> dict[int, int]:
            futures = self._admin_client().list_offsets(
                request, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=self._timeout
            )
            return {tp.partition: future.result(self._timeout + 10).offset for tp, future in futures.items()}

        return self._ask(ask, topic.name)

    def _admin_client(self) -> AdminClient:
        if self._admin is None:
            self._admin = self._make(AdminClient, {"socket.timeout.ms": int(self._timeout * 1000)})
        return self._admin

    @contextmanager
    def _consumer(self) -> Iterator[Consumer]:
        consumer = self._make(
            Consumer,
            {
                "group.id": self._group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                # A commit waits that long for the group's coordinator.
                "session.timeout.ms": int(self._timeout * 1000),
            },
        )
        try:
            yield consumer
        finally:
            consumer.close()

    def _make(self, client: Callable[[dict[str, Any]], T], properties: Mapping[str, object]) -> T:
        return make_client(client, self._servers, self._properties, properties, self._heard)

    def _heard(self, error: KafkaError) -> None:
        """Librdkafka reconnects by itself behind this: what it said explains a time-out that follows.

        A refused log-in comes with lines that say less, before and after it.
        """
        if self._last_error is None or self._last_error.code() not in _AUTHENTICATION:
            self._last_error = error

    def _said(self) -> str:
        return f" (librdkafka: {self._last_error.str()})" if self._last_error is not None else ""

    def _ask(self, request: Callable[[], T], topic: str) -> T:
        """A request whose answer may be to ask again in a moment."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                answer = request()
            except KafkaException as error:
                if error.args[0].code() not in _ASK_AGAIN or time.monotonic() > deadline:
                    raise self._error(error.args[0], topic) from error
                time.sleep(_ASK_AGAIN_SECONDS)
                # The client may go on with the leader that it knows until it is told to look again.
                self._admin_client().describe_topics(TopicCollection([topic]))[topic].exception(self._timeout + 10)
            else:
                self._last_error = None
                return answer

    def _ask_group(
        self, consumer: Consumer, request: Callable[[], Sequence[TopicPartition] | None], topic: str
    ) -> Sequence[TopicPartition]:
        def ask() -> Sequence[TopicPartition]:
            try:
                return _checked(request())
            except KafkaException as error:
                # A group that the user may not read only times out; the reason waits in the consumer's queue.
                reason = consumer.poll(0)
                raise KafkaException((reason and reason.error()) or error.args[0]) from error

        return self._ask(ask, topic)

    def _call(self, request: Callable[[], T], topic: str) -> T:
        try:
            return request()
        except KafkaException as error:
            raise self._error(error.args[0], topic) from error

    def _error(self, error: KafkaError, topic: str) -> SensorPipelineError:
        """A Kafka error as one of ours, by its code."""
        if self._admin is not None:
            self._admin.poll(0)  # it says what it has heard only when asked
        heard = self._last_error
        if heard is not None and heard.code() in _AUTHENTICATION:
            # The request only timed out; this is why.
            error = heard
        if error.code() in _GROUP_IN_USE:
            return ConfigurationError(
                f"another consumer is active in group {self._group}, so that its offsets cannot be set (what was "
                "ingested is in PostgreSQL); stop that consumer, or set KAFKA_GROUP_ID to a group of the pipeline's own"
            )
        return translate(error, topic, self._servers, self._said(), secured=bool(self._properties))


def _checked(answers: Sequence[TopicPartition] | None) -> Sequence[TopicPartition]:
    """An answer for each partition, each of which may be an error of its own."""
    for answer in answers or ():
        if answer.error is not None:
            raise KafkaException(answer.error)
    return answers or ()


def translate(
    error: KafkaError, topic: str, servers: str, said: str = "", *, secured: bool = False
) -> SensorPipelineError:
    """A Kafka error as one of this package's, split by remedy; `secured`: there are `KAFKA_CLIENT_…` settings."""
    code = error.code()
    if code in _NO_SUCH_TOPIC:
        return ConfigurationError(
            f"there is no topic {topic} at {servers}; create it, or correct KAFKA_TOPIC (it may also be that this "
            "user may not see it)"
        )
    if code in _AUTHORIZATION:
        return ConfigurationError(
            f"the Kafka user {_AUTHORIZATION[code]}: topic {topic} at {servers}; have the right granted"
        )
    if code in _AUTHENTICATION:
        return ConfigurationError(
            f"Kafka at {servers} refused the log-in or the TLS handshake ({error.str()}); check the "
            f"{KAFKA_CLIENT_PREFIX}… settings (SECURITY_PROTOCOL, SASL_…, SSL_…)"
        )
    remedy = " and that KAFKA_BOOTSTRAP_SERVERS is right"
    if secured:  # a broker that awaits another protocol just hangs up
        remedy = f", that KAFKA_BOOTSTRAP_SERVERS is right and that {KAFKA_CLIENT_PREFIX}SECURITY_PROTOCOL fits it"
    return UnavailableError(
        f"Kafka at {servers} did not answer for topic {topic}: {error.str()}{said}; check that it runs{remedy}, then "
        "try again"
    )


def make_client(
    client: Callable[[dict[str, Any]], T],
    servers: str,
    user_properties: Mapping[str, str],
    properties: Mapping[str, object],
    on_error: Callable[[KafkaError], None],
) -> T:
    """Make a consumer, a producer or an admin client.

    Raises:
        ConfigurationError: librdkafka does not know a property of `KAFKA_CLIENT_…`, or refuses its value.
    """
    quiet: dict[str, object] = {"log_level": 0} if "debug" not in user_properties else {}
    try:
        return client(
            {
                **quiet,
                "topic.metadata.refresh.interval.ms": 60_000,
                "reconnect.backoff.max.ms": 1_000,
                **user_properties,
                **properties,
                "bootstrap.servers": servers,
                "error_cb": on_error,
            }
        )
    except (KafkaException, TypeError, ValueError, AttributeError) as error:
        reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        named = ", ".join(KAFKA_CLIENT_PREFIX + key.upper().replace(".", "_") for key in user_properties)
        raise ConfigurationError(
            f"librdkafka refuses the client's settings ({' '.join(reason.split())}); correct {named or 'the settings'}"
        ) from error


def make_producer(settings: Settings, properties: Mapping[str, object]) -> Producer:
    """A producer for the settings' brokers."""
    return make_client(
        Producer, settings.kafka_bootstrap_servers, settings.kafka_client, properties, lambda error: log.debug(error)
    )


def gap_error(topic: str, lost: Iterable[OffsetRange]) -> GapError:
    """The error that names lost offsets."""
    named = ", ".join(f"partition {r.partition} offsets [{r.start}, {r.end})" for r in lost)
    return GapError(
        f"topic {topic}: Kafka no longer has {named}, and they were never ingested. Restore them, or accept the loss: "
        f"sensor-pipeline accept-gap --topic {topic} --partition PARTITION --reason TEXT"
    )


class _Progress:
    """How far each partition's range was read, and which of its offsets held no record."""

    def __init__(self, ranges: Sequence[OffsetRange]) -> None:
        self._next = {r.partition: r.start for r in ranges}
        self._end = {r.partition: r.end for r in ranges}
        self.no_record: list[OffsetRange] = []

    @property
    def open(self) -> list[OffsetRange]:
        """What is still to be read."""
        return [OffsetRange(p, at, self._end[p]) for p, at in self._next.items() if at < self._end[p]]

    def position(self) -> int:
        """The sum of the positions, which grows with any progress."""
        return sum(self._next.values())

    def reached(self, partition: int, position: int) -> None:
        """The consumer's position: whatever lies before it and was not delivered holds no record."""
        position = min(position, self._end[partition])
        if position > self._next[partition]:
            self.no_record.append(OffsetRange(partition, self._next[partition], position))
            self._next[partition] = position

    def delivered(self, partition: NDArray[np.int32], offset: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the delivered records belong to the ranges; the holes between them are noted."""
        keep = np.zeros(len(offset), np.bool_)
        for p in np.unique(partition).tolist():
            mine = partition == p
            in_range = mine & (offset >= self._next[p]) & (offset < self._end[p])
            offsets = offset[in_range]
            expected = np.concatenate([[self._next[p]], offsets[:-1] + 1]) if len(offsets) else offsets
            for hole in np.flatnonzero(offsets > expected):
                self.no_record.append(OffsetRange(p, int(expected[hole]), int(offsets[hole])))
            if len(offsets):
                self._next[p] = int(offsets[-1]) + 1
            # A record at or after the end shows that nothing more lies before it.
            self.reached(p, int(offset[mine].max()))
            keep |= in_range
        return keep


def _bytes(value: object) -> bytes | None:
    return value.encode() if isinstance(value, str) else value  # type: ignore[return-value]


def _headers(message: Message) -> Headers:
    pairs: list[tuple[str, object]] = list(message.headers() or [])  # type: ignore[arg-type]
    return [(name, _bytes(value)) for name, value in pairs]
