"""The compose file: what each service is given, when it starts and how it ends."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from sensor_pipeline.orchestration.storage import url_of
from sensor_pipeline.settings import _VARIABLES, Settings, parse_duration

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
INSTANCE = yaml.safe_load(resources.files("sensor_pipeline.orchestration").joinpath("dagster.yaml").read_text())

ONE_SHOTS = {"topics", "migrate"}
OURS = {name for name, service in SERVICES.items() if service["image"].startswith("sensor-pipeline:")}
WITH_SETTINGS = {"migrate", "code-server", "simulator", "worker", "metrics"}
DAGSTERS = {"webserver", "daemon"}
EXECUTE_RUNS = {"code-server", "worker"}

each_service = pytest.mark.parametrize("name", sorted(SERVICES))
each_of_ours = pytest.mark.parametrize("name", sorted(OURS))


def environment(name: str) -> dict[str, str]:
    return {key: "" if value is None else str(value) for key, value in SERVICES[name].get("environment", {}).items()}


def default(text: str) -> str:
    """What `${NAME:-default}` is where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def seconds(duration: str) -> float:
    return sum(parse_duration(part).total_seconds() for part in re.findall(r"\d+[a-z]+", duration.replace("m", "min")))


def test_the_services_and_their_profiles() -> None:
    assert OURS == WITH_SETTINGS | DAGSTERS
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {
        "simulator": ["demo"],
        "redis": ["scale"],
        "worker": ["scale"],
        "metrics": ["monitoring"],
        "prometheus": ["monitoring"],
    }
    assert SERVICES["worker"]["command"] == ["sensor-pipeline", "worker"]
    assert environment("worker")["CELERY_BROKER_URL"].startswith("${CELERY_BROKER_URL:-redis://redis:6379/")


@pytest.mark.parametrize("name", sorted(WITH_SETTINGS))
def test_every_setting_passes_through(name: str) -> None:
    given = environment(name)
    for variable in set(_VARIABLES) - {"POSTGRES_PASSWORD"}:
        # None: as it is where compose runs.
        source = "POSTGRES_OWNER" if (name, variable) == ("migrate", "POSTGRES_USER") else variable
        assert re.fullmatch(rf"(\$\{{{source}:-[^}}]*\}})?", given[variable]), variable
    # KAFKA_CLIENT_<PROPERTY> cannot be listed.
    assert SERVICES[name]["env_file"] == [{"path": ".env", "required": False}]
    assert Settings.from_env({key: default(value) for key, value in given.items() if key in _VARIABLES})


@pytest.mark.parametrize("name", sorted(DAGSTERS))
def test_the_web_server_and_the_daemon_know_dagsters_database_and_nothing_of_the_pipelines(name: str) -> None:
    assert SERVICES[name]["secrets"] == ["dagster_password"]
    assert not {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE", "KAFKA_BOOTSTRAP_SERVERS"} & set(
        environment(name)
    )
    assert "env_file" not in SERVICES[name]


def test_dagsters_database_and_role_are_apart(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a/b@c:d\n")
    env = {key: default(value) for key, value in environment("daemon").items()}
    assert env["DAGSTER_POSTGRES_PASSWORD_FILE"] == "/run/secrets/dagster_password"
    url = url_of(env | {"DAGSTER_POSTGRES_PASSWORD_FILE": str(tmp_path / "password")})
    assert url == "postgresql+psycopg2://dagster:a%2Fb%40c%3Ad@postgres:5432/dagster"
    for name in EXECUTE_RUNS:
        assert environment("webserver").items() - environment(name).items() <= {
            ("DAGSTER_HOME", "/opt/dagster/${RUNS_BY:-code-server}")
        }
    assert environment("worker")["DAGSTER_HOME"] == "/opt/dagster/workers"


def test_who_migrates_owns_and_who_runs_the_pipeline_only_writes() -> None:
    users = {name: default(environment(name)["POSTGRES_USER"]) for name in WITH_SETTINGS}
    assert users == dict.fromkeys(WITH_SETTINGS, "sensor_writer") | {"migrate": "sensor_owner"}
    command = [default(argument) for argument in SERVICES["migrate"]["command"]]
    assert command == ["sensor-pipeline", "migrate", "--writer=sensor_writer", "--reader=sensor_reader"]
    made = environment("postgres")
    script = (ROOT / "deploy" / "postgres" / "roles.sql").read_text()
    for variable in re.findall(r"\\getenv \w+ (\w+)", script):
        assert made[variable]
    read = set(re.findall(r"/run/secrets/(\w+)", script))
    assert read | {"postgres_password"} == set(SERVICES["postgres"]["secrets"])
    assert made["POSTGRES_WRITER"] == environment("code-server")["POSTGRES_USER"]
    assert made["POSTGRES_OWNER"] == environment("migrate")["POSTGRES_USER"]


def test_only_the_ui_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"webserver": ["127.0.0.1:${UI_PORT:-3000}:3000"]}
    assert not [name for name, service in SERVICES.items() if "network_mode" in service]


