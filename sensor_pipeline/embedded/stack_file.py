"""What a running stack says about itself: `stack.json` in its data directory, and the lock that proves it runs."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sensor_pipeline.errors import UnavailableError

DATA_DIR = Path(".sensor-pipeline")
# A command that looks whether the stack runs holds the lock for a moment.
LOCK_SECONDS = 1.0

# These belong together: of one server, all of them or none.
CONNECTION = (
    "KAFKA_BOOTSTRAP_SERVERS",
    "POSTGRES_HOST",
    "POSTGRES_PORT",
    "POSTGRES_USER",
    "POSTGRES_PASSWORD",
    "POSTGRES_DB",
    "DAGSTER_HOME",
)
_SERVERS = {"KAFKA_BOOTSTRAP_SERVERS": "KAFKA_", "POSTGRES_HOST": "POSTGRES_"}


@dataclass(frozen=True, kw_only=True)
class StackFile:
    """A running stack: the pid of its `up`, the UI's address (None without one), and its environment."""

    pid: int
    ui: str | None
    env: Mapping[str, str]

    def write(self, data_dir: Path) -> None:
        """Put it in place whole, readable by this user only, since it holds the password."""
        new = data_dir / "stack.json.new"
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file, indent=2)
        new.rename(_path(data_dir))


class StackLock:
    """The data directory's exclusive lock. The system lets go of it however its holder ends."""

    def __init__(self, data_dir: Path) -> None:
        """Take it.

        Raises:
            UnavailableError: another `up` holds it, with that one's pid and address.
        """
        self._file = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        end = time.monotonic() + LOCK_SECONDS
        while not _try_lock(self._file, fcntl.LOCK_EX):
            if time.monotonic() > end:
                os.close(self._file)
                raise UnavailableError(_already_running(data_dir))
            time.sleep(0.02)

    def release(self) -> None:
        """Let go of it."""
        os.close(self._file)


def running(data_dir: Path) -> StackFile | None:
    """The stack that runs on this data directory and is ready, if there is one."""
    try:
        file = os.open(data_dir / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return None if _try_lock(file, fcntl.LOCK_SH) else _read(data_dir)
    finally:
        os.close(file)


def running_stack(folder: Path, env: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """The environment of the stack that runs in `folder`, to be laid over `env`; None when there is none.

    Where `env` names a Kafka or a PostgreSQL itself, that server's variables are left out.
    """
    stack = running(folder / DATA_DIR)
    return None if stack is None else visible(stack.env, env)


def visible(stack: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """The part of a stack's environment that `env` does not overrule."""
    overruled = tuple(prefix for server, prefix in _SERVERS.items() if env.get(server, "").strip())
    return {
        name: value
        for name, value in stack.items()
        if not name.startswith(overruled) and (name in CONNECTION or not env.get(name))
    }


def remove(data_dir: Path) -> None:
    """Take the file away, so that nobody looks for a stack that is about to stop."""
    _path(data_dir).unlink(missing_ok=True)


def _path(data_dir: Path) -> Path:
    return data_dir / "stack.json"


def _read(data_dir: Path) -> StackFile | None:
    with suppress(FileNotFoundError):  # it is starting or stopping
        return StackFile(**json.loads(_path(data_dir).read_text()))
    return None


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _already_running(data_dir: Path) -> str:
    stack = _read(data_dir)
    if stack is None:
        return f"another `sensor-pipeline up` is starting or stopping on {data_dir}: wait a moment"
    address = f", UI {stack.ui}" if stack.ui else ""
    return f"already running on {data_dir} (pid {stack.pid}{address}): Ctrl-C there stops it; --data-dir names another"
