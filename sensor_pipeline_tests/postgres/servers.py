"""A PostgreSQL to be mistreated: crashed, with full disks, copied, restored, made a standby of."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.owner import Owner, owner_of
from sensor_pipeline.embedded.postgres import PostgresServer, _binaries
from sensor_pipeline.postgres.migrations import migrate
from sensor_pipeline.settings import Settings

# Only processes are killed here and never the machine, which is what fsync is for.
_CONFIGURATION = """
fsync = off
autovacuum = off
max_connections = 20
wal_recycle = off
restart_after_crash = on
"""
TEMPLATE = "template"

only_root_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")


class TrialServer(PostgresServer):
    """A server with a migrated database to copy from; `wal`: another folder for its write-ahead log."""

    def __init__(self, folder: Path, *, wal: Path | None = None) -> None:
        login = Settings()
        super().__init__(
            folder,
            ports.any_free(),
            user=login.postgres_user,
            password=login.postgres_password,
            database=TEMPLATE,
        )
        self._wal = wal
        self._numbers = itertools.count(1)

    @property
    def owner(self) -> Owner | None:
        """As whom it runs; None as ourselves."""
        return owner_of(self.data)

    def settings(self, database: str = TEMPLATE) -> Settings:
        """Settings that point at one of its databases."""
        return Settings(postgres_host=ports.LOOPBACK, postgres_port=self.port, postgres_db=database)

    def start_migrated(self) -> None:
        """Start it for the first time."""
        self.start()
        migrate(self.settings())

    def administer(self, *statements: str) -> None:
        """Run statements that no transaction may hold."""
        login = self.settings("postgres")
        url = sa.URL.create(
            "postgresql+psycopg2",
            login.postgres_user,
            login.postgres_password,
            login.postgres_host,
            login.postgres_port,
            login.postgres_db,
        )
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    @contextmanager
    def new_database(self) -> Iterator[Settings]:
        """Settings with a fresh, migrated database."""
        name = f"trial_{next(self._numbers)}"
        self.administer(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        try:
            yield self.settings(name)
        finally:
            self.administer(f"DROP DATABASE {name} WITH (FORCE)")

    def shut_down(self) -> None:
        """Fast: sessions are told and cut off, all is written."""
        self._end(signal.SIGINT)

    def crash(self) -> None:
        """Immediate: nothing is written any more, and the next start recovers from the log."""
        self._end(signal.SIGQUIT)

    def copy(self, to: Path, *options: str) -> None:
        """Copy the data directory while it runs, by pg_basebackup."""
        owner = self.owner
        to.mkdir(mode=0o700, parents=True)
        if owner:
            os.chown(to, owner.uid, owner.gid)
        command = [str(_binaries() / "pg_basebackup"), f"--pgdata={to}", "--checkpoint=fast", "--no-sync"]
        command += [f"--host={ports.LOOPBACK}", f"--port={self.port}", f"--username={self.user}", "--no-password"]
        subprocess.run(
            [*command, *options],
            env={**os.environ, "PGPASSWORD": self._password},
            cwd=self.folder,
            check=True,
            user=owner.uid if owner else None,
            group=owner.gid if owner else None,
            extra_groups=[] if owner else None,
        )

    def restore(self, backup: Path) -> None:
        """Start again with the data of a copy, which is used up."""
        self.shut_down()
        shutil.rmtree(self.data)
        backup.rename(self.data)
        self.start()

    def make_standby(self, folder: Path) -> TrialServer:
        """Start a hot standby that follows this one."""
        standby = TrialServer(folder)
        self.copy(standby.data, "--write-recovery-conf")
        standby.start()
        return standby

    def _end(self, number: int) -> None:
        assert self.child is not None
        self.child.send(number)
        assert self.child.wait(60)
        self.child = None

    def _initialise(self, owner: Owner | None) -> None:
        super()._initialise(owner)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION)

    def _initdb(self, owner: Owner | None, *arguments: str) -> None:
        more = [f"--waldir={self._wal}", "--wal-segsize=1"] if self._wal else []
        super()._initdb(owner, *arguments, *more)


class Disk:
    """A file system of so many bytes, mounted at `folder`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size

    def fill(self) -> None:
        """Leave not a byte free."""
        with (self.folder / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert os.statvfs(self.folder).f_bavail == 0

    def make_room(self) -> None:
        """Take away what `fill` left."""
        (self.folder / "ballast").unlink()


@contextmanager
def mounted(folder: Path, size: int, owner: Owner | None) -> Iterator[Disk]:
    """A small disk for `owner` during the block; the folder is made."""
    folder.mkdir(parents=True)
    ids = f",uid={owner.uid},gid={owner.gid}" if owner else ""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700{ids}", "tmpfs", str(folder)], check=True)
    try:
        yield Disk(folder, size)
    finally:
        # Lazily: a server that still runs may have files open there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