@each_service
def test_no_service_holds_a_secret(name: str) -> None:
    for key, value in environment(name).items():
        if re.search("PASSWORD|SECRET|TOKEN", key):
            assert key.endswith("_FILE")
            secret = value.removeprefix("/run/secrets/")
            # The simulator has no use for the database's, and is not given it.
            assert secret in SERVICES[name].get("secrets", [""])


def test_secrets_are_files_that_git_does_not_take() -> None:
    assert all(secret == {"file": f"./secrets/{name}"} for name, secret in COMPOSE["secrets"].items())
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == COMPOSE["secrets"].keys()
    assert {".env", "secrets/"} <= set((ROOT / ".gitignore").read_text().splitlines())


@each_service
def test_each_service_is_limited_and_logs_without_filling_the_disk(name: str) -> None:
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]
    assert {"cpus", "memory"} <= limits.keys()
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[\w./-]+:(\$\{SENSOR_PIPELINE_VERSION:-)?v?\d[\d.]*\}?", service["image"])


@each_of_ours
def test_each_of_ours_needs_nothing_but_a_temporary_folder(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert not service.get("volumes")


@each_service
def test_what_runs_for_good_is_started_again_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == ("no" if name in ONE_SHOTS else "unless-stopped")
    check = service.get("healthcheck", {})
    # The code server's is the image's; that of the others of ours would ask for a port that they have not.
    if name in ONE_SHOTS | {"simulator", "worker"}:
        assert check in ({}, {"disable": True})
    else:
        assert name == "code-server" or check["test"][0] == "CMD"


@each_service
def test_each_service_waits_for_what_it_needs(name: str) -> None:
    for other, condition in SERVICES[name].get("depends_on", {}).items():
        if other in ONE_SHOTS:
            assert condition == {"condition": "service_completed_successfully"}
        elif (name, other) == ("prometheus", "metrics"):
            # Prometheus tells by itself whether it can be scraped.
            assert condition == {"condition": "service_started"}
        else:
            assert condition == {"condition": "service_healthy"}
    if name in OURS - ONE_SHOTS:
        assert {"migrate", "topics", "code-server"} & SERVICES[name]["depends_on"].keys()


def test_a_batch_may_end_before_its_container_does() -> None:
    longest = INSTANCE["run_monitoring"]["max_runtime_seconds"]
    for name in EXECUTE_RUNS:
        assert seconds(SERVICES[name]["stop_grace_period"]) > longest
    (left,) = re.findall(r"^left=(\d+)$", (ROOT / "deploy" / "await-runs").read_text(), re.MULTILINE)
    assert longest < int(left) < seconds(SERVICES["code-server"]["stop_grace_period"])


def test_what_must_be_kept_lies_in_named_volumes() -> None:
    kept = {name: service["volumes"][0] for name, service in SERVICES.items() if "volumes" in service}
    assert kept == {
        "postgres": "postgres:/var/lib/postgresql/data",
        "kafka": "kafka:/var/lib/kafka/data",
        "redis": "redis:/data",
        "prometheus": "prometheus:/prometheus",
    }
    assert COMPOSE["volumes"].keys() == kept.keys()
    assert environment("kafka")["KAFKA_LOG_DIRS"] == "/var/lib/kafka/data"


def test_every_file_that_is_mounted_is_there() -> None:
    files = [mount.split(":")[0] for s in SERVICES.values() for mount in s.get("volumes", []) if mount[0] == "."]
    assert len(files) == 2
    assert all((ROOT / file).exists() for file in files)


def test_the_code_is_found_under_the_name_that_dagster_keeps_states_by() -> None:
    (shared,) = yaml.safe_load((ROOT / "deploy" / "workspace.yaml").read_text())["load_from"]
    (local,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    assert shared["grpc_server"] == {
        "host": "code-server",
        "port": 4266,
        "location_name": local["python_module"]["location_name"],
    }
