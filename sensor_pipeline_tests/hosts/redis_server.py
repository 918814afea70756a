"""A Redis of a test's own, and where it is missing, why a test is skipped."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from sensor_pipeline.embedded import ports
from sensor_pipeline_tests.postgres.tables import until

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


class RedisServer:
    """Keeps nothing on disk: a restart forgets everything, which is the worst that a Redis can do."""

    def __init__(self, folder: Path) -> None:
        self.port = ports.any_free()
        self.url = f"redis://:not-in-a-log@{ports.LOOPBACK}:{self.port}/0"
        self._log = folder / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return once it answers."""
        options = {"bind": ports.LOOPBACK, "port": str(self.port), "requirepass": "not-in-a-log", "save": ""}
        command = ["redis-server"]
        for name, value in options.items():
            command += [f"--{name}", value]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._log.parent, stdout=log, stderr=log)
        until(self._answers)

    def kill(self) -> None:
        """`kill -9`."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection((ports.LOOPBACK, self.port), timeout=1) as connection:
                connection.sendall(b"AUTH not-in-a-log\r\nQUIT\r\n")
                return connection.makefile().read() == "+OK\n+OK\n"
        except OSError:
            return False
