"""The whole stack, by the command that people type."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from threading import Event

import psycopg2
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from sensor_pipeline.embedded import stack_file
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.embedded.postgres import PostgresServer
from sensor_pipeline.embedded.processes import Deadline, marked
from sensor_pipeline.embedded.stack import TOPIC_PARTITIONS, Stack
from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.settings import Settings

CLEAN_ENV = {
    name: value for name, value in os.environ.items() if not name.startswith(("KAFKA_", "POSTGRES_", "DAGSTER_"))
}
COMMAND = [sys.executable, "-m", "sensor_pipeline"]


class Folder:
    """A working folder in which `up` is typed."""

    patience_seconds = 60.0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data_dir = path / stack_file.DATA_DIR
        self.ups: list[subprocess.Popen[bytes]] = []

    def up(self, *options: str) -> subprocess.Popen[bytes]:
        """Start it with a small fleet and return once it is ready."""
        command = [*COMMAND, "up", "--machines", "5", "--rate", "100", *options]
        with (self.path / "out.txt").open("ab") as output:
            up = subprocess.Popen(command, cwd=self.path, env=CLEAN_ENV, stdout=output, stderr=output)
        self.ups.append(up)
        self.wait_for(lambda: stack_file.running(self.data_dir) is not None)
        return up

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command in it."""
        return subprocess.run([*COMMAND, *arguments], cwd=self.path, env=CLEAN_ENV, text=True, capture_output=True)

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = Deadline(self.patience_seconds)
        while not condition():
            assert deadline, (self.path / "out.txt").read_text()
            assert self.ups[-1].poll() is None, (self.path / "out.txt").read_text()
            Event().wait(0.1)

    def settings(self) -> Settings:
        return Settings.from_env(stack_file.running_stack(self.path, {}) or {})

    def processes(self) -> list[int]:
        found = [process for group in marked(str(self.data_dir)).values() for process in group]
        found += KafkaBroker(self.data_dir / "kafka", 0).orphans()
        found += PostgresServer(self.data_dir / "postgres", 0, user="", password="", database="").orphans()
        return [process.pid for process in found]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path)
    yield folder
    for up in folder.ups:
        if up.poll() is None:
            up.terminate()
        up.wait(60)
    for pid in folder.processes():
        os.kill(pid, signal.SIGKILL)


def readings(settings: Settings) -> int:
    with (
        closing(
            psycopg2.connect(
                host=settings.postgres_host,
                port=settings.postgres_port,
                user=settings.postgres_user,
                password=settings.postgres_password,
                dbname=settings.postgres_db,
            )
        ) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SELECT count(*) FROM readings")
        row = cursor.fetchone()
        assert row is not None
        return int(row[0])


def published(settings: Settings) -> int:
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    [topic] = settings.kafka_topics
    asked = {TopicPartition(topic, partition): OffsetSpec.latest() for partition in range(TOPIC_PARTITIONS)}
    return sum(answer.result().offset for answer in admin.list_offsets(asked).values())


def test_a_killed_stack_is_mended_by_the_next_up_goes_on_with_its_data_and_leaves_nothing_when_stopped(
    folder: Folder,
) -> None:
    first = folder.up("--no-ui")

    second = folder.run("up")
    assert second.returncode == 1
    assert f"already running on {folder.data_dir} (pid {first.pid})" in second.stderr
    exported = subprocess.run(
        ["sh", "-c", f'eval "$({sys.executable} -m sensor_pipeline env)" && echo $PGHOST:$PGPORT/$PGDATABASE'],
        cwd=folder.path,
        env=CLEAN_ENV,
        text=True,
        capture_output=True,
        check=True,
    )
    settings = folder.settings()
    assert exported.stdout == f"127.0.0.1:{settings.postgres_port}/{settings.postgres_db}\n"
    folder.wait_for(lambda: published(settings) > 0)

    before = published(settings)
    first.kill()
    first.wait()
    orphans = folder.processes()
    assert orphans
    assert stack_file.running_stack(folder.path, {}) is None

    up = folder.up("--no-ui")

    assert not set(orphans) & set(folder.processes())
    settings = folder.settings()
    assert published(settings) >= before
    folder.wait_for(lambda: readings(settings) >= before)
    up.send_signal(signal.SIGTERM)
    assert up.wait(30) == 0
    assert folder.processes() == []
    assert folder.run("env").returncode == 1


class NoScreen:
    def step(self, title: str) -> nullcontext[None]:
        return nullcontext()

    def progress(self, done: int, total: int) -> None:
        raise AssertionError


def own_servers(settings: Settings) -> dict[str, str]:
    return CLEAN_ENV | {
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "KAFKA_TOPIC": "a-topic-that-is-not-there",
        "POSTGRES_HOST": settings.postgres_host,
        "POSTGRES_PORT": str(settings.postgres_port),
        "POSTGRES_USER": settings.postgres_user,
        "POSTGRES_PASSWORD": settings.postgres_password,
        "POSTGRES_DB": settings.postgres_db,
        "DAGSTER_POSTGRES_DB": settings.postgres_db + "_dagster",
    }


def test_servers_that_the_environment_names_are_used_and_nothing_is_started_or_created_on_their_broker(
    settings: Settings, broker: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stack, "_start_dagster", lambda stack: None)
    with Stack(tmp_path / "data", own_servers(settings), NoScreen()) as stack:
        stack.start()
        assert not (tmp_path / "data" / "kafka").exists()
        assert not (tmp_path / "data" / "postgres").exists()
        assert stack.settings.postgres_port == settings.postgres_port
        assert stack.env["KAFKA_TOPIC"] == "a-topic-that-is-not-there"
        found = stack_file.running(tmp_path / "data")
        assert found is not None
        assert found.env == stack.env
    topics = broker._admin().list_topics(timeout=10).topics
    assert "a-topic-that-is-not-there" not in topics


def test_a_database_that_the_user_may_not_create_is_an_error_with_the_statement_to_have_run(
    settings: Settings, administer: Callable[[str], None], tmp_path: Path
) -> None:
    role = f"limited_{settings.postgres_db}"
    administer(f"CREATE ROLE {role} LOGIN PASSWORD 'word' NOCREATEDB")
    administer(f"CREATE DATABASE {role} OWNER {role}")
    env = own_servers(settings) | {"POSTGRES_USER": role, "POSTGRES_PASSWORD": "word", "POSTGRES_DB": role}
    with (
        pytest.raises(ConfigurationError, match=f'CREATE DATABASE "{settings.postgres_db}_dagster" OWNER "{role}"'),
        Stack(tmp_path / "data", env, NoScreen()) as stack,
    ):
        stack.start()
    administer(f"DROP DATABASE {role} WITH (FORCE)")
    administer(f"DROP ROLE {role}")
