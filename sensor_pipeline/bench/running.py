"""`sensor-pipeline up` as a person starts it, with servers of its own, looked at from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from sensor_pipeline.bench.site import Site
from sensor_pipeline.embedded import stack_file
from sensor_pipeline.embedded.stack_file import StackFile
from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.settings import Settings

_START_SECONDS = 180
_STOP_SECONDS = 120
_ASK_SECONDS = 120
# What `up` starts, by what stands in its command line.
_PARTS = {
    "kafka.Kafka": "Kafka",
    "bin/postgres": "PostgreSQL",
    "dagster._daemon": "daemon",
    "dagster_webserver": "web server",
    "grpc": "code server",
    "simulate": "simulated fleet",
}
_ENDED = "SELECT count(*) FROM runs WHERE pipeline_name = 'ingest_batch' AND end_time IS NOT NULL"


@dataclass(frozen=True)
class Up:
    """A running stack: its `up`, what it says about itself, and the settings of Dagster's database."""

    site: Site
    process: psutil.Process
    file: StackFile
    dagster: Settings

    def parts(self) -> dict[str, psutil.Process]:
        """The processes that `up` has started, and itself, by what they are."""
        found = {"up": self.process}
        for process in self.process.children():
            command = " ".join(process.cmdline())
            found |= {part: process for sign, part in _PARTS.items() if sign in command}
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """Seconds of CPU since the start, of each part with all that it has started, whether or not that has ended."""
        parts = self.parts()
        return {
            part: sum(map(_spent, [process] if part == "up" else [process, *process.children(recursive=True)]))
            for part, process in parts.items()
        }

    def resident_mb(self, *parts: str) -> dict[str, float]:
        """What the processes of these parts hold in memory; what they start for a run is not theirs."""
        there = self.parts()
        return {part: there[part].memory_info().rss / 2**20 for part in parts}

    def ended_runs(self) -> int:
        """How many batches' runs have ended."""
        return int(self.ask(_ENDED)[0][0])

    def ask(self, statement: str, arguments: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Ask Dagster's database, or change it."""
        with self.site.connection(self.dagster) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement, arguments)
            return list(cursor) if cursor.description else []

    def ask_ui(self, question: str, **variables: object) -> Any:
        """Ask the web server, as the UI's pages do.

        Raises:
            UnavailableError: with what it answered instead.
        """
        body = json.dumps({"query": question, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.file.ui}/graphql", body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=_ASK_SECONDS) as answered:  # noqa: S310
            answer = json.load(answered)
        if "errors" in answer:
            raise UnavailableError(f"the web server refused {question.split()[0]}: {answer['errors'][0]['message']}")
        return answer["data"]


@contextmanager
def running_up(site: Site, name: str, *arguments: str) -> Iterator[Up]:
    """`sensor-pipeline up` with these arguments, on a folder of the site, until the end of the block.

    Raises:
        UnavailableError: it did not start; the message names its log.
    """
    folder, log = site.folder / name, site.folder / f"{name}.log"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("KAFKA_", "POSTGRES_", "DAGSTER_"))}
    command = [sys.executable, "-m", "sensor_pipeline", "up", "--data-dir", str(folder), *arguments]
    with log.open("ab") as output:
        started = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        file = _await_start(started, folder, log)
        dagster = replace(Settings.from_env(file.env), postgres_db=file.env["DAGSTER_POSTGRES_DB"])
        yield Up(site, psutil.Process(started.pid), file, dagster)
    finally:
        started.terminate()
        started.wait(_STOP_SECONDS)


def _await_start(started: subprocess.Popen[bytes], folder: Path, log: Path) -> StackFile:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and started.poll() is None:
        if file := stack_file.running(folder):
            return file
        time.sleep(0.5)
    raise UnavailableError(f"`sensor-pipeline up` did not start (log: {log})")


def _spent(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0  # it has ended meanwhile: the next look finds it among what its parent has waited for
    return float(times.user + times.system + times.children_user + times.children_system)
