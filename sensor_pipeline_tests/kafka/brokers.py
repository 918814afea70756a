"""A broker to be mistreated: stopped, with users who lack rights, with a log cleaner that does not wait."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.producing import admin

PASSWORD = "s3cret-of-the-user"  # not a secret

# Who connects to the first port may do anything; who logs in at the second what was granted.
_MORE = """
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port},LOGIN://{host}:{login_port}
advertised.listeners=PLAINTEXT://{host}:{port},LOGIN://{host}:{login_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,LOGIN:SASL_PLAINTEXT
listener.name.login.sasl.enabled.mechanisms=PLAIN
listener.name.login.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
    user_user="{password}";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
log.cleaner.backoff.ms=100
transaction.abort.timed.out.transaction.cleanup.interval.ms=200
"""


class TrialBroker(KafkaBroker):
    """A broker that also takes log-ins of `user`, who may do nothing that was not granted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ports.any_free())
        self.login_port = ports.any_free()

    def settings(self, database: Settings, topic: str) -> Settings:
        """Settings that point at it, as who may do anything."""
        return replace(
            database,
            kafka_bootstrap_servers=self.bootstrap_servers,
            kafka_topics=(topic,),
            kafka_group_id=f"group-of-{topic}",
        )

    def as_user(self, settings: Settings, *, password: str = PASSWORD) -> Settings:
        """The same settings as `user`."""
        return replace(
            settings,
            kafka_bootstrap_servers=f"{ports.LOOPBACK}:{self.login_port}",
            kafka_client={
                "security.protocol": "SASL_PLAINTEXT",
                "sasl.mechanism": "PLAIN",
                "sasl.username": "user",
                "sasl.password": password,
            },
        )

    def log_folder(self, topic: str, partition: int) -> Path:
        """Where a partition's log lies."""
        return self.folder / "data" / f"{topic}-{partition}"

    def freeze(self) -> None:
        """It keeps its connections and answers nothing any more."""
        assert self.child
        self.child.send(signal.SIGSTOP)

    def kill_and_start(self) -> None:
        """It dies in the middle of whatever it does, and comes back with what its log holds."""
        assert self.child
        self.child.kill()
        self.child = None
        self.start()

    def _configure(self, name: str, data: str) -> None:
        super()._configure(name, data)
        file = self.folder / name
        lines = file.read_text().splitlines()
        values = dict(line.partition("=")[::2] for line in lines)
        controller_port = values["controller.quorum.voters"].rpartition(":")[2]
        more = _MORE.format(
            host=ports.LOOPBACK,
            port=self.port,
            controller_port=controller_port,
            login_port=self.login_port,
            password=PASSWORD,
        )
        # Of a key that is there twice the last counts.
        file.write_text("\n".join(lines) + more)


def grant(settings: Settings, rights: Mapping[tuple[ResourceType, str], AclOperation]) -> None:
    """Allow `user` an operation on each of these resources."""
    acls = [
        AclBinding(kind, name, ResourcePatternType.LITERAL, "User:user", "*", operation, AclPermissionType.ALLOW)
        for (kind, name), operation in rights.items()
    ]
    client = admin(settings)
    for future in client.create_acls(acls).values():
        future.result(30)
