"""How a stack stops: in order, within 30 seconds, with no process left behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import psutil

from sensor_pipeline.embedded import services
from sensor_pipeline.embedded.kafka import KafkaBroker
from sensor_pipeline.embedded.postgres import PostgresServer
from sensor_pipeline.embedded.processes import Deadline, end, marked
from sensor_pipeline.embedded.services import Service

# 30 s for everything: runs in flight may use what is not reserved for stopping the rest.
STOP_SECONDS = 27.0
RESERVE_SECONDS = 13.0
GRACE_SECONDS = 4.0
# A server that is killed takes longer to start the next time.
LEAST_GRACE_SECONDS = 2.0
HURRY_SECONDS = 4.0
POLL_SECONDS = 0.05


class Screen(Protocol):
    """Where a stack says what it does."""

    def step(self, title: str) -> AbstractContextManager[None]:
        """Entered while something is being done."""

    def progress(self, done: int, total: int) -> None:
        """Bytes fetched so far, of all, during a step."""


class Shutdown:
    """Stops the processes of one data directory: those started now, and those that a killed `up` left."""

    def __init__(
        self,
        data_dir: Path,
        started: Mapping[str, Service],
        broker: KafkaBroker,
        postgres: PostgresServer,
        screen: Screen,
    ) -> None:
        self._data_dir = data_dir
        self._started = started
        self._broker = broker
        self._postgres = postgres
        self._screen = screen
        self._deadline = Deadline(STOP_SECONDS)

    def begin(self) -> None:
        """From now on the time runs."""
        self._deadline = Deadline(STOP_SECONDS)

    def hurry(self) -> None:
        """Stop faster: runs in flight are cut off."""
        self._deadline.shorten(HURRY_SECONDS)

    def end_services(self, title: str, *names: str) -> None:
        """Ask the named services to end, all at once; kill what is left of them, and of what they started."""
        if not self._marked(*names):
            return
        children = [self._started[name].child for name in names if name in self._started]
        with self._screen.step(f"stopping {title}"):
            for child in children:
                if child:
                    child.send(signal.SIGTERM)
            grace = Deadline(min(GRACE_SECONDS, self._deadline.left))
            while grace and self._deadline and any(child and child.exit_code is None for child in children):
                time.sleep(POLL_SECONDS)
            end(self._marked(*names), 0.0)

    def await_runs(self) -> bool:
        """Let runs in flight end while there is time; whether all have."""
        if self._has_runs():
            with self._screen.step("letting runs in flight end"):
                while self._has_runs() and self._deadline.left > RESERVE_SECONDS:
                    time.sleep(POLL_SECONDS)
        return not self._has_runs()

    def stop_servers(self) -> None:
        """Stop Kafka, then PostgreSQL."""
        for name, server in (("Kafka", self._broker), ("PostgreSQL", self._postgres)):
            if server.child:
                with self._screen.step(f"stopping {name}"):
                    server.stop(max(LEAST_GRACE_SECONDS, min(GRACE_SECONDS, self._deadline.left)))

    def end_strays(self) -> None:
        """End what belongs to the data directory but was not started now: first what uses the servers."""
        strays = self._marked(*services.NAMES)
        if strays or self._broker.orphans() or self._postgres.orphans():
            with self._screen.step("ending what an earlier `up` left behind"):
                end(strays, GRACE_SECONDS)
                self._broker.stop_orphans()
        # Always: a stale postmaster.pid may be all that is left.
        self._postgres.stop_orphans()

    def _has_runs(self) -> bool:
        """Whether the code server has started a process for a run that has not ended."""
        return any(services.is_run(process) for process in self._marked(services.CODE_SERVER))

    def _marked(self, *names: str) -> list[psutil.Process]:
        found = marked(str(self._data_dir))
        return [process for name in names for process in found.get(name, [])]
