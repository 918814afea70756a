"""What goes wrong with Kafka is one line that says what, where, and how to mend it."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

import sensor_pipeline
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import ConfigurationError, SensorPipelineError, UnavailableError
from sensor_pipeline.kafka import Kafka, Topic
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import catch_up, check_rows
from sensor_pipeline_tests.kafka.producing import Publisher

SECRET = "hunter2-is-secret"  # not a secret
# Far above what a request may take: only something that hangs takes longer.
HANGING_SECONDS = 30

ASKS: dict[str, Callable[[Kafka], object]] = {
    "topic": lambda kafka: kafka.topic("t"),
    "first offsets": lambda kafka: kafka.first_offsets(Topic("t", "id", (0,))),
    "end offsets": lambda kafka: kafka.end_offsets(Topic("t", "id", (0,))),
    "committed offsets": lambda kafka: kafka.committed_offsets(Topic("t", "id", (0,))),
    "commit": lambda kafka: kafka.commit_offsets("t", {0: 1}),
    "drain": lambda kafka: list(kafka.drain(Batch("t", "id", (OffsetRange(0, 0, 1),)), [OffsetRange(0, 0, 1)])),
}


def refused(request: Callable[[], object]) -> SensorPipelineError:
    """The error that a request ends in, within bounded time."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(SensorPipelineError) as caught:
        pool.submit(request).result(HANGING_SECONDS)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ASKS)
def test_a_broker_that_is_down_is_named_and_waited_for_no_longer_than_allowed(name: str) -> None:
    server = f"{ports.LOOPBACK}:{ports.any_free()}"
    kafka = Kafka(Settings(kafka_bootstrap_servers=server), timeout=0.3, stall_timeout=0.3)

    error = refused(lambda: ASKS[name](kafka))

    assert isinstance(error, UnavailableError)
    assert server in str(error)
    assert "check that it runs and that KAFKA_BOOTSTRAP_SERVERS is right" in str(error)


def test_a_server_name_that_does_not_resolve_is_named() -> None:
    kafka = Kafka(Settings(kafka_bootstrap_servers="nowhere.invalid:9092"), timeout=0.3)
    error = refused(lambda: kafka.topic("t"))
    assert isinstance(error, UnavailableError)
    assert "nowhere.invalid:9092" in str(error)


def test_a_topic_that_is_not_there_is_a_wrong_setting(pipeline: Pipeline) -> None:
    for request in (
        lambda: pipeline.kafka.topic("no-such-topic"),
        lambda: catch_up(Pipeline(replace(pipeline.settings, kafka_topics=("no-such-topic",)))),
    ):
        error = refused(request)
        assert isinstance(error, ConfigurationError)
        assert f"there is no topic no-such-topic at {pipeline.settings.kafka_bootstrap_servers}" in str(error)
        assert "KAFKA_TOPIC" in str(error)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("KAFKA_CLIENT_NO_SUCH_PROPERTY", "x", "no.such.property"),
        ("KAFKA_CLIENT_SECURITY_PROTOCOL", "TLS", "security.protocol"),
        ("KAFKA_CLIENT_RECEIVE_MESSAGE_MAX_BYTES", "many", "receive.message.max.bytes"),
        ("KAFKA_CLIENT_MESSAGE_MAX_BYTES", "5", "message.max.bytes"),
        ("KAFKA_CLIENT_SASL_MECHANISM", "MAGIC", "MAGIC"),
        ("KAFKA_CLIENT_SSL_CA_LOCATION", "/no/such/file", "ssl.ca.location"),
        ("KAFKA_CLIENT_DEFAULT_TOPIC_CONFIG", "x", ""),
    ],
)
def test_a_client_setting_that_librdkafka_refuses_is_named(
    settings: Settings, variable: str, value: str, said: str
) -> None:
    env = {
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "KAFKA_CLIENT_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_CLIENT_SASL_MECHANISM": "PLAIN",
        "KAFKA_CLIENT_SASL_USERNAME": "user",
        "KAFKA_CLIENT_SASL_PASSWORD": SECRET,
        "KAFKA_CLIENT_SSL_KEY_PASSWORD": SECRET,
        variable: value,
    }
    kafka = Kafka(Settings.from_env(env), timeout=1)
    topic = Topic("t", "id", (0,))

    for request in (
        lambda: kafka.topic("t"),
        lambda: kafka.commit_offsets("t", {0: 1}),
        lambda: kafka.end_offsets(topic),
    ):
        error = refused(request)
        assert isinstance(error, ConfigurationError)
        assert variable in str(error)
        assert said in str(error)
        assert SECRET not in str(error)


