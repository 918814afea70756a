from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline_tests.embedded.owners import run_and_kill


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[KafkaBroker]:
    # A comma separates folders in Kafka's own configuration, and "é" is not ASCII.
    broker = KafkaBroker(tmp_path / "a folder, été", ports.any_free())
    yield broker
    broker.stop()


def publish(broker: KafkaBroker, *values: str) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    for value in values:
        producer.produce("topic", value.encode(), partition=0)
    assert producer.flush(20) == 0


def records(broker: KafkaBroker, count: int) -> list[str]:
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "any"})
    consumer.assign([TopicPartition("topic", 0, 0)])
    messages = consumer.consume(count, timeout=20)
    consumer.close()
    return [str(message.value(), "utf-8") for message in messages]


def test_records_outlive_a_killed_owner_and_then_a_killed_broker(broker: KafkaBroker) -> None:
    run_and_kill(
        "from pathlib import Path\n"
        "from sensor_pipeline.embedded.kafka import KafkaBroker\n"
        f"broker = KafkaBroker(Path({str(broker.folder)!r}), {broker.port})\n"
        "broker.start()\n"
        "assert broker.create_topic('topic', 4)\n"
    )
    publish(broker, "to the orphan")

    broker.start()  # ends the orphan, which holds this port and these data

    assert not broker.create_topic("topic", 4)
    publish(broker, "to ours")
    assert broker.child is not None
    os.kill(broker.child.pid, signal.SIGKILL)
    broker.child.wait(10)

    broker.start()

    assert records(broker, 2) == ["to the orphan", "to ours"]
    topic = AdminClient({"bootstrap.servers": broker.bootstrap_servers}).list_topics("topic").topics["topic"]
    assert len(topic.partitions) == 4


def test_a_broker_listens_on_loopback_only_and_leaves_nothing_when_stopped(broker: KafkaBroker) -> None:
    broker.start()
    assert broker.child is not None
    process = psutil.Process(broker.child.pid)
    listening = [connection for connection in process.net_connections() if connection.status == psutil.CONN_LISTEN]
    assert {connection.laddr.ip.removeprefix("::ffff:") for connection in listening} == {ports.LOOPBACK}
    broker.stop()
    assert not process.is_running()
    assert ports.is_free(broker.port)


def test_a_broker_that_cannot_start_says_why_and_where_its_log_is(broker: KafkaBroker) -> None:
    with (
        socket.create_server((ports.LOOPBACK, broker.port)),
        pytest.raises(UnavailableError, match=r"Kafka ended with exit code 1: .*Exception") as caught,
    ):
        broker.start()
    assert str(broker.log) in str(caught.value)
    assert "\n" not in str(caught.value)
