"""The stack with TLS and log-ins, on a Docker daemon: `make docker`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from sensor_pipeline_tests.certificates import Authority
from sensor_pipeline_tests.deploying.test_stack import Stack, no_daemon

FILES = "docker-compose.yml:docker-compose.tls.yml"

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack with a simulated fleet and monitoring, and certificates made for it."""
    if reason := no_daemon():
        pytest.skip(reason)
    users = ["kafka_pipeline_password", "kafka_fleet_password"]
    stack = Stack(tmp_path_factory.mktemp("stack"), files=FILES, more_secrets=users)
    subprocess.run([stack.folder / "deploy" / "make-certificates"], check=True)
    try:
        stack.compose("build")
        stack.compose("up", "--detach")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "20", check=False)


def said(stack: Stack, *command: str, service: str = "code-server", **environment: str) -> str:
    """What a command of the pipeline says in a container."""
    different = [f"--env={name}={value}" for name, value in environment.items()]
    return stack.compose("exec", "-T", *different, service, "sensor-pipeline", *command, check=False)


def psql(stack: Stack, user: str, secret: str, sslmode: str) -> str:
    """What PostgreSQL says to who comes over the network."""
    place = f"host=postgres dbname=sensor_data user={user} sslmode={sslmode}"
    password = f"--env=PGPASSWORD={stack.secrets[secret]}"
    return stack.compose("exec", "-T", password, "postgres", "psql", place, "-Atc", "SELECT 'in'", check=False).strip()


def test_readings_flow_and_doctor_is_content(stack: Stack) -> None:
    before = stack.readings()
    stack.eventually("more readings", lambda: stack.readings() > before)
    # Not before the daemon's first heartbeats.
    stack.eventually("doctor is content", lambda: "wrong" not in (answer := said(stack, "doctor")) and "ok" in answer)
    assert stack.compose("ps", "--format={{.Health}}", "metrics").strip() == "healthy"


def test_every_connection_to_postgresql_is_encrypted(stack: Stack) -> None:
    every = "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_addr IS NOT NULL"
    assert stack.sql(every) == "t"
    assert psql(stack, "sensor_reader", "reader_password", "require") == "in"
    assert "no encryption" in psql(stack, "sensor_reader", "reader_password", "disable")
    assert "password authentication failed" in psql(stack, "sensor_reader", "writer_password", "require")
    assert "rejects connection" in psql(stack, "postgres", "postgres_password", "require")


def test_who_is_not_let_in_is_told_why_in_one_line(stack: Stack) -> None:
    other = Authority(stack.folder / "other").certificate.read_text()
    stack.compose("exec", "-T", "code-server", "python", "-c", f"open('/tmp/other.pem', 'w').write({other!r})")
    for different, why in (
        ({"KAFKA_CLIENT_SASL_PASSWORD_FILE": "/run/secrets/writer_password"}, "refused the log-in of the Kafka user"),
        ({"KAFKA_CLIENT_SSL_CA_LOCATION": "/tmp/other.pem"}, "the certificate of Kafka at kafka:9092 is refused"),
        ({"POSTGRES_SSLROOTCERT": "/tmp/other.pem"}, "the certificate of PostgreSQL at postgres:5432/sensor_data is"),
        ({"KAFKA_CLIENT_SECURITY_PROTOCOL": "PLAINTEXT"}, "check that it runs, that KAFKA_BOOTSTRAP_SERVERS is right"),
    ):
        answer = said(stack, "status", **different)
        assert why in answer
        assert len(answer.strip().splitlines()) == 1


def test_kafkas_users_may_do_their_part_and_no_more(stack: Stack) -> None:
    assert "the Kafka user pipeline may not write to topic" in said(stack, "simulate", "--count=1")
    assert "the Kafka user fleet may not use the consumer group" in said(stack, "doctor", service="simulator")


@pytest.mark.parametrize(("port", "is_open"), [(9091, False), (9092, True), (9093, False)])
def test_what_kafka_says_without_tls_nobody_else_hears(stack: Stack, port: int, is_open: bool) -> None:
    look = f"import socket; socket.create_connection(('kafka', {port}), 10)"
    answer = stack.compose("exec", "-T", "code-server", "python", "-c", look, check=False)
    assert ("Connection refused" in answer) is not is_open


def test_new_certificates_by_the_same_authority_are_taken_at_once(stack: Stack) -> None:
    for server in ("postgres", "kafka"):
        (stack.folder / "secrets" / f"{server}.pem").unlink()
    subprocess.run([stack.folder / "deploy" / "make-certificates", "pipeline.example.com"], check=True)
    stack.compose("up", "--detach", "--force-recreate", "postgres", "kafka", "topics")
    stack.eventually("PostgreSQL answers", lambda: stack.sql("SELECT 1") == "1")
    before = stack.readings()
    stack.eventually("readings go on", lambda: stack.readings() > before)
