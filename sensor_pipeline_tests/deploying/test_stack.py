"""The real image and the real compose file, on a Docker daemon: `make docker`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from sensor_pipeline.embedded import ports

ROOT = Path(__file__).parents[2]
FILES = ["docker-compose.yml", "Dockerfile", ".dockerignore", "pyproject.toml", "requirements-deploy.txt", "README.md"]
FILES += ["LICENSE", "deploy", "sensor_pipeline", "docker-compose.tls.yml"]
SECRETS = [f"{name}_password" for name in ("postgres", "owner", "writer", "reader", "dagster")]
PROFILES = ["--profile=demo", "--profile=monitoring"]
PATIENCE_SECONDS = 600


def no_daemon() -> str | None:
    """Why there is no Docker daemon to ask; None where there is one."""
    for command in (["docker", "version"], ["docker", "compose", "version"]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            return f"`{' '.join(command)}` fails: {error}"
    return None


class Stack:
    """A project of the compose file, or of several, in a folder and with secrets of its own."""

    def __init__(self, folder: Path, *, files: str = "docker-compose.yml", more_secrets: Sequence[str] = ()) -> None:
        for name in FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        self.folder = folder
        self.secrets = {name: secrets.token_hex(16) for name in (*SECRETS, *more_secrets)}
        (folder / "secrets").mkdir(mode=0o700)
        for name, text in self.secrets.items():
            (folder / "secrets" / name).write_text(f"{text}\n")
        self.ui = f"http://127.0.0.1:{(port := ports.any_free())}"
        self._env = {
            **os.environ,
            "UI_PORT": str(port),
            "COMPOSE_FILE": files,
            "COMPOSE_PROJECT_NAME": f"sensor-pipeline-test-{port}",
        }

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run `docker compose`; what it printed."""
        result = subprocess.run(
            ["docker", "compose", *PROFILES, *arguments],
            cwd=self.folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS * 3,
            check=False,
        )
        assert result.returncode == 0 or not check, f"{arguments}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout if check else result.stdout + result.stderr

    def start(self, service: str, *command: str) -> subprocess.Popen[bytes]:
        """A command in a service's container, left to run."""
        return subprocess.Popen(
            ["docker", "compose", *PROFILES, "exec", "-T", service, *command], cwd=self.folder, env=self._env
        )

    def sql(self, statement: str, *, database: str = "sensor_data", user: str = "postgres") -> str:
        """What a statement answers, or the error."""
        return self.compose(
            "exec", "-T", "postgres", "psql", "-At", "-U", user, "-c", statement, database, check=False
        ).strip()

    def readings(self) -> int:
        return int(self.sql("SELECT count(*) FROM readings"))

    def inspect(self, service: str) -> dict[str, Any]:
        name = self.compose("ps", "--all", "--quiet", service).strip()
        said = subprocess.run(["docker", "inspect", name], check=True, capture_output=True, text=True).stdout
        found: dict[str, Any] = json.loads(said)[0]
        return found

    def eventually(self, what: str, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"never: {what}\n{self.compose('ps', '--all')}"
            time.sleep(2)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack with a simulated fleet and monitoring, built and started."""
    if reason := no_daemon():
        pytest.skip(reason)
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.compose("build")
        stack.compose("up", "--detach")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "20", check=False)


pytestmark = pytest.mark.docker


def test_the_file_is_clean(stack: Stack) -> None:
    assert stack.compose("config", "--quiet", check=False) == ""


def test_readings_flow_and_doctor_is_content(stack: Stack) -> None:
    before = stack.readings()
    stack.eventually("more readings", lambda: stack.readings() > before)
    stack.eventually("an ended failure", lambda: int(stack.sql("SELECT count(end_time) FROM failures")))
    said: list[str] = []

    def is_content() -> bool:
        said.append(stack.compose("exec", "-T", "code-server", "sensor-pipeline", "doctor", check=False))
        return "wrong" not in said[-1] and "Dagster: instance in /opt/dagster/code-server" in said[-1]

    # Not before the daemon's first heartbeats.
    stack.eventually("doctor is content", is_content)
    assert "sensor_writer has all that are needed" in said[-1]


def test_the_ui_answers_on_loopback_and_nothing_else_is_published(stack: Stack) -> None:
    with urlopen(f"{stack.ui}/server_info", timeout=20) as answer:
        assert "dagster_version" in answer.read().decode()
    rows = [json.loads(line) for line in stack.compose("ps", "--format", "json").splitlines()]
    published = {(p["URL"], row["Service"]) for row in rows for p in row["Publishers"] or () if p["PublishedPort"]}
    assert published == {("127.0.0.1", "webserver")}


def test_the_roles_may_what_they_must(stack: Stack) -> None:
    assert int(stack.sql("SELECT count(*) FROM readings", user="sensor_reader")) > 0
    assert "permission denied" in stack.sql("DELETE FROM failures", user="sensor_reader")
    assert "permission denied" in stack.sql("CREATE TABLE x ()", user="sensor_reader")
    assert "must be owner" in stack.sql("DROP TABLE failures", user="sensor_writer")
    for user in ("sensor_owner", "sensor_writer", "sensor_reader"):
        assert "permission denied for database" in stack.sql("SELECT 1", database="dagster", user=user)
    assert "permission denied for database" in stack.sql("SELECT 1", user="dagster")


@pytest.mark.parametrize("service", ["code-server", "daemon", "webserver", "metrics", "simulator"])
def test_ours_run_as_nobody_and_can_write_nothing(stack: Stack, service: str) -> None:
    tried = "id -u; touch /opt/dagster/x /opt/venv/x; touch /tmp/x && rm /tmp/x && echo ok"
    said = stack.compose("exec", "-T", service, "sh", "-c", tried, check=False)
    assert said.splitlines()[0] == "10001"
    assert said.count("Read-only file system") == 2
    assert "ok" in said


def test_no_secret_is_in_the_image_or_in_an_environment(stack: Stack) -> None:
    image = stack.inspect("code-server")["Image"]
    layers = subprocess.run(["docker", "history", "--no-trunc", image], check=True, capture_output=True, text=True)
    whole = layers.stdout + json.dumps([stack.inspect(name)["Config"]["Env"] for name in ("code-server", "postgres")])
    assert not [name for name, text in stack.secrets.items() if text in whole]
    files = ["run", "--rm", "--entrypoint", "sh", image, "-c", "ls -A / /opt/dagster/* /run/secrets 2>&1; which gcc cc"]
    said = subprocess.run(["docker", *files], check=False, capture_output=True, text=True).stdout
    assert "dagster.yaml" in said
    assert "/run/secrets': No such file" in said
    assert "gcc" not in said


def test_prometheus_scrapes_the_metrics_and_has_the_rules(stack: Stack) -> None:
    def query(expression: str) -> str:
        return stack.compose(
            "exec", "-T", "prometheus", "promtool", "query", "instant", "http://127.0.0.1:9090", expression, check=False
        )

    stack.eventually("two servers that are up", lambda: query("sensor_pipeline_up == 1").count("=> 1") == 2)
    stack.eventually("readings counted", lambda: "=>" in query("sensor_pipeline_readings_total > 0"))
    rules = stack.compose(
        "exec", "-T", "prometheus", "promtool", "check", "rules", "/etc/prometheus/alerts.yml", check=False
    )
    assert "SUCCESS: 7 rules found" in rules
    stack.eventually("no alert", lambda: "ALERTS" not in query('ALERTS{alertstate="firing"}'))


@pytest.mark.parametrize("service", ["daemon", "code-server", "kafka", "postgres"])
def test_what_is_killed_is_started_again_and_readings_go_on(stack: Stack, service: str) -> None:
    before = stack.inspect(service)["RestartCount"]
    # All but the container's first process, which ends with them; where there is no other, that one itself.
    pid = stack.inspect(service)["State"]["Pid"]
    if os.geteuid() == 0:
        os.kill(pid, 9)
    else:
        stack.compose("exec", "-T", service, "sh", "-c", "kill -9 -1", check=False)
    stack.eventually("started again", lambda: stack.inspect(service)["RestartCount"] > before)
    stack.eventually("it answers", lambda: stack.sql("SELECT 1") == "1")
    readings = stack.readings()
    stack.eventually("readings go on", lambda: stack.readings() > readings)


def test_the_code_server_ends_after_the_runs_that_it_started(stack: Stack) -> None:
    stack.compose("stop", "daemon")
    # As a run's process looks, and longer than Dagster itself waits.
    run = stack.start("code-server", "python", "-c", "import time; time.sleep(45)", "--multiprocessing-fork")
    there = "grep -qs -e '[-]-multiprocessing-fork' /proc/[0-9]*/cmdline && echo there"
    stack.eventually(
        "a run", lambda: "there" in stack.compose("exec", "-T", "code-server", "sh", "-c", there, check=False)
    )
    stack.compose("stop", "code-server")
    assert run.wait() == 0
    assert stack.inspect("code-server")["State"]["ExitCode"] != 137
    stack.compose("up", "--detach")


def test_a_stack_that_was_stopped_goes_on_with_its_data(stack: Stack) -> None:
    before = stack.readings()
    stack.compose("down")
    stack.compose("up", "--detach")
    assert stack.readings() >= before
    stack.eventually("readings go on", lambda: stack.readings() > before)
    stack.compose("stop", "simulator")
    stack.eventually(
        "nothing is left", lambda: "lag 0" in stack.compose("exec", "-T", "code-server", "sensor-pipeline", "status")
    )
    assert stack.compose("exec", "-T", "code-server", "sensor-pipeline", "verify")
