"""The pipeline as a user runs it: a process of its own, measured from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.settings import Settings

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Ran:
    """What a process took: seconds, seconds of CPU, and MB at its peak."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def environment(settings: Settings) -> dict[str, str]:
    """The process's own environment, with these settings."""
    start_from = settings.start_from
    return {
        **os.environ,
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "KAFKA_TOPIC": ",".join(settings.kafka_topics),
        "KAFKA_GROUP_ID": settings.kafka_group_id,
        "POSTGRES_HOST": settings.postgres_host,
        "POSTGRES_PORT": str(settings.postgres_port),
        "POSTGRES_USER": settings.postgres_user,
        "POSTGRES_PASSWORD": settings.postgres_password,
        "POSTGRES_DB": settings.postgres_db,
        "POSTGRES_SSLMODE": settings.postgres_sslmode or "",
        "POSTGRES_SSLROOTCERT": settings.postgres_sslrootcert or "",
        "BATCH_SIZE": str(settings.batch_size),
        "LANES": str(settings.lanes),
        "START_FROM": start_from.isoformat() if isinstance(start_from, datetime) else start_from,
    }


def run(arguments: list[str], settings: Settings) -> Ran:
    """Run a module of this Python to its end.

    Raises:
        UnavailableError: it failed; with what it said last.
    """
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peak_kb = 0
        while True:
            peak_kb = max(peak_kb, _peak_kb(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UnavailableError(f"{' '.join(arguments)} ended with {process.returncode}: {''.join(said)}")
    return Ran(seconds, usage.ru_utime + usage.ru_stime, (peak_kb or usage.ru_maxrss) / 1024)


def _peak_kb(pid: int) -> int:
    """A process's peak so far, 0 where /proc does not say; what wait4 says counts the process that started it too."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
