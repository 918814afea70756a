"""Publishing to Kafka: every message is delivered, or an error says how many were not, and why."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from sensor_pipeline.errors import ConfigurationError, DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.kafka import Kafka, make_client, translate
from sensor_pipeline.settings import Settings

# What makes the producer reliable; a setting of the user's that contradicts it is refused by librdkafka.
_RELIABLE = {
    "enable.idempotence": True,
    # Nothing is given up behind our back: how long to wait is decided here, by what is under way.
    "message.timeout.ms": 0,
}
# Takes what librdkafka would write on the terminal, at any level, when it gives up; the error says it too.
_SILENCE = logging.Logger("librdkafka")
_SILENCE.addHandler(logging.NullHandler())
# What the user may set otherwise by KAFKA_CLIENT_….
_TUNING = {
    "linger.ms": 20,
    "queue.buffering.max.messages": 100_000,
    "queue.buffering.max.kbytes": 131_072,
    # As Java's clients do, so that a key meets the same partition whoever sends it.
    "partitioner": "murmur2_random",
}
_SERVE_EVERY = 1_000  # messages between two looks at the delivery reports
_POLL_SECONDS = 0.1
_ABANDON_SECONDS = 5.0

# Without a right to any topic a producer is not even given an id.
_MAY_NOT_WRITE = {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}
_REFUSED = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_RECORD, KafkaError.INVALID_MSG_SIZE}


# Pauses of a pace: long enough that a batch is not one message, short enough that signals are heard.
_TICK_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Pace:
    """How many messages are due when, without drift; time is an argument, in seconds since the first.

    Args:
        rate: messages a second; 0: as fast as possible.
        count: the most messages, if there is a limit.
        seconds: how long it goes on, if there is a limit.
    """

    rate: float
    count: int | None = None
    seconds: float | None = None

    def limit(self) -> float:
        """The most messages there may be."""
        # The message at the end of the last second is no longer due; a rounding error must not make it so.
        by_time = math.ceil(self.rate * self.seconds - 1e-6) if self.rate and self.seconds else math.inf
        return min(by_time, math.inf if self.count is None else self.count)

    def due(self, elapsed: float) -> float:
        """How many messages are due by now, from the first on."""
        return min(self.limit(), math.floor(elapsed * self.rate) + 1 if self.rate else math.inf)

    def is_over(self, elapsed: float, sent: int) -> bool:
        """Whether nothing more is to be sent."""
        return sent >= self.limit() or (self.seconds is not None and elapsed >= self.seconds)

    def pause(self, elapsed: float, sent: int) -> float:
        """Seconds to sleep before looking again at what is due."""
        if not self.rate:
            return 0.0
        return min(max(sent / self.rate - elapsed, _TICK_SECONDS), _LONGEST_PAUSE_SECONDS)


class Publisher:
    """Sends messages to one topic: without a key to its partitions in turn, with one to the key's partition.

    Left without an error, it waits for what is under way; left by an error, it drops what has not gone out.

    Args:
        settings: where the brokers are and how to speak to them.
        topic: the topic's name.
        patience: seconds without any delivery after which `send` and `flush` give up; infinite: never.

    Raises:
        ConfigurationError: there is no such topic, or it may not be written to.
        DataError: Kafka refuses a message, such as one over the topic's size limit.
        UnavailableError: messages were not delivered; trying again can help.
    """

    def __init__(self, settings: Settings, topic: str, *, patience: float = 60) -> None:
        self.topic = topic
        self.partitions = Kafka(settings).topic(topic).partitions
        self._servers = settings.kafka_bootstrap_servers
        self._client = settings.kafka_client
        self._patience = patience
        self._in_turn = cycle(self.partitions)
        self._next = next(self._in_turn)
        self._sent = 0
        self._delivered: Counter[int] = Counter()
        self._failed = 0
        self._first_failure: KafkaError | None = None
        self._heard: KafkaError | None = None
        self._progress_at = time.monotonic()
        tuning = {name: value for name, value in _TUNING.items() if name not in settings.kafka_client}
        self._producer = make_client(
            Producer, self._servers, settings.kafka_client, {**tuning, **_RELIABLE, "logger": _SILENCE}, self._on_error
        )

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        else:
            self._abandon()

    @property
    def published(self) -> dict[int, int]:
        """How many messages each partition has taken so far."""
        return {partition: self._delivered[partition] for partition in self.partitions}

    @property
    def pending(self) -> int:
        """How many messages are under way."""
        return self._sent - self._failed - self._delivered.total()

    @property
    def stalled_seconds(self) -> float:
        """For how long nothing was delivered although something is under way."""
        return time.monotonic() - self._progress_at if self.pending else 0.0

    def offer(self, message: bytes, key: str | None = None) -> bool:
        """Queue a message; False: the queue is full, and `serve` will make room when Kafka takes some."""
        if self._sent % _SERVE_EVERY == 0:
            self.serve()
        try:
            if key is None:
                self._producer.produce(self.topic, message, partition=self._next, on_delivery=self._on_delivery)
                self._next = next(self._in_turn)
            else:
                self._producer.produce(self.topic, message, key, on_delivery=self._on_delivery)
        except BufferError:
            return False
        except KafkaException as failure:
            if failure.args[0].code() == KafkaError._FATAL:
                self._hear(self._producer.poll, _POLL_SECONDS)  # which says why
            raise self._undelivered(1, failure.args[0]) from failure
        self._sent += 1
        return True

    def send(self, message: bytes, key: str | None = None) -> None:
        """Queue a message, waiting for room."""
        while not self.offer(message, key):
            self.serve(_POLL_SECONDS)
            self._check_patience()

    def serve(self, seconds: float = 0.0) -> None:
        """Take in the delivery reports that come within `seconds`; raises if a message was refused."""
        before = self.pending
        self._hear(self._producer.poll, seconds)
        if not before or self.pending != before:
            self._progress_at = time.monotonic()
        if self._first_failure is not None:
            raise self._undelivered(self._failed, self._first_failure)

    def flush(self, within: float = math.inf) -> None:
        """Wait until everything is delivered: as long as deliveries go on, but at most `within` seconds."""
        deadline = time.monotonic() + within
        self.serve()
        while self.pending:
            self._hear(self._producer.flush, _POLL_SECONDS)
            self.serve()
            self._check_patience()
            if time.monotonic() > deadline:
                raise self._too_slow()

    def _hear(self, reports: Callable[[float], object], seconds: float) -> None:
        try:
            reports(seconds)
        except (KafkaException, SystemError) as failure:  # nothing can be delivered any more
            # The client's C code (as of 2.16) calls back on with the error set, which Python takes amiss.
            error = failure.__cause__ if isinstance(failure, SystemError) else failure
            if not isinstance(error, KafkaException):
                raise
            raise self._undelivered(self.pending, error.args[0]) from failure

    def _abandon(self) -> None:
        """Drop what is queued and learn, within limits, what became of what is on its way."""
        self._producer.purge(in_flight=False)
        with suppress(SensorPipelineError):  # another one is under way
            self._hear(self._producer.flush, _ABANDON_SECONDS)
        self._producer.purge()

    def _check_patience(self) -> None:
        if self.stalled_seconds > self._patience:
            raise self._too_slow()

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._delivered[message.partition()] += 1  # type: ignore[index]
        else:
            self._failed += 1
            self._first_failure = self._first_failure or error

    def _on_error(self, error: KafkaError) -> None:
        """Librdkafka goes on trying behind this: what it said last explains a stall."""
        self._heard = error

    def _too_slow(self) -> UnavailableError:
        said = f" (librdkafka: {self._heard.str()})" if self._heard is not None else ""
        return UnavailableError(
            f"{self.pending:,} of {self._sent:,} messages were not delivered to topic {self.topic}: Kafka at "
            f"{self._servers} takes none{said}; check that it runs, then publish them again"
        )

    def _undelivered(self, messages: int, error: KafkaError) -> SensorPipelineError:
        if error.code() in _REFUSED:
            return DataError(f"Kafka at {self._servers} refuses a message for topic {self.topic}: {error.str()}")
        if error.code() in _MAY_NOT_WRITE:
            user = " ".join(filter(None, ("the Kafka user", self._client.get("sasl.username"))))
            return ConfigurationError(
                f"{user} may not write to topic {self.topic} at {self._servers}; have WRITE on it granted (before "
                "Kafka 3.0 also IDEMPOTENT_WRITE on the cluster)"
            )
        cause = translate(error, self.topic, self._servers, self._client)
        return type(cause)(f"{messages:,} messages were not delivered: {cause}")
