"""Both servers over TLS with log-ins and the least rights, and what each wrong setting shows in every command."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AclOperation, ResourceType
from dagster import DagsterInstance

from sensor_pipeline import publish
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.cli import main
from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.kafka import Kafka, connection
from sensor_pipeline.orchestration import sensor
from sensor_pipeline.orchestration.storage import KeptConnections
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.certificates import Authority
from sensor_pipeline_tests.kafka.inspecting import catch_up, query
from sensor_pipeline_tests.kafka.producing import Publisher, eventually
from sensor_pipeline_tests.kafka.tls_broker import FLEET, PASSWORD, PIPELINE, TlsBroker
from sensor_pipeline_tests.orchestration.jobs import environment_of
from sensor_pipeline_tests.orchestration.test_sensor import tick
from sensor_pipeline_tests.postgres.tls_front import tls_fronts

WRONG_PASSWORD = "hunter2-is-secret"  # not a secret
# Of what is not answered at all.
KAFKA_SECONDS = 1.0
# Far above what a command takes here, where a request to Kafka may take KAFKA_SECONDS.
BOUND_SECONDS = 30
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a right server, of one that is called something else, and of one whose time is over; and who signs."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    here = f"IP:{ports.LOOPBACK},DNS:localhost"
    return {
        "authority": authority.certificate,
        "stranger": Authority(folder, "stranger").certificate,
        "right": authority.sign("right", here),
        "elsewhere": authority.sign("elsewhere", "DNS:elsewhere.example"),
        "expired": authority.sign("expired", here, days=-1),
    }


@pytest.fixture(scope="module")
def of_servers(certificates: dict[str, Path]) -> dict[str, Path]:
    return {name: certificates[name] for name in ("right", "elsewhere", "expired")}


@pytest.fixture(scope="module")
def tls_broker(tmp_path_factory: pytest.TempPathFactory, of_servers: dict[str, Path]) -> Iterator[TlsBroker]:
    broker = TlsBroker(tmp_path_factory.mktemp("tls-kafka"), of_servers)
    broker.start(timeout=180)
    try:
        broker.add_users()
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def postgres_ports(postgres: Settings, of_servers: dict[str, Path]) -> Iterator[dict[str, int]]:
    with tls_fronts(postgres.postgres_port, of_servers) as found:
        yield found


@pytest.fixture
def plain(database_settings: Settings, tls_broker: TlsBroker, certificates: dict[str, Path]) -> Settings:
    """Settings with a topic and a group, as who may do anything; `PIPELINE` and `FLEET` have their rights."""
    topic, group = f"tls-{next(_numbers)}", f"tls-group-{next(_numbers)}"
    tls_broker.create_topic(topic, partitions=2)
    tls_broker.grant(
        PIPELINE, {(ResourceType.TOPIC, topic): AclOperation.READ, (ResourceType.GROUP, group): AclOperation.READ}
    )
    tls_broker.grant(FLEET, {(ResourceType.TOPIC, topic): AclOperation.WRITE})
    settings = replace(
        database_settings,
        kafka_bootstrap_servers=tls_broker.bootstrap_servers,
        kafka_topics=(topic,),
        kafka_group_id=group,
    )
    for user in (PIPELINE, FLEET):
        eventually(lambda user=user: may_see(tls_broker.settings(settings, user, certificates["authority"])), user)  # type: ignore[misc]
    return settings


def may_see(settings: Settings) -> bool:
    """Rights reach the broker a moment after they were granted."""
    try:
        return bool(Kafka(settings).topic(settings.kafka_topics[0]))
    except ConfigurationError:
        return False


@pytest.fixture
def secured(
    plain: Settings, tls_broker: TlsBroker, certificates: dict[str, Path], postgres_ports: dict[str, int]
) -> Settings:
    """The same as the pipeline's user, over TLS to both servers."""
    return replace(
        tls_broker.settings(plain, PIPELINE, certificates["authority"]),
        postgres_port=postgres_ports["right"],
        postgres_sslmode="verify-full",
        postgres_sslrootcert=str(certificates["authority"]),
    )


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is refused: how long a request is tried again is not what is looked at."""
    monkeypatch.setitem(Kafka.__init__.__kwdefaults__, "timeout", KAFKA_SECONDS)
    monkeypatch.setattr(sensor, "_KAFKA_SECONDS", KAFKA_SECONDS)
    monkeypatch.setattr(connection, "_REFUSED_SECONDS", 0.2)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs a command in this process, with nothing but these settings; its exit code and all that it says."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)

    def run(settings: Settings, *arguments: str) -> tuple[int, str]:
        env = environment_of(settings) | {
            "KAFKA_CLIENT_" + name.upper().replace(".", "_"): value for name, value in settings.kafka_client.items()
        }
        env |= {
            "POSTGRES_SSLMODE": settings.postgres_sslmode or "",
            "POSTGRES_SSLROOTCERT": settings.postgres_sslrootcert or "",
        }
        said = io.StringIO()
        with monkeypatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
            for name, value in env.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main(args=list(arguments))
        return int(ended.value.code or 0), said.getvalue()

    return run


def test_readings_flow_with_no_more_rights_than_these(
    plain: Settings,
    secured: Settings,
    tls_broker: TlsBroker,
    certificates: dict[str, Path],
    command: Callable[..., tuple[int, str]],
) -> None:
    fleet = tls_broker.settings(plain, FLEET, certificates["authority"])
    assert command(fleet, "simulate", "--count", "50", "--rate", "0", "--seed", "1")[0] == 0
    code, said = command(secured, "catch-up")
    assert (code, "50 readings inserted" in said) == (0, True), said
    publisher = Publisher(plain)
    publisher.committed({0: 5, 1: 5})
    publisher.aborted({1: 5})
    with DagsterInstance.ephemeral() as instance:
        requests, told = tick(secured, instance)
    assert len(requests) == 1, told
    catch_up(Pipeline(secured))
    for name in ("status", "doctor", "verify"):
        code, said = command(secured, name)
        assert code == 0, said
    # Two committed markers, an aborted one, and the five messages before it.
    assert query(plain, "SELECT sum(readings), sum(no_record) FROM ingested_offsets") == [(60, 8)]


def test_dagsters_tables_are_reached_over_tls_too(secured: Settings, certificates: dict[str, Path]) -> None:
    def runs(**tls: Any) -> list[Any]:
        login = {"username": secured.postgres_user, "password": secured.postgres_password}
        place = {"hostname": secured.postgres_host, "port": secured.postgres_port, "db_name": secured.postgres_db}
        storage = KeptConnections.from_config_value(
            None,
            {"postgres_db": {"scheme": "postgresql+psycopg2", **login, **place, "params": tls}},
        )
        try:
            return list(storage.run_storage.get_runs())
        finally:
            for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
                part._engine.dispose()  # type: ignore[attr-defined]

    assert secured.postgres_tls == {
        "sslmode": "verify-full",
        "sslrootcert": str(certificates["authority"]),
    }
    assert runs(**secured.postgres_tls) == []


def kafka_with(**changes: str) -> Callable[[Settings, dict[str, Path], TlsBroker], Settings]:
    return lambda s, certificates, broker: replace(s, kafka_client={**s.kafka_client, **changes})


def at_port(name: str) -> Callable[[Settings, dict[str, Path], TlsBroker], Settings]:
    return lambda s, certificates, broker: replace(s, kafka_bootstrap_servers=f"{ports.LOOPBACK}:{broker.ports[name]}")


def wrong_authority(settings: Settings, certificates: dict[str, Path], broker: TlsBroker) -> Settings:
    return kafka_with(**{"ssl.ca.location": str(certificates["stranger"])})(settings, certificates, broker)


def without(right: ResourceType) -> Callable[[Settings, dict[str, Path], TlsBroker], Settings]:
    def take(settings: Settings, certificates: dict[str, Path], broker: TlsBroker) -> Settings:
        rights = {
            (ResourceType.TOPIC, settings.kafka_topics[0]): AclOperation.READ,
            (ResourceType.GROUP, settings.kafka_group_id): AclOperation.READ,
        }
        broker.grant(PIPELINE, {each: operation for each, operation in rights.items() if each[0] != right})
        return settings

    return take


WRONG_KAFKA = {
    "wrong password": (
        kafka_with(**{"sasl.password": WRONG_PASSWORD}),
        r"refused the log-in of the Kafka user pipeline .*check KAFKA_CLIENT_SASL_USERNAME, _SASL_PASSWORD",
    ),
    "unknown user": (kafka_with(**{"sasl.username": "nobody"}), "refused the log-in of the Kafka user nobody"),
    "wrong mechanism": (
        kafka_with(**{"sasl.mechanism": "PLAIN"}),
        r"refused the log-in .*PLAIN.*SCRAM-SHA-512.*_SASL_MECHANISM",
    ),
    "wrong authority": (
        wrong_authority,
        r"certificate of Kafka at {server} is refused: .*: name the file of the authority that signed it in "
        "KAFKA_CLIENT_SSL_CA_LOCATION",
    ),
    "expired": (
        at_port("expired"),
        r"certificate of Kafka at {server} is refused: certificate has expired: give the server a new one",
    ),
    "another name": (
        at_port("elsewhere"),
        r"certificate of Kafka at {server} is refused: .*not valid for '127\.0\.0\.1': use a name that it is for",
    ),
    "no TLS": (
        kafka_with(**{"security.protocol": "SASL_PLAINTEXT"}),
        "Kafka at {server} did not answer .*KAFKA_CLIENT_SECURITY_PROTOCOL fits it",
    ),
    "no log-in": (
        kafka_with(**{"security.protocol": "SSL"}),
        "Kafka at {server} did not answer .*KAFKA_CLIENT_SECURITY_PROTOCOL fits it",
    ),
    "no settings": (
        lambda s, certificates, broker: replace(s, kafka_client={}),
        "Kafka at {server} did not answer .*a port for TLS or log-ins wants KAFKA_CLIENT_SECURITY_PROTOCOL",
    ),
    "TLS where there is none": (
        lambda s, certificates, broker: replace(s, kafka_bootstrap_servers=broker.bootstrap_servers),
        "Kafka at {server} did not answer .*PLAINTEXT.*KAFKA_CLIENT_SECURITY_PROTOCOL fits it",
    ),
    "no right to the topic": (
        without(ResourceType.TOPIC),
        "the Kafka user pipeline may not read the topic .*topic {topic} at {server}; have the right granted",
    ),
    "no right to the group": (
        without(ResourceType.GROUP),
        r"the Kafka user pipeline may not use the consumer group {group} \(it needs READ on it\)",
    ),
}


# The others come from the same requests.
IN_EVERY_COMMAND = ("wrong password", "another name", "no TLS", "no right to the topic", "no right to the group")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("case", WRONG_KAFKA)
def test_what_is_wrong_with_kafka_is_one_line(
    secured: Settings,
    plain: Settings,
    tls_broker: TlsBroker,
    certificates: dict[str, Path],
    command: Callable[..., tuple[int, str]],
    capfd: pytest.CaptureFixture[str],
    case: str,
) -> None:
    make, words = WRONG_KAFKA[case]
    Publisher(plain).readings({0: 1})
    wrong = make(secured, certificates, tls_broker)
    words = words.format(server=wrong.kafka_bootstrap_servers, topic=wrong.kafka_topics[0], group=wrong.kafka_group_id)
    if case.startswith("no right"):
        # It reaches the broker a moment after it was taken.
        eventually(lambda: command(wrong, "status")[0] == 1, "the right is taken")
    for name in ("status", "catch-up", "doctor") if case in IN_EVERY_COMMAND else ("doctor",):
        check_said(*timed(command, wrong, name), words, doctor=name == "doctor")
    if case in IN_EVERY_COMMAND and case != "no right to the group":  # the sensor only asks for what it plans
        with DagsterInstance.ephemeral() as instance:
            requests, told = tick(wrong, instance)
        assert requests == []
        check_said(1, told, words)
    out, err = capfd.readouterr()
    assert "rdkafka" not in out.lower() + err.lower().replace("(librdkafka: ", "")


def timed(command: Callable[..., tuple[int, str]], settings: Settings, name: str) -> tuple[int, str]:
    began = time.monotonic()
    result = command(settings, name)
    assert time.monotonic() - began < BOUND_SECONDS
    return result


def check_said(code: int, said: str, words: str, *, doctor: bool = False) -> None:
    """A line with these words, no other beside it (but doctor's, of which each is about something), and no secret."""
    assert code == 1, said
    lines = said.strip().splitlines()
    found = [line for line in lines if re.search(words, line)]
    assert found, said
    if doctor:
        assert all(line.startswith(("ok ", "wrong ")) for line in lines), said
    else:
        assert found == lines, said
    for secret in (WRONG_PASSWORD, PASSWORD, "Traceback"):
        assert secret not in said


WRONG_POSTGRES = {
    "wrong password": (
        lambda s, certificates, postgres_ports: replace(s, postgres_password=WRONG_PASSWORD),
        "no connection to PostgreSQL at {server}.*password authentication failed.*_PASSWORD",
    ),
    "wrong authority": (
        lambda s, certificates, postgres_ports: replace(s, postgres_sslrootcert=str(certificates["stranger"])),
        "certificate of PostgreSQL at {server}/{db} is refused: .*: name the file of the authority that signed it in "
        "POSTGRES_SSLROOTCERT",
    ),
    "expired": (
        lambda s, certificates, postgres_ports: replace(s, postgres_port=postgres_ports["expired"]),
        "certificate of PostgreSQL at {server}/{db} is refused: certificate has expired: give the server a new one",
    ),
    "another name": (
        lambda s, certificates, postgres_ports: replace(s, postgres_port=postgres_ports["elsewhere"]),
        r"certificate of PostgreSQL at {server}/{db} is refused: .*not valid for '127\.0\.0\.1': use a name that it",
    ),
    "no TLS": (
        lambda s, certificates, postgres_ports: replace(s, postgres_sslmode="disable"),
        "no connection to PostgreSQL at {server}.*POSTGRES_SSLMODE",
    ),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("case", WRONG_POSTGRES)
def test_what_is_wrong_with_postgresql_is_one_line_in_every_command(
    secured: Settings,
    certificates: dict[str, Path],
    postgres_ports: dict[str, int],
    command: Callable[..., tuple[int, str]],
    case: str,
) -> None:
    make, words = WRONG_POSTGRES[case]
    wrong = make(secured, certificates, postgres_ports)
    words = words.format(server=f"{wrong.postgres_host}:{wrong.postgres_port}", db=wrong.postgres_db)
    for name in ("status", "catch-up", "verify", "doctor"):
        check_said(*timed(command, wrong, name), words, doctor=name == "doctor")
    with DagsterInstance.ephemeral() as instance:
        requests, told = tick(wrong, instance)
    assert requests == []
    check_said(1, told, words)


def test_who_may_not_publish_is_told_so(
    plain: Settings,
    tls_broker: TlsBroker,
    certificates: dict[str, Path],
    command: Callable[..., tuple[int, str]],
) -> None:
    reader = tls_broker.settings(plain, PIPELINE, certificates["authority"])
    code, said = command(reader, "simulate", "--count", "1", "--rate", "0")
    assert code == 1
    assert f"may not write to topic {plain.kafka_topics[0]}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("served_between", [True, False])
def test_who_may_not_publish_is_told_so_whenever_it_is_found(
    plain: Settings, tls_broker: TlsBroker, certificates: dict[str, Path], served_between: bool
) -> None:
    """By the send after, by the look at what was delivered, or while what is queued is dropped."""
    reader = tls_broker.settings(plain, PIPELINE, certificates["authority"])
    (topic,) = plain.kafka_topics

    def send() -> None:
        with publish.Publisher(reader, topic) as publisher:
            for _ in range(20):
                publisher.send(b"{}")
                time.sleep(0.4)
                if served_between:
                    publisher.serve()

    with pytest.raises(ConfigurationError, match=f"may not write to topic {topic}"):
        send()
