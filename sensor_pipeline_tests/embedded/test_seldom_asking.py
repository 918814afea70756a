"""Dagster's processes of the embedded stack ask the code server every few seconds, and are otherwise what they are."""

from __future__ import annotations

import inspect
import subprocess
import sys

from dagster._daemon import sensor
from dagster._grpc import server_watcher

from sensor_pipeline.embedded import seldom_asking


def test_dagster_takes_the_pauses_from_where_they_are_set() -> None:
    assert (server_watcher.WATCH_INTERVAL, server_watcher.MAX_RECONNECT_ATTEMPTS) == (1, 10)
    source = inspect.getsource(server_watcher.watch_grpc_server_thread)
    assert '"watch_interval", WATCH_INTERVAL)' in source
    assert '"max_reconnect_attempts", MAX_RECONNECT_ATTEMPTS' in source
    assert sensor.MIN_INTERVAL_LOOP_TIME == 5
    assert "MIN_INTERVAL_LOOP_TIME - loop_duration" in inspect.getsource(sensor.execute_sensor_iteration_loop)


def test_the_module_runs_as_if_it_were_started_by_itself() -> None:
    command = [sys.executable, "-P", "-m", seldom_asking.__name__, "dagster_webserver", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "dagster-webserver, version" in ended.stdout or "dagster_webserver, version" in ended.stdout
