"""Dagster's processes and the simulator, as children of a stack."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Protocol

import psutil

import sensor_pipeline
from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.processes import MARK, Child, Deadline
from sensor_pipeline.errors import UnavailableError

DEFINITIONS = "sensor_pipeline.orchestration.definitions"
# The same as in the project's own workspace.yaml: Dagster keeps a sensor's state under this name.
LOCATION = "sensor_pipeline"
START_SECONDS = 90.0
POLL_SECONDS = 0.1

CODE_SERVER = "code-server"
WEBSERVER = "webserver"
DAEMON = "daemon"
SIMULATOR = "simulator"
LOST_RUNS = "lost-runs"
# What the command line of a run's process has, whether it was forked (see orchestration/forked_runs.py) or started.
RUN = "--multiprocessing-fork"
_SELDOM_ASKING = "sensor_pipeline.embedded.seldom_asking"
NAMES = (SIMULATOR, DAEMON, WEBSERVER, CODE_SERVER, LOST_RUNS)


class Service(Protocol):
    """What a stack runs."""

    child: Child | None

    def start(self) -> None:
        """Start it and return once it serves."""


class PythonService:
    """A module of this Python that runs as a child, marked as this stack's in its environment."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        data_dir: Path,
        env: Mapping[str, str],
        is_ready: Callable[[], bool] | None = None,
    ) -> None:
        self.name = name
        self.log = data_dir / "logs" / f"{name}.log"
        self.child: Child | None = None
        # -P: the folder that it runs in holds no code.
        self._command = [sys.executable, "-P", "-m", *arguments]
        self._env = {**env, MARK: f"{name} {data_dir}", "PYTHONUNBUFFERED": "1"}
        self._home = home(data_dir)
        self._is_ready = is_ready

    def start(self) -> None:
        """Start it and return once it serves.

        Raises:
            UnavailableError: it ended, or did not serve in time.
        """
        self.child = Child(self._command, log=self.log, folder=self._home, env=self._env)
        deadline = Deadline(START_SECONDS)
        while self._is_ready is not None and not self._is_ready():
            if self.child.exit_code is not None:
                raise UnavailableError(f"the {self.name} {self.child.obituary()}")
            if not deadline:
                raise UnavailableError(f"the {self.name} does not answer: {self.child.trouble()} (log: {self.log})")
            time.sleep(POLL_SECONDS)

    def run_to_its_end(self) -> None:
        """Start it and return once it has done its work.

        Raises:
            UnavailableError: it did not, or not in time.
        """
        self.start()
        assert self.child is not None
        if not self.child.wait(START_SECONDS):
            self.child.kill()
        if self.child.exit_code != 0:
            raise UnavailableError(f"the {self.name} {self.child.obituary()}")


def home(data_dir: Path) -> Path:
    """The stack's DAGSTER_HOME."""
    return data_dir / "dagster"


def prepare_home(data_dir: Path) -> None:
    """Write Dagster's instance settings."""
    home(data_dir).mkdir(exist_ok=True)
    packaged = Path(sensor_pipeline.__file__).parent / "orchestration" / "dagster.yaml"
    shutil.copyfile(packaged, home(data_dir) / "dagster.yaml")


def prepare_workspace(data_dir: Path, code_port: int) -> None:
    """Write the workspace that points at the code server."""
    _workspace(data_dir).write_text(
        f"load_from:\n  - grpc_server: {{host: {ports.LOOPBACK}, port: {code_port}, location_name: {LOCATION}}}\n"
    )


def code_server(port: int, *, data_dir: Path, env: Mapping[str, str]) -> PythonService:
    """The process that holds the definitions and starts a process for each run."""
    # `dagster code-server` is a second process before this one that can load changed code anew, for 150 MB and
    # a sixth of what an idle stack costs; an installed package does not change.
    arguments = ["dagster", "api", "grpc", "--host", ports.LOOPBACK, "--port", str(port)]
    arguments += ["--use-python-environment-entry-point", "--module-name", DEFINITIONS]
    return PythonService(CODE_SERVER, arguments, data_dir=data_dir, env=env, is_ready=lambda: ports.listens(port))


def webserver(port: int, *, data_dir: Path, env: Mapping[str, str]) -> PythonService:
    """The UI."""
    place = ["--host", ports.LOOPBACK, "--port", str(port)]
    arguments = [_SELDOM_ASKING, "dagster_webserver", *place, "-w", str(_workspace(data_dir))]
    return PythonService(WEBSERVER, arguments, data_dir=data_dir, env=env, is_ready=lambda: _answers(port))


def daemon(*, data_dir: Path, env: Mapping[str, str]) -> PythonService:
    """The process that ticks the sensor, and takes runs from the queue."""
    arguments = [_SELDOM_ASKING, "dagster._daemon", "run", "-w", str(_workspace(data_dir))]
    return PythonService(DAEMON, arguments, data_dir=data_dir, env=env)


def lost_runs(*, data_dir: Path, env: Mapping[str, str]) -> PythonService:
    """What marks the runs of a killed stack as failed, and ends."""
    return PythonService(LOST_RUNS, ["sensor_pipeline.embedded.lost_runs"], data_dir=data_dir, env=env)


def simulator(machines: int, rate: float, *, data_dir: Path, env: Mapping[str, str]) -> PythonService:
    """A simulated fleet that publishes `rate` readings a second in all."""
    arguments = ["sensor_pipeline", "simulate", "--machines", str(machines), "--rate", f"{rate:g}"]
    return PythonService(SIMULATOR, arguments, data_dir=data_dir, env=env)


def is_run(process: psutil.Process) -> bool:
    """Whether a process that carries the code server's mark executes a run."""
    try:
        return RUN in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _workspace(data_dir: Path) -> Path:
    return data_dir / "workspace.yaml"


def _answers(port: int) -> bool:
    connection = HTTPConnection(ports.LOOPBACK, port, timeout=5)  # urllib would ask a proxy
    try:
        connection.request("GET", "/server_info")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
