"""Clients of the settings' brokers, and requests whose errors are this package's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakMethod

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from sensor_pipeline.errors import ConfigurationError, SensorPipelineError, UnavailableError
from sensor_pipeline.kafka.errors import ASK_AGAIN, GROUP_IN_USE, REFUSED, translate
from sensor_pipeline.settings import KAFKA_CLIENT_PREFIX, Settings
from sensor_pipeline.tls import certificate_problem

T = TypeVar("T")

_ASK_AGAIN_SECONDS = 0.1
# A connection that one broker refuses may be made with another, in so many seconds or not at all.
_REFUSED_SECONDS = 2.0
_LISTEN_SECONDS = 0.1

# What the user may set otherwise by KAFKA_CLIENT_…. By default a partition whose queue is full is left alone for a
# second, in which a drain reads it empty and waits (6.2 us a message instead of 3.2, decoding included).
_FETCH = {"fetch.queue.backoff.ms": 10, "queued.max.messages.kbytes": 16_384}


class Connection:
    """Clients of the settings' brokers.

    Args:
        settings: where the brokers are and how to speak to them.
        timeout: seconds that one request may take.
    """

    def __init__(self, settings: Settings, timeout: float) -> None:
        self.servers = settings.kafka_bootstrap_servers
        self.timeout = timeout
        self._group = settings.kafka_group_id
        self._properties = settings.kafka_client
        self._last_error: KafkaError | None = None
        self._admin: AdminClient | None = None

    def admin(self) -> AdminClient:
        """The admin client, made at first use."""
        if self._admin is None:
            self._admin = self._make(AdminClient, {"socket.timeout.ms": int(self.timeout * 1000)})
        return self._admin

    @contextmanager
    def consumer(self, fetch: Mapping[str, object] = _FETCH) -> Iterator[Consumer]:
        """A consumer for one block; it joins no group, resets no offset and reads committed records only.

        `fetch` says how it fetches, where the user does not.
        """
        consumer = self._make(
            Consumer,
            {
                **{name: value for name, value in fetch.items() if name not in self._properties},
                "group.id": self._group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                # A commit waits that long for the group's coordinator.
                "session.timeout.ms": int(self.timeout * 1000),
            },
        )
        try:
            yield consumer
        finally:
            consumer.close()

    def _make(self, client: Callable[[dict[str, Any]], T], properties: Mapping[str, object]) -> T:
        # Held weakly: clients that refer back to what holds them would stay, each with its threads, until the garbage
        # collector comes by.
        heard = WeakMethod(self._heard)

        def on_error(error: KafkaError) -> None:
            if method := heard():
                method(error)

        return make_client(client, self.servers, self._properties, properties, on_error)

    def _heard(self, error: KafkaError) -> None:
        """Librdkafka reconnects by itself behind this: what it said explains a time-out that follows.

        A refused log-in comes with lines that say less, before and after it.
        """
        if not self._is_refused():
            self._last_error = error

    def _is_refused(self) -> bool:
        return self._last_error is not None and self._last_error.code() in REFUSED

    def said(self) -> str:
        """What librdkafka said last, in brackets, to explain a time-out."""
        return f" (librdkafka: {self._last_error.str()})" if self._last_error is not None else ""

    def answer(self, future: Future[T]) -> T:
        """What the admin client is asked for; a refused log-in is not waited out."""
        deadline = time.monotonic() + self.timeout + 10
        refused_until: float | None = None
        while not future.done() and time.monotonic() < deadline:
            wait([future], _LISTEN_SECONDS)
            self.admin().poll(0)  # it says what it has heard only when asked
            if self._is_refused():
                refused_until = refused_until or time.monotonic() + _REFUSED_SECONDS
                if time.monotonic() > refused_until:
                    raise KafkaException(self._last_error)
        return future.result(0)

    def ask(self, request: Callable[[], T], topic: str) -> T:
        """A request whose answer may be to ask again in a moment."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                answer = request()
            except KafkaException as error:
                if error.args[0].code() not in ASK_AGAIN or time.monotonic() > deadline:
                    raise self.error(error.args[0], topic) from error
                time.sleep(_ASK_AGAIN_SECONDS)
                # The client may go on with the leader that it knows until it is told to look again.
                self.admin().describe_topics(TopicCollection([topic]))[topic].exception(self.timeout + 10)
            except TimeoutError as error:
                raise UnavailableError(
                    f"Kafka at {self.servers} did not answer for topic {topic}{self.said()}; check that it runs and "
                    "that KAFKA_BOOTSTRAP_SERVERS is right, then try again"
                ) from error
            else:
                self._last_error = None
                return answer

    def ask_group(
        self, consumer: Consumer, request: Callable[[], Sequence[TopicPartition] | None], topic: str
    ) -> Sequence[TopicPartition]:
        """A request about the group's offsets, each partition's answer checked."""

        def ask() -> Sequence[TopicPartition]:
            try:
                return checked(request())
            except KafkaException as error:
                # A group that the user may not read only times out; the reason waits in the consumer's queue.
                reason = consumer.poll(0)
                raise KafkaException((reason and reason.error()) or error.args[0]) from error

        return self.ask(ask, topic)

    def call(self, request: Callable[[], T], topic: str) -> T:
        """A request that is made once."""
        try:
            return request()
        except KafkaException as error:
            raise self.error(error.args[0], topic) from error

    def error(self, error: KafkaError, topic: str) -> SensorPipelineError:
        """A Kafka error as one of ours, by its code."""
        if self._admin is not None:
            self._admin.poll(0)  # it says what it has heard only when asked
        if self._last_error is not None and self._is_refused():
            # The request only timed out; this is why.
            error = self._last_error
        if error.code() == KafkaError._SSL and (problem := self._certificate_problem()):
            return ConfigurationError(problem)
        if error.code() in GROUP_IN_USE:
            return ConfigurationError(
                f"another consumer is active in group {self._group}, so that its offsets cannot be set (what was "
                "ingested is in PostgreSQL); stop that consumer, or set KAFKA_GROUP_ID to a group of the pipeline's own"
            )
        return translate(error, topic, self.servers, self._properties, said=self.said(), group=self._group)

    def _certificate_problem(self) -> str | None:
        for server in self.servers.split(","):
            host, _, port = server.strip().rpartition(":")
            problem = certificate_problem(
                host.strip("[]"),
                int(port),
                authorities=self._properties.get("ssl.ca.location"),
                setting=f"{KAFKA_CLIENT_PREFIX}SSL_CA_LOCATION",
                check_name=self._properties.get("ssl.endpoint.identification.algorithm") != "none",
            )
            if problem:
                return f"the certificate of Kafka at {server.strip()} is refused: {problem}"
        return None


def checked(answers: Sequence[TopicPartition] | None) -> Sequence[TopicPartition]:
    """An answer for each partition, each of which may be an error of its own."""
    for answer in answers or ():
        if answer.error is not None:
            raise KafkaException(answer.error)
    return answers or ()


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
                "reconnect.backoff.ms": 1,
                "topic.metadata.refresh.fast.interval.ms": 10,
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
