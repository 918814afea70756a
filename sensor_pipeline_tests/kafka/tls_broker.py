"""A broker as a site would have it: TLS, log-ins by SCRAM, and nobody may do what was not granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.settings import Settings

PIPELINE, FLEET = "pipeline", "fleet"
PASSWORD = "s3cret-of-theirs"  # not a secret

Rights = Mapping[tuple[ResourceType, str], AclOperation]

# Who connects without TLS may do anything: that is the test itself.
_MORE = """
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
sasl.enabled.mechanisms=SCRAM-SHA-512
connection.failed.authentication.delay.ms=10
"""
_LISTENER = """
listener.name.{name}.ssl.keystore.type=PEM
listener.name.{name}.ssl.keystore.location={certificate}
listener.name.{name}.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
"""


class TlsBroker(KafkaBroker):
    """A broker with a port for each of some certificates, by name, for two users: the pipeline's and the fleet's."""

    def __init__(self, folder: Path, certificates: Mapping[str, Path]) -> None:
        super().__init__(folder, ports.any_free())
        self.ports = {name: ports.any_free() for name in certificates}
        self._certificates = certificates

    def add_users(self) -> None:
        """Make the users known."""
        how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        users = [UserScramCredentialUpsertion(user, how, password=PASSWORD.encode()) for user in (PIPELINE, FLEET)]
        client = self._client()
        for future in client.alter_user_scram_credentials(users).values():
            future.result(30)

    def grant(self, user: str, rights: Rights) -> None:
        """Let a user do this, and nothing else any more."""
        kind, pattern = ResourceType.ANY, ResourcePatternType.ANY
        every = AclBindingFilter(kind, None, pattern, f"User:{user}", None, AclOperation.ANY, AclPermissionType.ANY)
        client = self._client()
        for future in client.delete_acls([every]).values():
            future.result(30)
        acls = [
            AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW)
            for (kind, name), operation in rights.items()
        ]
        for future in client.create_acls(acls).values() if acls else ():
            future.result(30)

    def settings(self, settings: Settings, user: str, authority: Path, *, port: str = "right") -> Settings:
        """The same settings as this user, at the port with this certificate."""
        return replace(
            settings,
            kafka_bootstrap_servers=f"{ports.LOOPBACK}:{self.ports[port]}",
            kafka_client={
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": user,
                "sasl.password": PASSWORD,
                "ssl.ca.location": str(authority),
            },
        )

    def _client(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})

    def _configure(self, name: str, data: str) -> None:
        super()._configure(name, data)
        file = self.folder / name
        lines = file.read_text().splitlines()
        values = dict(line.partition("=")[::2] for line in lines)
        at = "".join(f",{each.upper()}://{ports.LOOPBACK}:{port}" for each, port in self.ports.items())
        lines += [f"{key}={values[key]}{at}" for key in ("listeners", "advertised.listeners")]
        protocols = "".join(f",{each.upper()}:SASL_SSL" for each in self.ports)
        lines.append(f"listener.security.protocol.map={values['listener.security.protocol.map']}{protocols}")
        # Of a key that is there twice the last counts.
        listeners = (_LISTENER.format(name=each, certificate=file) for each, file in self._certificates.items())
        file.write_text("\n".join([*lines, _MORE, *listeners]))
