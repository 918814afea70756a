"""Processes of a stack: started in sessions of their own, recorded on disk, stopped for certain."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from sensor_pipeline.embedded.owner import Owner

LOG_LIMIT_BYTES = 20_000_000
LOG_TAIL_BYTES = 200_000
KILL_SECONDS = 5.0
# The environment variable that says whose child a process is, and under which name.
MARK = "SENSOR_PIPELINE_CHILD"
# How the servers mark the lines that say why they gave up.
_TROUBLE = ("FATAL", "ERROR", "Error", "Exception")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Child:
    """One process that leads a session of its own, with its output appended to a log."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        folder: Path,
        env: Mapping[str, str] | None = None,
        owner: Owner | None = None,
    ) -> None:
        """Start it in `folder`, as `owner` where one is given."""
        log.parent.mkdir(parents=True, exist_ok=True)
        _rotate(log)
        self.log = log
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=owner.uid if owner else None,
                group=owner.gid if owner else None,
                extra_groups=[] if owner else None,
            )

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """What it ended with, or None while it runs."""
        return self._process.poll()

    def send(self, number: int) -> None:
        """Send it (not its group) a signal; nothing happens when it has ended."""
        self._process.send_signal(number)

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for its end; whether it has ended."""
        try:
            self._process.wait(max(timeout, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill it and its group; nothing happens when it has ended."""
        if self.exit_code is None:  # so the pid is still its own
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self, timeout: float, number: int = signal.SIGTERM) -> None:
        """Ask it to end by a signal; if it has not after `timeout` seconds, kill it and its group."""
        self.send(number)
        if not self.wait(timeout):
            self.kill()

    def trouble(self) -> str:
        """The last line it logged that tells of an error, or its last line."""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            text = _COLOUR.sub("", file.read().decode(errors="replace"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        marked = [line for line in lines if any(word in line for word in _TROUBLE)]
        return (marked or lines or ["it logged nothing"])[-1][:300]

    def obituary(self) -> str:
        """How it ended, and the line of its log that may say why."""
        code = self.exit_code
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name} (log: {self.log})"
        return f"ended with exit code {code}: {self.trouble()} (log: {self.log})"


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        log.replace(log.with_name(log.name + ".1"))


def end(processes: Iterable[psutil.Process], timeout: float, number: int = signal.SIGTERM) -> None:
    """Ask processes that are not ours to wait for to end; kill those that still run after `timeout` seconds."""
    processes = [process for process in processes if process.is_running()]  # not: another that has the pid by now
    for process in processes:
        _send(process, number)
    _, left = psutil.wait_procs(processes, timeout)
    for process in left:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(left, KILL_SECONDS)


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)  # psutil makes sure that the pid is not another's by now
    except psutil.NoSuchProcess:
        return


def marked(mark: str) -> dict[str, list[psutil.Process]]:
    """Running processes that carry `mark` in their environment, by the name they were given.

    What a child starts inherits its mark, so these are found too, whoever started them and however it ended:
    no list on disk can be out of date, and no other process that got the pid can be taken for one of them.
    """
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            name, _, value = process.environ().get(MARK, "").partition(" ")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if value == mark:
            found.setdefault(name, []).append(process)
    return found


class Deadline:
    """One span of time shared by several waits."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def shorten(self, seconds: float) -> None:
        """Leave at most `seconds` from now."""
        self._end = min(self._end, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds left, never below 0."""
        return max(self._end - time.monotonic(), 0.0)

    def __bool__(self) -> bool:
        """Whether time is left."""
        return self.left > 0
