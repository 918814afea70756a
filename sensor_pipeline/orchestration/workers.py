"""Runs on other hosts: the launcher that hands them to Celery workers through Redis, and what such a worker is.

Redis holds nothing that would be missed: a run whose message it lost is given up by run monitoring, and its batch is
planned again from the ledger.
"""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from celery.signals import worker_process_init
from dagster import DagsterRun, Field, IntSource, StringSource
from dagster._core.instance.ref import InstanceRef
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClassData, pack_value
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tasks import create_execute_job_task
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from sensor_pipeline.errors import ConfigurationError, UnavailableError

QUEUE = "dagster"
_DEFINITIONS = "sensor_pipeline.orchestration.definitions"

_ANSWER_SECONDS = 2.0
# One answer of all workers serves for all runs that are asked about at a time.
_LOOK_SECONDS = 5.0
# Run monitoring ends a run at its max_runtime; the worker does it by itself where it is cut off from that.
_GRACE_SECONDS = 60

_CONFIG: dict[str, Any] = {
    # A message is gone from Redis when a worker starts on it. Kept until its end it would be handed out again, to run
    # beside the first, whenever Redis or the network was away: what is lost is found by run monitoring instead.
    "task_acks_late": False,
    # Nor does a worker take what it cannot start at once, while another one is idle.
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # Dagster keeps what becomes of a run.
    "task_ignore_result": True,
    # A process gives its memory back now and then; the next one is a fork, and imports nothing.
    "worker_max_tasks_per_child": 200,
    "worker_hijack_root_logger": False,
    "worker_redirect_stdouts": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # A launch waits about ten seconds for a Redis that starts again.
    "task_publish_retry_policy": {"max_retries": 22, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
    "broker_transport_options": {
        "socket_connect_timeout": 5,
        "socket_timeout": 30,
        # As of the database's connections: of a host that has vanished nothing would be heard for hours.
        "socket_keepalive": True,
        "socket_keepalive_options": {
            socket.TCP_KEEPIDLE: 30,
            socket.TCP_KEEPINTVL: 10,
            socket.TCP_KEEPCNT: 3,
            socket.TCP_USER_TIMEOUT: 60_000,
        },
    },
}


class WorkersLauncher(CeleryRunLauncher):
    """`CeleryRunLauncher`, but it asks the workers what they execute, and a run's task has the run's own id.

    Dagster's asks a result backend: there a task whose host died is `STARTED` for ever, and one that a restarted Redis
    has forgotten counts as failed while it runs. It also tags a run with its task's id after handing it out, when a
    warm worker may have started it, and what that writes of the run can take the tag away again.

    Args:
        broker: the address of Redis. A secret.
        lost_after_seconds: a run that no worker has executed for so long is lost.
        inst_data: what Dagster keeps of dagster.yaml.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        broker: str,
        lost_after_seconds: int,
        inst_data: ConfigurableClassData | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not broker.startswith(("redis://", "rediss://")):
            # Never with the address itself: it may hold a password.
            raise ConfigurationError("CELERY_BROKER_URL must be an address such as redis://:PASSWORD@HOST:6379/0")
        super().__init__(QUEUE, broker=broker, config_source=_CONFIG, inst_data=inst_data)
        self._lost_after = lost_after_seconds
        self._clock = clock
        self._execute = create_execute_job_task(self.celery)
        self._seen_at = float("-inf")
        self._seen: Mapping[str, str] = {}
        self._missing_since: dict[str, float] = {}

    @classmethod
    def config_type(cls) -> dict[str, Field]:
        """What dagster.yaml may say."""
        return {
            "broker": Field(StringSource, description="The address of Redis, redis:// or rediss://."),
            "lost_after_seconds": Field(
                IntSource,
                is_required=False,
                default_value=60,
                description="A run that no worker says it executes is given up after so long.",
            ),
        }

    @property
    def place(self) -> str:
        """Where Redis is, without the password."""
        with self.celery.connection_for_write() as connection:
            return str(connection.as_uri())

    @property
    def supports_resume_run(self) -> bool:
        """A batch is run again, not resumed."""
        return False

    def launch_run(self, context: LaunchRunContext) -> None:
        """Hand a run to whichever worker is free first.

        Raises:
            UnavailableError: Redis did not take it within about ten seconds.
        """
        run = context.dagster_run
        assert run.job_code_origin is not None
        arguments = ExecuteRunArgs(
            job_origin=run.job_code_origin,
            run_id=run.run_id,
            instance_ref=self._instance.get_ref(),
            set_exit_code_on_failure=True,
        )
        with self._asking():
            self._execute.apply_async(
                kwargs={"execute_job_args_packed": pack_value(arguments)},
                task_id=run.run_id,
                queue=QUEUE,
                time_limit=self._time_limit(run),
            )
        self._instance.report_engine_event(f"Handed to the workers at {self.place}.", run, cls=type(self))

    def terminate(self, run_id: str) -> bool:
        """Have the run's process end, or a run that waits for a worker not be started."""
        with self._asking():
            self.celery.control.revoke(run_id, terminate=True)
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Whether a worker executes a run that has started."""
        try:
            seen = self.executing()
        except UnavailableError as error:
            # It may well go on; max_runtime_seconds ends what does not.
            self._missing_since.clear()
            return CheckRunHealthResult(WorkerStatus.RUNNING, str(error))
        if run.run_id in seen:
            self._missing_since.pop(run.run_id, None)
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        # A worker that stops answers no more while it ends its runs, one that was cut off comes back.
        since = self._missing_since.setdefault(run.run_id, self._seen_at)
        if self._seen_at - since < self._lost_after:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "no worker has answered for it just now")
        del self._missing_since[run.run_id]
        return CheckRunHealthResult(
            WorkerStatus.FAILED,
            f"no worker has executed it for {self._seen_at - since:.0f} s: its worker was killed, or is cut off",
        )

    def get_run_worker_debug_info(self, run: DagsterRun, include_container_logs: bool | None = True) -> str | None:
        """For a run that does not start or has vanished: whether there are workers at all."""
        return f"Workers that answer at {self.place}: {', '.join(self.workers()) or 'none'}."

    def workers(self) -> list[str]:
        """The names of the workers that answer.

        Raises:
            UnavailableError: Redis does not answer.
        """
        with self._asking():
            answers = self.celery.control.ping(timeout=_ANSWER_SECONDS)
        return sorted(name for answer in answers for name in answer)

    def executing(self) -> Mapping[str, str]:
        """The runs that workers execute, each with its worker; an answer may be five seconds old.

        Raises:
            UnavailableError: Redis does not answer.
        """
        now = self._clock()
        if now - self._seen_at >= _LOOK_SECONDS:
            with self._asking():
                active = self.celery.control.inspect(timeout=_ANSWER_SECONDS).active() or {}
            self._seen = {task["id"]: worker for worker, tasks in active.items() for task in tasks}
            self._seen_at = now
        return self._seen

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        # The second where a connection breaks that was kept.
        except (OperationalError, RedisError) as error:
            raise UnavailableError(
                f"Redis at {self.place} does not answer: {error}; check that it runs, and CELERY_BROKER_URL"
            ) from error

    def _time_limit(self, run: DagsterRun) -> float | None:
        asked = run.tags.get(MAX_RUNTIME_SECONDS_TAG)
        limit = float(asked) if asked else float(self._instance.run_monitoring_max_runtime_seconds)
        return limit + _GRACE_SECONDS if limit else None


def work(home: str, concurrency: int) -> int:
    """Be a worker until SIGTERM or Ctrl-C, and then until the runs that it executes have ended.

    Args:
        home: Dagster's folder, with its dagster.yaml.
        concurrency: how many runs it executes at a time, each in a process of its own.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: that dagster.yaml names another launcher.
    """
    # Not the whole instance: what it keeps of connections would be shared by all processes forked below.
    launcher = InstanceRef.from_dir(home).run_launcher
    if not isinstance(launcher, WorkersLauncher):
        raise ConfigurationError(
            f"{home}/dagster.yaml has runs launched by {type(launcher).__name__}, so that a worker would get none; "
            "append the package's orchestration/workers.yaml to it, wherever Dagster's processes run"
        )
    # Before they are forked: each has then imported everything, and starts a run at once.
    importlib.import_module(_DEFINITIONS)
    # Of two workers with one name Celery would take the one's answer for the other's.
    name = f"sensor-pipeline-{os.getpid()}@{socket.gethostname()}"
    # Workers have nothing to tell each other.
    alone = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}
    worker = launcher.celery.Worker(
        hostname=name, concurrency=concurrency, pool="prefork", loglevel="INFO", queues=[QUEUE], **alone
    )
    worker_process_init.connect(_leave_group)
    worker.start()
    return int(worker.exitcode or 0)


def _leave_group(**_: Any) -> None:
    # Ctrl-C goes to a terminal's whole process group, and would end the run.
    os.setpgrp()
