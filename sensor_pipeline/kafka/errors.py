"""Kafka's errors as this package's own, told apart by code, never by message text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from confluent_kafka import KafkaError

from sensor_pipeline.errors import ConfigurationError, GapError, SensorPipelineError, UnavailableError
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.settings import KAFKA_CLIENT_PREFIX

_AUTHORIZATION = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "may not read the topic (it needs READ on it, and who publishes WRITE)",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "may not use the consumer group{group} (it needs READ on it)",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "may not use the cluster",
}
_LOG_IN = {
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.UNSUPPORTED_SASL_MECHANISM,
    KafkaError.ILLEGAL_SASL_STATE,
}
# Nothing that passes by itself: no connection is made, whatever is asked for.
REFUSED = {*_LOG_IN, KafkaError._SSL}
_NO_SUCH_TOPIC = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}

# Said for a moment after a topic is made, a broker starts or a leader changes; not every client call waits it out.
ASK_AGAIN = {
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
GROUP_IN_USE = {
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError.UNRELEASED_INSTANCE_ID,
}
OUT_OF_RANGE = {KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET}


def translate(
    error: KafkaError,
    topic: str,
    servers: str,
    client: Mapping[str, str],
    *,
    said: str = "",
    group: str | None = None,
) -> SensorPipelineError:
    """A Kafka error as one of this package's, split by remedy.

    Args:
        error: what the client says.
        topic: that the request was about.
        servers: that were asked.
        client: the `KAFKA_CLIENT_…` settings.
        said: what else librdkafka said, in brackets.
        group: the consumer group, where there is one.
    """
    code = error.code()
    user = " ".join(filter(None, ("the Kafka user", client.get("sasl.username"))))
    if code in _NO_SUCH_TOPIC:
        return ConfigurationError(
            f"there is no topic {topic} at {servers}; create it, or correct KAFKA_TOPIC (it may also be that this "
            "user may not see it)"
        )
    if code in _AUTHORIZATION:
        may_not = _AUTHORIZATION[code].format(group=f" {group}" if group else "")
        return ConfigurationError(f"{user} {may_not}: topic {topic} at {servers}; have the right granted")
    if code in _LOG_IN:
        return ConfigurationError(
            f"Kafka at {servers} refused the log-in of {user} ({error.str()}); check "
            f"{KAFKA_CLIENT_PREFIX}SASL_USERNAME, _SASL_PASSWORD and _SASL_MECHANISM, and that "
            f"{KAFKA_CLIENT_PREFIX}SECURITY_PROTOCOL fits the port"
        )
    if code in REFUSED:
        return ConfigurationError(
            f"the TLS handshake with Kafka at {servers} failed ({error.str()}); check "
            f"{KAFKA_CLIENT_PREFIX}SSL_CA_LOCATION (and the other _SSL_… settings), and that "
            f"{KAFKA_CLIENT_PREFIX}SECURITY_PROTOCOL fits the port"
        )
    # A broker that awaits another protocol just hangs up.
    protocol = f"{KAFKA_CLIENT_PREFIX}SECURITY_PROTOCOL"
    remedy = f" and that KAFKA_BOOTSTRAP_SERVERS is right (a port for TLS or log-ins wants {protocol})"
    if client:
        remedy = f", that KAFKA_BOOTSTRAP_SERVERS is right and that {protocol} fits it"
    return UnavailableError(
        f"Kafka at {servers} did not answer for topic {topic}: {error.str()}{said}; check that it runs{remedy}, then "
        "try again"
    )


def gap_error(topic: str, lost: Iterable[OffsetRange]) -> GapError:
    """The error that names lost offsets."""
    named = ", ".join(f"partition {r.partition} offsets [{r.start}, {r.end})" for r in lost)
    return GapError(
        f"topic {topic}: Kafka no longer has {named}, and they were never ingested. Restore them, or accept the loss: "
        f"sensor-pipeline accept-gap --topic {topic} --partition PARTITION --reason TEXT"
    )
