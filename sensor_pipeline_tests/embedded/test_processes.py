from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sensor_pipeline.embedded import processes
from sensor_pipeline.embedded.processes import MARK, Child, Deadline

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
OBEDIENT = "print('up', flush=True); input()"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(code: str, **env: str) -> Child:
        child = Child([sys.executable, "-c", code], log=tmp_path / "a.log", folder=tmp_path, env={**os.environ, **env})
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()


def await_line(child: Child) -> None:
    deadline = Deadline(20)
    while "up" not in child.log.read_text():
        assert deadline


def test_a_child_that_ignores_the_signal_is_killed(start: Callable[..., Child]) -> None:
    child = start(STUBBORN)
    await_line(child)
    child.stop(0.2)
    assert child.exit_code == -signal.SIGKILL
    assert "was killed by SIGKILL" in child.obituary()


def test_a_child_is_told_by_the_line_of_its_log_that_shows_trouble(start: Callable[..., Child]) -> None:
    child = start("print('fine'); print('\\x1b[31mValueError: no\\x1b[0m'); print('bye'); raise SystemExit(3)")
    assert child.wait(20)
    assert child.obituary().startswith("ended with exit code 3: ValueError: no (log: ")


def test_a_child_is_no_part_of_the_terminals_group(start: Callable[..., Child]) -> None:
    child = start(STUBBORN)
    assert os.getpgid(child.pid) == os.getsid(child.pid) == child.pid


def test_a_log_is_appended_to_and_a_long_one_put_aside(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    for word in ("first", "second"):
        start(f"print({word!r})").wait(20)
    child = start("")
    assert child.log.read_text() == "first\nsecond\n"
    monkeypatch.setattr(processes, "LOG_LIMIT_BYTES", 5)
    start("").wait(20)
    assert child.log.read_text() == ""
    assert child.log.with_name("a.log.1").read_text() == "first\nsecond\n"


def test_what_a_marked_child_started_is_found_after_the_child_was_killed(start: Callable[..., Child]) -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]).wait()"
    child = start(code, **{MARK: "code-server /here"})
    await_line(child)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(20)

    [grandchild] = processes.marked("/here")["code-server"]
    assert grandchild.pid != child.pid
    processes.end([grandchild], 0.1)
    assert not grandchild.is_running()
    assert processes.marked("/here") == {}


def test_processes_with_another_mark_or_none_are_not_found(start: Callable[..., Child]) -> None:
    for env in ({MARK: "daemon /elsewhere"}, {}):
        await_line(start(STUBBORN, **env))
    assert processes.marked("/here") == {}


def test_a_pid_that_is_another_processs_by_now_is_never_touched() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        remembered = psutil.Process(bystander.pid)
        remembered._ident = (bystander.pid, 1.0)  # the process that had this pid before began at another time
        processes.end([remembered], 0.1)
        assert bystander.poll() is None
        bystander.communicate(b"\n")


def test_a_deadline_can_be_shortened_but_not_put_off() -> None:
    deadline = Deadline(1000)
    deadline.shorten(10)
    deadline.shorten(500)
    assert 0 < deadline.left <= 10
    deadline.shorten(0)
    assert not deadline
