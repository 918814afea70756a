"""`kill -9` of `up` and of what it started: it goes on by itself, or the next `up` does, and no reading is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, TopicPartition

from sensor_pipeline.embedded import services
from sensor_pipeline.embedded.processes import marked
from sensor_pipeline.embedded.services import CODE_SERVER, DAEMON, WEBSERVER
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.test_three_ways import lag
from sensor_pipeline_tests.embedded.test_stack import Folder
from sensor_pipeline_tests.kafka.inspecting import check_rows, query
from sensor_pipeline_tests.oracle import Published
from sensor_pipeline_tests.postgres.tables import other_session, sessions
from sensor_pipeline_tests.soak import amount

RUN = "run"
KILLED = amount(
    [[RUN], [DAEMON, WEBSERVER], [CODE_SERVER]],
    3 * [[RUN], [DAEMON], [WEBSERVER], [CODE_SERVER], [DAEMON, WEBSERVER, CODE_SERVER]],
)


class Stack(Folder):
    """A folder in which `up` is typed, with what it started within reach."""

    # Each of Dagster's processes takes its time to start, and a run comes after all of them.
    patience_seconds = 400.0

    def started(self, name: str) -> list[psutil.Process]:
        """Its processes of a service, without what they started; or those of runs."""
        of_service = marked(str(self.data_dir)).get(CODE_SERVER if name == RUN else name, [])
        if name == RUN:
            return [process for process in of_service if services.is_run(process)]
        return [process for process in of_service if process.ppid() == self.ups[-1].pid]

    def kill(self, name: str) -> int:
        """Kill one; returns its process id."""
        self.wait_for(lambda: self.started(name))
        (process, *_) = self.started(name)
        process.kill()
        return process.pid

    def batches(self) -> int:
        return int(query(self.settings(), "SELECT count(*) FROM batches")[0][0])


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    for up in stack.ups:
        if up.poll() is None:
            up.terminate()
        up.wait(60)
    for pid in stack.processes():
        # A server's process that lost its client ends by itself.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def published(settings: Settings) -> list[Published]:
    """All that lies in the topic, read by a consumer of the test's own; the fleet publishes nothing bad."""
    kafka = Kafka(settings)
    topic = kafka.topic(settings.kafka_topics[0])
    ends = kafka.end_offsets(topic)
    consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap_servers, "group.id": "of the test"})
    consumer.assign([TopicPartition(topic.name, p, 0) for p in topic.partitions])
    found: list[Published] = []
    while len(found) < sum(ends.values()):
        for message in consumer.consume(5_000, 5):
            assert message.error() is None
            place = (message.partition(), message.offset())
            found.append(Published(topic.name, topic.kafka_topic_id, *place, message.value()))
    consumer.close()
    return found


@pytest.mark.soak
def test_what_up_started_is_started_again_when_it_is_killed_and_a_killed_up_by_the_next_one(stack: Stack) -> None:
    up = stack.up()
    stack.wait_for(lambda: stack.batches() > 0)
    for names in KILLED:
        before = stack.batches()
        killed = {name: stack.kill(name) for name in names}
        for name in {*names} - {RUN}:
            stack.wait_for(lambda: any(p.pid != killed[name] for p in stack.started(name)))  # noqa: B023
        stack.wait_for(lambda: stack.batches() > before)  # noqa: B023

    settings = stack.settings()
    with other_session(settings, "SELECT FROM ingested_offsets FOR UPDATE"):
        stack.wait_for(lambda: sessions(settings, waiting=True))
        up.kill()
        up.wait()
        # Nobody is left who could say that this run is over.
        for process in (process for group in marked(str(stack.data_dir)).values() for process in group):
            process.kill()
    for pid in stack.processes():
        # A server's process that lost its client ends by itself.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    stack.up("--no-ui", "--no-simulate")
    settings = stack.settings()
    stack.wait_for(lambda: not lag(settings))
    check_rows(settings, published(settings))
