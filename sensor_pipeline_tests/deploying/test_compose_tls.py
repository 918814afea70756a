"""The compose files with TLS: nothing but loopback is without it, and each service is given what it needs to log in."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from sensor_pipeline.orchestration.storage import url_of
from sensor_pipeline.settings import _VARIABLES, Settings
from sensor_pipeline_tests.certificates import Authority
from sensor_pipeline_tests.deploying.test_compose import COMPOSE, DAGSTERS, OURS, ROOT, default

TLS = yaml.safe_load((ROOT / "docker-compose.tls.yml").read_text())
PUBLIC = yaml.safe_load((ROOT / "docker-compose.public.yml").read_text())
CA = "/run/secrets/ca.pem"
# What Compose adds to; any other list takes the place of the one before it.
_ADDED_TO = ("secrets", "volumes", "ports")


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two compose files as Compose reads them together, as far as these two go."""
    both = dict(one)
    for key, value in other.items():
        before = both.get(key)
        if isinstance(before, dict):
            both[key] = merged(before, value)
        else:
            both[key] = [*before, *value] if key in _ADDED_TO and isinstance(before, list) else value
    return both


SERVICES: dict[str, dict[str, Any]] = merged(COMPOSE, TLS)["services"]
SECRETS: dict[str, Any] = merged(COMPOSE, TLS)["secrets"]


def environment(name: str) -> dict[str, str]:
    return {key: default(str(value or "")) for key, value in SERVICES[name].get("environment", {}).items()}


def in_container(name: str, folder: Path) -> dict[str, str]:
    """A service's environment, with files in `folder` for its secrets; their text is their names."""
    for secret in SERVICES[name]["secrets"]:
        (folder / secret).write_text(f"{secret}\n")
    Authority(folder, "ca")
    return {key: value.replace("/run/secrets", str(folder)) for key, value in environment(name).items()}


def listeners(variable: str) -> dict[str, tuple[str, int]]:
    """Name → host and port."""
    of_each = (listener.split("://") for listener in environment("kafka")[variable].split(","))
    return {name: (place.rpartition(":")[0], int(place.rpartition(":")[2])) for name, place in of_each}


def test_what_kafka_says_without_tls_it_says_to_itself_only() -> None:
    kafka = environment("kafka")
    protocols = dict(each.split(":") for each in kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    places = listeners("KAFKA_LISTENERS")
    assert places.keys() == protocols.keys()
    assert set(protocols.values()) == {"SASL_SSL", "PLAINTEXT"}
    assert {places[name][0] for name, protocol in protocols.items() if protocol == "PLAINTEXT"} == {"127.0.0.1"}
    # The image wants a keystore with passwords where a listener's name ends so.
    assert not [name for name in protocols if name.endswith("SSL")]
    assert kafka["KAFKA_AUTHORIZER_CLASS_NAME"].endswith(".StandardAuthorizer")
    assert "KAFKA_ALLOW_EVERYONE_IF_NO_ACL_FOUND" not in kafka
    # Who has logged in is never anonymous.
    assert kafka["KAFKA_SUPER_USERS"] == "User:ANONYMOUS"


def test_the_services_reach_kafka_by_the_listener_with_tls() -> None:
    places = listeners("KAFKA_ADVERTISED_LISTENERS")
    assert places["CLIENTS"] == ("kafka", listeners("KAFKA_LISTENERS")["CLIENTS"][1])
    assert environment("code-server")["KAFKA_BOOTSTRAP_SERVERS"] == "{}:{}".format(*places["CLIENTS"])
    local = "{}:{}".format(*places["LOCAL"]).replace("127.0.0.1", "localhost")
    assert local in (ROOT / "deploy" / "kafka" / "make-topics-and-users").read_text()
    assert {name for name, service in SERVICES.items() if "network_mode" in service} == {"topics"}
    assert SERVICES["topics"]["network_mode"] == "service:kafka"


@pytest.mark.parametrize("name", ["code-server", "metrics", "simulator", "worker"])
def test_who_reads_logs_in_as_the_pipeline_and_who_publishes_as_the_fleet(name: str, tmp_path: Path) -> None:
    user = "fleet" if name == "simulator" else "pipeline"
    env = in_container(name, tmp_path)
    env = {key: value for key, value in env.items() if key in _VARIABLES or "_FILE" in key or "KAFKA_CLIENT" in key}
    assert Settings.from_env(env).kafka_client == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": user,
        "sasl.password": f"kafka_{user}_password",
        "ssl.ca.location": str(tmp_path / "ca.pem"),
    }