@pytest.mark.parametrize("name", ["enable.auto.commit", "auto.offset.reset", "isolation.level", "group.id"])
def test_a_client_setting_that_carries_a_guarantee_is_refused(name: str) -> None:
    variable = "KAFKA_CLIENT_" + name.upper().replace(".", "_")
    with pytest.raises(ConfigurationError, match=f"{variable}: may not be set here"):
        Settings.from_env({variable: "x"})


@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL", "SASL_PLAINTEXT"])
def test_the_wrong_security_protocol_is_a_wrong_setting_and_tells_no_password(
    settings: Settings, protocol: str
) -> None:
    client = {
        "security.protocol": protocol,
        "sasl.mechanism": "PLAIN",
        "sasl.username": "user",
        "sasl.password": SECRET,
    }
    kafka = Kafka(replace(settings, kafka_client=client), timeout=1)
    error = refused(lambda: kafka.topic(settings.kafka_topics[0]))
    assert SECRET not in str(error) + repr(replace(settings, kafka_client=client))
    assert settings.kafka_bootstrap_servers in str(error)
    assert re.search("KAFKA_CLIENT_…|SECURITY_PROTOCOL", str(error))


def test_a_password_is_in_no_error_of_a_broker_that_is_down() -> None:
    server = f"{ports.LOOPBACK}:{ports.any_free()}"
    client = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN"}
    client |= {"sasl.username": "user", "sasl.password": SECRET}
    kafka = Kafka(Settings(kafka_bootstrap_servers=server, kafka_client=client), timeout=0.3)
    assert SECRET not in str(refused(lambda: kafka.topic("t")))


class Impatient(AdminClient):
    """An admin client whose broker says once that it is not ready."""

    def __init__(self, settings: Settings, code: int) -> None:
        super().__init__({"bootstrap.servers": settings.kafka_bootstrap_servers, "log_level": 0})
        self._code = code
        self.asked = 0

    def list_offsets(self, request: Any, **options: Any) -> Any:
        self.asked += 1
        if self.asked > 1:
            return super().list_offsets(request, **options)
        futures = {}
        for partition in request:
            futures[partition] = Future[Any]()
            futures[partition].set_exception(KafkaException(KafkaError(self._code)))
        return futures


@pytest.mark.parametrize(
    "code", [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.OFFSET_NOT_AVAILABLE]
)
def test_an_answer_that_only_asks_for_patience_is_asked_again(pipeline: Pipeline, code: int) -> None:
    """A broker gives it while a topic is new, after its start, and when a partition's leader changes."""
    publisher = Publisher(pipeline.settings)
    publisher.readings({0: 3})
    pipeline.kafka._admin = admin = Impatient(pipeline.settings, code)

    catch_up(pipeline)

    assert admin.asked > 1
    check_rows(pipeline.settings, publisher.published)


@pytest.mark.parametrize("name", ["list_consumer_group_offsets", "alter_consumer_group_offsets"])
def test_no_request_is_used_on_which_librdkafka_aborts_the_process(name: str) -> None:
    """Its admin requests to a group's coordinator do, where the connection is lost (librdkafka issue 4605)."""
    package = Path(sensor_pipeline.__file__).parent
    assert not [file for file in package.rglob("*.py") if name in file.read_text()]


def test_an_answer_that_never_comes_is_a_server_that_is_down(settings: Settings) -> None:
    def silent() -> None:
        raise TimeoutError

    with pytest.raises(UnavailableError, match="did not answer for topic t"):
        Kafka(settings).ask(silent, "t")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_a_connection_that_is_given_up_takes_its_threads_with_it(settings: Settings) -> None:
    """`up` looks at the backlog every two seconds, for weeks."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    gc.disable()
    try:
        for _ in range(5):
            kafka = Kafka(settings)
            kafka.committed_offsets(kafka.topic(settings.kafka_topics[0]))
        assert threads() > before
        del kafka
        assert threads() <= before
    finally:
        gc.enable()
