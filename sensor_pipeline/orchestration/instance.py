"""What the Dagster instance that runs the pipeline must be, as dagster.yaml of this folder sets it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dagster import DagsterInstance, RunsFilter
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin

from sensor_pipeline.errors import UnavailableError
from sensor_pipeline.orchestration import tags
from sensor_pipeline.orchestration.job import JOB_NAME

_COORDINATOR = "QueuedRunCoordinator"
_DEQUEUE_SECONDS = 1
_WORKERS_LAUNCHER = "WorkersLauncher"


def find_wrong(instance: DagsterInstance) -> Iterator[str]:
    """What of an instance is not as it must be: each a sentence that says why, and what to set."""
    yield from _queue(instance)
    yield from _monitoring(instance)
    if "sqlite" in type(instance.run_storage).__name__.lower():
        yield (
            "its storage is SQLite, which locks under concurrent runs; set storage in dagster.yaml to PostgreSQL "
            "(DAGSTER_POSTGRES_DB)"
        )
    yield from _daemon(instance)
    yield from _code_server(instance)
    yield from _workers(instance)


def _queue(instance: DagsterInstance) -> Iterator[str]:
    coordinator = instance.run_coordinator
    if type(coordinator).__name__ != _COORDINATOR:
        yield f"its runs are not queued, so that lanes are not kept apart; set run_coordinator to {_COORDINATOR}"
        return
    interval = coordinator.dequeue_interval_seconds  # type: ignore[attr-defined]
    if interval > _DEQUEUE_SECONDS:
        yield (
            f"a queued run waits up to {interval} s to be launched; set dequeue_interval_seconds of run_coordinator to "
            f"{_DEQUEUE_SECONDS}"
        )
    queue = instance.get_concurrency_config().run_queue_config
    limits = queue.tag_concurrency_limits if queue else []
    apart = {"applyLimitPerUniqueValue": True}
    if not any(limit.get("key") == tags.LANE and limit.get("value") == apart for limit in limits):
        yield (
            f"the runs of a lane are not limited, so that they wait at the database instead of in the queue; set "
            f"concurrency.runs.tag_concurrency_limits to key {tags.LANE}, applyLimitPerUniqueValue, limit 2"
        )


def _monitoring(instance: DagsterInstance) -> Iterator[str]:
    if not instance.run_monitoring_enabled:
        yield "a run whose process died holds its lane for ever; set run_monitoring.enabled to true"
    elif not instance.run_monitoring_max_runtime_seconds:
        yield "a run that hangs holds its lane for ever; set run_monitoring.max_runtime_seconds to 300"


def _daemon(instance: DagsterInstance) -> Iterator[str]:
    # Which heartbeats there must be depends on the settings: the scheduler, sensors, the queue, monitoring.
    statuses = instance.get_daemon_statuses()
    silent = sorted(kind.lower() for kind, status in statuses.items() if status.required and not status.healthy)
    if silent:
        yield f"the daemon does not run (no heartbeat of {', '.join(silent)}); start dagster-daemon, and see its log"


def _code_server(instance: DagsterInstance) -> Iterator[str]:
    # Where the code is loaded is known of runs only: the workspace file is the daemon's own.
    newest = instance.get_runs(RunsFilter(job_name=JOB_NAME), limit=1)
    origin = newest[0].remote_job_origin if newest else None
    if origin is None:
        return
    if isinstance(origin.repository_origin.code_location_origin, ManagedGrpcPythonEnvCodeLocationOrigin):
        yield (
            f"the daemon loads the code itself, so that ending it ends the runs (job {JOB_NAME}); start `dagster "
            "code-server` and name it in the workspace as grpc_server"
        )


def _workers(instance: DagsterInstance) -> Iterator[str]:
    # Imported by its name in dagster.yaml, and only there: what it needs is an extra of this package.
    launcher: Any = instance.run_launcher
    if type(launcher).__name__ != _WORKERS_LAUNCHER:
        return
    try:
        workers = launcher.workers()
    except UnavailableError as error:
        yield f"no run is launched: {error}"
        return
    if not workers:
        yield f"no worker answers at {launcher.place}, so that runs wait; start `sensor-pipeline worker` on each host"