@pytest.mark.parametrize("name", sorted(OURS))
def test_nobody_in_between_is_taken_for_postgresql(name: str, tmp_path: Path) -> None:
    env = environment(name)
    assert (env["POSTGRES_SSLMODE"], env["POSTGRES_SSLROOTCERT"]) == ("verify-full", CA)
    if name in DAGSTERS:
        assert "sslmode=verify-full" in url_of(in_container(name, tmp_path))


def test_kafkas_users_get_the_rights_that_the_page_on_tls_names_and_no_more() -> None:
    granted, named = (
        set(re.findall(r"--allow-principal User:(\w+) --operation (\w+)", (ROOT / file).read_text()))
        for file in ("deploy/kafka/make-topics-and-users", "docs/tls.md")
    )
    assert granted == named == {("pipeline", "Read"), ("fleet", "Write")}


def test_postgresql_lets_nobody_in_over_the_network_without_tls_and_a_password() -> None:
    text = (ROOT / "deploy" / "postgres" / "pg_hba.conf").read_text()
    rules = [line.split() for line in text.splitlines() if line and line[0] != "#"]
    over_network = [rule for rule in rules if rule[0] != "local"]
    assert {rule[0] for rule in over_network} == {"hostssl"}
    assert {rule[-1] for rule in over_network} == {"scram-sha-256", "reject"}
    # The first that fits counts.
    assert [(rule[3], rule[4]) for rule in over_network if rule[2] == "postgres"] == [
        ("127.0.0.1/32", "scram-sha-256"),
        ("all", "reject"),
    ]
    assert over_network[-1][2] == "all"
    assert {"--ssl=on", "--hba_file=/etc/postgresql/pg_hba.conf"} <= set(SERVICES["postgres"]["command"])


def test_each_secret_is_a_file_and_given_to_those_alone_who_use_it() -> None:
    script = (ROOT / "deploy" / "kafka" / "make-topics-and-users").read_text()
    assert "/run/secrets/kafka_${user}_password" in script
    read_by_scripts = {
        "topics": {"kafka_pipeline_password", "kafka_fleet_password"},
        "postgres": set(re.findall(r"/run/secrets/(\w+)", (ROOT / "deploy" / "postgres" / "roles.sql").read_text())),
    }
    for name, service in SERVICES.items():
        said = yaml.safe_dump({key: value for key, value in service.items() if key != "secrets"})
        named = set(re.findall(r"/run/secrets/([\w.]+)", said)) | read_by_scripts.get(name, set())
        assert named == set(service.get("secrets", [])), name
    assert all(secret == {"file": f"./secrets/{name}"} for name, secret in SECRETS.items())
    # The authority's key is no container's.
    assert not [name for name in SECRETS if "ca" in name and name != "ca.pem"]


def test_every_file_that_is_mounted_with_tls_is_there() -> None:
    files = [mount.split(":")[0] for service in TLS["services"].values() for mount in service.get("volumes", [])]
    assert len(files) == 2
    assert all((ROOT / file).is_file() for file in files)


