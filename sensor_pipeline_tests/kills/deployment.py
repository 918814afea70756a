"""A deployment on this machine: code server, daemon and web server, with the test as its process manager."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

from sensor_pipeline.embedded import ports, services
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.acceptance.commands import BIN, DEADLINE_SECONDS, environment
from sensor_pipeline_tests.kafka.inspecting import query

CODE_SERVER, DAEMON, WEB_SERVER, RUN = "code server", "daemon", "web server", "run"
# Of the shipped settings, made short enough to be waited for: how long a run may hold its lane.
_SHORTER = {
    "poll_interval_seconds: 30": "poll_interval_seconds: 1",
    "start_timeout_seconds: 120": "start_timeout_seconds: 30",
}
LOST_AFTER = 15
_SHORTER_OF_WORKERS = {"lost_after_seconds: 60": f"lost_after_seconds: {LOST_AFTER}"}

# The code server says under which process id it has started a run.
_BATCH_PIDS = r"""
    SELECT substring(event FROM 'Started process for run \(pid: (\d+)\)') FROM event_logs JOIN runs USING (run_id)
    WHERE pipeline_name = 'ingest_batch' AND position('Started process for run (pid: ' IN event) > 0
"""


class Deployment:
    """Dagster's processes. Whatever was killed is started again by `tend`, and nothing else is done for it."""

    # How long `wait_for` does.
    patience_seconds = DEADLINE_SECONDS

    def __init__(self, settings: Settings, home: Path, max_runtime: int, broker: str | None = None) -> None:
        self.settings = settings
        self.home = home
        self.dagster = replace(settings, postgres_db=f"{settings.postgres_db}_dagster")
        self.env = environment(
            settings, DAGSTER_HOME=str(home), DAGSTER_POSTGRES_DB=self.dagster.postgres_db, COMMIT_INTERVAL_MS="1000"
        )
        instance = _shorter(
            "dagster.yaml", {**_SHORTER, "max_runtime_seconds: 300": f"max_runtime_seconds: {max_runtime}"}
        )
        if broker:
            self.env["CELERY_BROKER_URL"] = broker
            instance += _shorter("workers.yaml", _SHORTER_OF_WORKERS)
        code_port, ui_port = str(ports.any_free()), str(ports.any_free())
        workspace = home / "workspace.yaml"
        at = ["-h", ports.LOOPBACK, "-p"]
        self._commands = {
            CODE_SERVER: ["dagster", "api", "grpc", *at, code_port, "-m", "sensor_pipeline.orchestration.definitions"],
            DAEMON: ["dagster-daemon", "run", "-w", str(workspace)],
            WEB_SERVER: ["dagster-webserver", *at, ui_port, "-w", str(workspace)],
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        home.mkdir()
        (home / "dagster.yaml").write_text(instance)
        workspace.write_text(
            f"load_from: [grpc_server: {{host: {ports.LOOPBACK}, port: {code_port}, location_name: sensor_pipeline}}]\n"
        )

    def tend(self) -> None:
        """Start what does not run."""
        for name, command in self._commands.items():
            if name not in self._processes or self._processes[name].poll() is not None:
                with (self.home / f"{name}.log").open("ab") as log:
                    self._processes[name] = subprocess.Popen(
                        [str(BIN / command[0]), *command[1:]], env=self.env, cwd=self.home, stdout=log, stderr=log
                    )

    def wait_for(self, what: str, found: Callable[[], Any]) -> Any:
        """Tend it until there is what is looked for."""
        deadline = time.monotonic() + self.patience_seconds
        while not (result := found()):
            self.tend()
            assert time.monotonic() < deadline, f"never: {what}\nruns: {self.runs()}\n{self._logs()}"
            time.sleep(0.5)
        return result

    def kill(self, name: str) -> None:
        """`kill -9` of one process and none that it started; of a run, when there is one."""
        if name != RUN:
            self._processes[name].kill()
            self._processes[name].wait()
            return
        process = self.wait_for("a run", self.run_processes)[0]
        with suppress(psutil.NoSuchProcess):
            process.kill()

    def run_processes(self) -> list[psutil.Process]:
        """The processes that execute batches, whoever started them; what a schedule launches is none of these."""
        processes = [process for process in self._all() if services.is_run(process)]
        # Before the first of them there may be no table to ask.
        of_batches = {int(row[0]) for row in query(self.dagster, _BATCH_PIDS)} if processes else set()
        return [process for process in processes if process.pid in of_batches]

    def runs(self) -> dict[str, str]:
        """The status of each batch's run by its id, the oldest first."""
        statement = "SELECT run_id, status FROM runs WHERE pipeline_name = 'ingest_batch' ORDER BY id"
        return dict(tuple(row) for row in query(self.dagster, statement))

    def said(self, run_id: str) -> str:
        """All that Dagster keeps of what a run said."""
        rows = query(self.dagster, f"SELECT event FROM event_logs WHERE run_id = '{run_id}' ORDER BY id")
        return "\n".join(row[0] for row in rows)

    def end(self) -> None:
        """End everything."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for stray in self._all():
            with suppress(psutil.NoSuchProcess):
                stray.send_signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def _all(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("DAGSTER_HOME") == str(self.home) and process.pid != os.getpid():
                    found.append(process)
        return found

    def _logs(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.home.glob("*.log"))


@contextmanager
def deployed(settings: Settings, home: Path, *, max_runtime: int, broker: str | None = None) -> Iterator[Deployment]:
    """A deployment that runs during the block; a run may take `max_runtime` seconds.

    With the address of a Redis its runs are executed by workers, which are not started here.
    """
    deployment = Deployment(settings, home, max_runtime, broker)
    try:
        deployment.tend()
        yield deployment
    finally:
        deployment.end()


def _shorter(name: str, shorter: Mapping[str, str]) -> str:
    text = resources.files("sensor_pipeline.orchestration").joinpath(name).read_text()
    for shipped, instead in shorter.items():
        assert shipped in text
        text = text.replace(shipped, instead)
    return text
