"""The real commands, as a person types them, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.orchestration.jobs import environment_of

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 180


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The environment of a command: the settings', and nothing of a stack that may run here."""
    return {**os.environ, **environment_of(settings), **more}


def run(settings: Settings, *command: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `.venv/bin` to its end."""
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=environment(settings, **more),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@contextmanager
def running(command: list[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> Iterator[None]:
    """A command of `.venv/bin` that runs during the block, and ends after it with all that it started."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=dict(env),
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)
            # A code server of its own ends by itself, but not while it starts a run.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def daemon(settings: Settings, home: Path, **more: str) -> Iterator[Mapping[str, str]]:
    """A Dagster daemon with the instance settings of a deployment; yields its environment."""
    home.mkdir()
    instance = resources.files("sensor_pipeline.orchestration").joinpath("dagster.yaml").read_text()
    (home / "dagster.yaml").write_text(instance)
    env = environment(settings, DAGSTER_HOME=str(home), **more)
    command = ["dagster-daemon", "run", "-w", str(ROOT / "workspace.yaml")]
    with running(command, env=env, cwd=home, log=home / "daemon.log"):
        yield env


def wait_until(what: str, holds: object, *, log: Path | None = None) -> None:
    """Ask until `holds()` is true; fail with the log's end when it is not within the deadline."""
    assert callable(holds)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            end = log.read_text()[-3000:] if log else ""
            raise AssertionError(f"not within {DEADLINE_SECONDS} s: {what}\n{end}")
        time.sleep(0.5)
