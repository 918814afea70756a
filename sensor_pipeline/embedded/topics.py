"""Topics made and removed on a broker, whoever's it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from sensor_pipeline.embedded.processes import Deadline
from sensor_pipeline.errors import UnavailableError

_SECONDS = 60.0
_POLL_SECONDS = 0.05


def create_topic(servers: str, name: str, partitions: int, client: Mapping[str, str] | None = None) -> bool:
    """Create a topic unless it is there, and return once every client sees it; whether it was created.

    Args:
        servers: the brokers.
        name: the topic's.
        partitions: how many.
        client: further properties of the client, such as those of a secured listener.

    Raises:
        UnavailableError: the broker does not answer or refuses.
    """
    admin = _admin(servers, client)  # its requests end with it, so it has to outlive the answer
    try:
        admin.create_topics([NewTopic(name, partitions, 1)], operation_timeout=_SECONDS)[name].result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise UnavailableError(f"cannot create topic {name} on {servers}: {error}") from error
    deadline = Deadline(_SECONDS)
    while not _leads(admin, name, partitions):
        if not deadline.left:
            raise UnavailableError(f"topic {name} on {servers} has no leader; see the broker's log")
        time.sleep(_POLL_SECONDS)
    return True


def delete_topic(servers: str, name: str, client: Mapping[str, str] | None = None) -> None:
    """Delete a topic.

    Raises:
        UnavailableError: the broker does not answer or refuses.
    """
    admin = _admin(servers, client)
    try:
        admin.delete_topics([name], operation_timeout=_SECONDS)[name].result()
    except KafkaException as error:
        raise UnavailableError(f"cannot delete topic {name} on {servers}: {error}") from error


def _leads(admin: AdminClient, name: str, partitions: int) -> bool:
    """Whether the broker leads all of a topic's partitions: it is created before it is known."""
    known = admin.list_topics(name, timeout=10).topics[name].partitions
    return len(known) == partitions and all(p.leader >= 0 for p in known.values())


def _admin(servers: str, client: Mapping[str, str] | None) -> AdminClient:
    properties: dict[str, Any] = {**(client or {}), "bootstrap.servers": servers, "log_level": 0}
    return AdminClient(properties)