def test_servers_are_published_only_by_the_file_for_that_and_only_with_tls() -> None:
    assert not [name for name, service in TLS["services"].items() if "ports" in service]
    ports = {name: service["ports"] for name, service in PUBLIC["services"].items()}
    assert ports == {"kafka": ["${KAFKA_PORT:-9094}:9094"], "postgres": ["${POSTGRES_PUBLIC_PORT:-5432}:5432"]}
    assert listeners("KAFKA_LISTENERS")["OUTSIDE"] == ("", 9094)
    (said,) = PUBLIC["services"]["kafka"]["environment"].values()
    unpublished = TLS["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    # The same but for the name, which must be given.
    assert re.sub(r"\$\{PUBLIC_HOST:\?[^}]+\}", "${PUBLIC_HOST:-localhost}", said) == unpublished != said


def make_certificates(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    (folder / "deploy").mkdir(exist_ok=True)
    shutil.copy(ROOT / "deploy" / "make-certificates", folder / "deploy")
    (folder / "secrets").mkdir(0o700, exist_ok=True)
    return subprocess.run(
        [folder / "deploy" / "make-certificates", *names], capture_output=True, text=True, check=False
    )


def handshake(server: Path, authority: Path, name: str) -> None:
    """As strict as a client can be."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server)
    ours = ssl.create_default_context(cafile=authority)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    one, other = socket.socketpair()
    with one, other:
        answering = Thread(target=lambda: _answer(theirs, other))
        answering.start()
        try:
            ours.wrap_socket(one, server_hostname=name).close()
        finally:
            one.close()
            answering.join(30)


def _answer(context: ssl.SSLContext, connection: socket.socket) -> None:
    try:
        context.wrap_socket(connection, server_side=True).close()
    except (ssl.SSLError, OSError):
        # Who asked says why.
        connection.close()


def test_certificates_are_for_the_names_that_are_used_and_nothing_is_overwritten(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, "pipeline.example.com", "192.0.2.7")
    assert made.returncode == 0, made.stderr
    files = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "secrets").iterdir()}
    assert files == {"ca.key": 0o600, "ca.pem": 0o644, "kafka.pem": 0o644, "postgres.pem": 0o644}
    assert all(f"secrets/{name}: " in made.stderr for name in files)
    folder = tmp_path / "secrets"
    for server in ("kafka", "postgres"):
        for name in (server, "pipeline.example.com", "192.0.2.7"):
            handshake(folder / f"{server}.pem", folder / "ca.pem", name)
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            handshake(folder / f"{server}.pem", folder / "ca.pem", "somebody.example.com")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    again = make_certificates(tmp_path)
    assert again.returncode == 1
    assert "secrets/postgres.pem is there already" in again.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    # Renewed: clients go on knowing the authority.
    for server in ("kafka", "postgres"):
        (folder / f"{server}.pem").unlink()
    assert make_certificates(tmp_path).returncode == 0
    assert (folder / "ca.pem").read_bytes() == before["ca.pem"]
    handshake(folder / "kafka.pem", folder / "ca.pem", "kafka")


@pytest.mark.parametrize(
    ("names", "mode", "lacking", "said"),
    [
        (["a b"], 0o700, None, "'a b' is neither a host's name nor an address"),
        ([], 0o755, None, "others may read the folder secrets"),
        ([], 0o700, "ca.pem", "secrets/ca.pem is not there, and secrets/ca.key is"),
        ([], 0o700, "ca.key", "secrets/ca.key is not there, and secrets/ca.pem is"),
    ],
)
def test_what_would_not_do_is_refused_and_nothing_is_made(
    tmp_path: Path, names: list[str], mode: int, lacking: str | None, said: str
) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    folder.chmod(mode)
    there = {"ca.pem", "ca.key"} - {lacking} if lacking else set()
    for name in there:
        (folder / name).touch()
    refused = make_certificates(tmp_path, *names)
    assert refused.returncode == 1
    assert said in refused.stderr
    assert {file.name for file in folder.iterdir()} == there


def test_compose_reads_the_files_together() -> None:
    command = ["docker", "compose", "--profile=*"]
    command += [f"--file=docker-compose{each}.yml" for each in ("", ".tls", ".public")]
    env = {**os.environ, "PUBLIC_HOST": "pipeline.example.com"}
    try:
        subprocess.run(["docker", "compose", "version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"Docker's compose is not there: {error}")
    result = subprocess.run([*command, "config"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    read = yaml.safe_load(result.stdout)["services"]
    for name, service in SERVICES.items():
        assert [secret["source"] for secret in read[name].get("secrets", [])] == service.get("secrets", [])
        assert environment(name).keys() <= read[name].get("environment", {}).keys()
    assert {name for name, service in read.items() if "ports" in service} == {"kafka", "postgres", "webserver"}
