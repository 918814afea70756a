from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sensor_pipeline.embedded import stack_file
from sensor_pipeline.embedded.stack_file import StackFile, StackLock
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline_tests.embedded.owners import run_and_kill

ENV = {
    "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9093",
    "KAFKA_TOPIC": "topic",
    "POSTGRES_HOST": "127.0.0.1",
    "POSTGRES_PORT": "5433",
    "POSTGRES_PASSWORD": "secret",
    "DAGSTER_HOME": "/data/dagster",
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / ".sensor-pipeline"
    folder.mkdir()
    return folder


@pytest.fixture
def running(data_dir: Path) -> Iterator[StackLock]:
    lock = StackLock(data_dir)
    StackFile(pid=42, ui="http://127.0.0.1:3000", env=ENV).write(data_dir)
    yield lock
    lock.release()


@pytest.mark.usefixtures("running")
def test_a_command_in_the_same_folder_finds_the_running_stack(tmp_path: Path) -> None:
    assert stack_file.running_stack(tmp_path, {}) == ENV


@pytest.mark.usefixtures("running")
def test_a_server_that_the_user_names_wins_and_the_other_kind_still_comes_from_the_stack(tmp_path: Path) -> None:
    own_kafka = stack_file.running_stack(tmp_path, {"KAFKA_BOOTSTRAP_SERVERS": "kafka:9092"})
    assert own_kafka == {name: ENV[name] for name in ENV if not name.startswith("KAFKA_")}
    own_postgres = stack_file.running_stack(tmp_path, {"POSTGRES_HOST": "db"})
    assert own_postgres == {name: ENV[name] for name in ENV if not name.startswith("POSTGRES_")}


@pytest.mark.usefixtures("running")
def test_a_topic_that_the_user_names_wins_but_half_a_login_does_not(tmp_path: Path) -> None:
    found = stack_file.running_stack(tmp_path, {"KAFKA_TOPIC": "other", "POSTGRES_PORT": "5432"})
    assert found is not None
    assert "KAFKA_TOPIC" not in found
    assert found["POSTGRES_PORT"] == "5433"


@pytest.mark.usefixtures("running")
def test_only_its_user_can_read_the_file_with_the_password(data_dir: Path) -> None:
    assert stat.S_IMODE((data_dir / "stack.json").stat().st_mode) == 0o600


@pytest.mark.usefixtures("running")
def test_a_second_up_is_told_of_the_first(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_file, "LOCK_SECONDS", 0.1)
    with pytest.raises(UnavailableError, match=r"already running .*pid 42, UI http://127\.0\.0\.1:3000"):
        StackLock(data_dir)


def test_no_stack_is_found_where_none_ever_ran(tmp_path: Path) -> None:
    assert stack_file.running_stack(tmp_path, {}) is None


def test_a_stopped_stack_is_not_found(tmp_path: Path, data_dir: Path, running: StackLock) -> None:
    running.release()
    assert stack_file.running_stack(tmp_path, {}) is None
    again = StackLock(data_dir)
    again.release()
    running._file = StackLock(data_dir)._file  # for the fixture to release


def test_the_file_of_a_killed_up_is_not_believed_although_its_pid_is_another_process_by_now(
    tmp_path: Path, data_dir: Path
) -> None:
    run_and_kill(
        "from pathlib import Path\n"
        "from sensor_pipeline.embedded.stack_file import StackFile, StackLock\n"
        f"data_dir = Path({str(data_dir)!r})\n"
        "lock = StackLock(data_dir)\n"
        "StackFile(pid=1, ui=None, env={}).write(data_dir)\n"
    )
    assert json.loads((data_dir / "stack.json").read_text())["pid"] == 1
    assert stack_file.running_stack(tmp_path, {}) is None


def test_a_stack_that_is_starting_or_stopping_is_not_found(tmp_path: Path, data_dir: Path) -> None:
    lock = StackLock(data_dir)
    assert stack_file.running_stack(tmp_path, {}) is None
    lock.release()
