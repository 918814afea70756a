from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from sensor_pipeline.embedded import ports
from sensor_pipeline.embedded.postgres import PostgresServer
from sensor_pipeline.errors import ConfigurationError, UnavailableError
from sensor_pipeline_tests.embedded.owners import run_and_kill

PASSWORD = 'it\'s a "pass" word'


def make(folder: Path, password: str = PASSWORD) -> PostgresServer:
    return PostgresServer(folder, ports.any_free(), user="sensor_user", password=password, database="sensor_data")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PostgresServer]:
    # Longer than a socket's path may be, and with what a shell would trip over.
    server = make(tmp_path / ("a long folder " * 8 + "$HOME été"))
    yield server
    server.stop()


def query(server: PostgresServer, sql: str, password: str = PASSWORD) -> list[tuple[Any, ...]]:
    with closing(
        psycopg2.connect(
            host=ports.LOOPBACK, port=server.port, user=server.user, password=password, dbname=server.database
        )
    ) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []


def test_rows_outlive_a_killed_owner_and_then_a_killed_postmaster(server: PostgresServer) -> None:
    run_and_kill(
        "from pathlib import Path\n"
        "from sensor_pipeline.embedded.postgres import PostgresServer\n"
        f"PostgresServer(Path({str(server.folder)!r}), {server.port}, user='sensor_user', password={PASSWORD!r}, "
        "database='sensor_data').start()\n"
    )
    query(server, "CREATE TABLE kept AS SELECT 1 AS value")
    [(orphan,)] = query(server, "SELECT pg_backend_pid()")

    server.start()  # ends the orphan, which holds this port and these data

    assert not psutil.pid_exists(orphan)
    query(server, "INSERT INTO kept VALUES (2)")
    assert server.child is not None
    os.kill(server.child.pid, signal.SIGKILL)
    server.child.wait(10)

    server.start()

    assert query(server, "SELECT value FROM kept ORDER BY value") == [(1,), (2,)]


def test_a_stale_pid_file_that_names_another_process_is_no_server_and_that_process_is_left_alone(
    server: PostgresServer,
) -> None:
    server.start()
    assert server.child is not None
    os.kill(server.child.pid, signal.SIGKILL)
    server.child.wait(10)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        pid_file = server.data / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(bystander.pid), *lines[1:]]) + "\n")

        server.start()

        assert query(server, "SELECT 1") == [(1,)]
        assert bystander.poll() is None
        bystander.communicate(b"\n")
        assert bystander.returncode == 0


def test_it_takes_the_password_only_and_listens_on_loopback_only(server: PostgresServer) -> None:
    server.start()
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        query(server, "SELECT 1", password="wrong")
    [(addresses, sockets, encryption, durable)] = query(
        server,
        "SELECT current_setting('listen_addresses'), current_setting('unix_socket_directories'), "
        "current_setting('password_encryption'), current_setting('fsync')",
    )
    assert (addresses, sockets, encryption, durable) == (ports.LOOPBACK, "", "scram-sha-256", "on")
    assert (server.data.stat().st_mode & 0o777) == 0o700


def test_a_database_is_created_once(server: PostgresServer) -> None:
    server.start()
    assert server.create_database('odd "name"')
    assert not server.create_database('odd "name"')


def test_another_password_than_the_data_were_made_with_is_refused_with_a_remedy(server: PostgresServer) -> None:
    server.start()
    server.stop()
    other = make(server.folder, password="another")
    with pytest.raises(ConfigurationError, match=r"POSTGRES_PASSWORD.*--data-dir"):
        other.start()
    assert list(other._processes()) == []


def test_what_a_killed_first_start_left_half_made_is_made_anew(server: PostgresServer) -> None:
    half = server.folder / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    server.start()
    assert query(server, "SELECT 1") == [(1,)]


def test_a_server_that_cannot_start_says_why_and_where_its_log_is(server: PostgresServer) -> None:
    server.start()
    server.stop()
    (server.data / "postgresql.conf").write_text("nonsense = 1\n")
    with pytest.raises(UnavailableError, match=r"PostgreSQL ended with exit code 1: .*(nonsense|FATAL)") as caught:
        server.start()
    assert str(server.log) in str(caught.value)
    assert "\n" not in str(caught.value)
