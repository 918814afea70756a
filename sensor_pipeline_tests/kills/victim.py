"""A process that ingests as the package does, says which points it passes, and kills itself at one of them."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import pandas as pd
import psutil
import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect

from sensor_pipeline import replay as replay_module
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.drained import Drained, Records
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.kafka import drain as drain_module
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.postgres import copy, transaction
from sensor_pipeline.postgres.rejected_search import Filter
from sensor_pipeline.postgres.transaction import Origin, Written
from sensor_pipeline.replay import Replay
from sensor_pipeline.settings import Settings

# A fork of a process that has imported everything and has neither threads nor clients: a child costs no imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"sensor_pipeline_tests.kills.{name}" for name in ("victim", "stages")])

PATIENCE_SECONDS = 180
CHUNK_MESSAGES = 8
# What librdkafka logs with `debug=protocol` when a request has gone to the broker.
_COMMIT_SENT = b"Sent OffsetCommitRequest"


@dataclass(frozen=True)
class End:
    """The points that a process passed, and how it ended: None by itself, or the signal that killed it."""

    points: list[str]
    killed_by: int | None


def run_batch(settings: Settings, batch: Batch, *, kill_at: int | None = None) -> End:
    """Run a batch in a process of its own, killed at a point by its number, counted from 0."""
    return Victim(_batch, settings, batch, kill_at, signal.SIGKILL).end


def catch_up(settings: Settings, *, kill_at: int | None = None) -> End:
    """Ingest the backlog in a process of its own."""
    return Victim(_catch_up, settings, kill_at, signal.SIGKILL).end


def replay(settings: Settings, topic: str, *, kill_at: int | None = None) -> End:
    """Replay a topic's rejected messages in a process of its own, a few in each part."""
    return Victim(_replay, settings, topic, kill_at, signal.SIGKILL).end


@contextmanager
def started(settings: Settings, batch: Batch, *, stop_at: int | None = None) -> Iterator[Victim]:
    """A process that runs a batch, and has ended when the block has; it stops at a point until it is woken."""
    process = Victim(_batch, settings, batch, stop_at, signal.SIGSTOP)
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        process.end  # noqa: B018


class Victim:
    """A process that runs."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._said, tell = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_explained, args=(target, *arguments, tell))
        self._process.start()
        tell.close()

    def kill(self) -> None:
        self._process.kill()

    def is_stopped(self) -> bool:
        return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED

    def wake(self) -> None:
        psutil.Process(self._process.pid).resume()

    @cached_property
    def end(self) -> End:
        """Wait for it."""
        points: list[str] = []
        with self._said, suppress(EOFError):
            while self._said.poll(PATIENCE_SECONDS):
                points.append(self._said.recv())
        self._process.join(PATIENCE_SECONDS)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        assert code in (0, -signal.SIGKILL), f"exit code {code}: {points[-1:]}"
        return End(points, -code if code else None)


def _explained(target: Callable[..., None], *arguments: Any) -> None:
    try:
        target(*arguments)
    except BaseException:
        # Its standard error is read by itself.
        arguments[-1].send(traceback.format_exc())
        raise


def _batch(settings: Settings, batch: Batch, *points: Any) -> None:
    WatchedPipeline(settings, Points(*points)).run(batch)


def _catch_up(settings: Settings, *points: Any) -> None:
    runner = CatchUp(WatchedPipeline(settings, Points(*points)), lambda *_: None)
    runner.run(runner.backlog())


def _replay(settings: Settings, topic: str, *points: Any) -> None:
    reached = Points(*points)
    reached.step = "replay"
    replay_module._MESSAGES_A_PART = CHUNK_MESSAGES
    watch_database(reached)
    Replay(settings, Filter(topics=[topic])).run(lambda _: None)


class Points:
    """Tells each point that is reached, and sends its own process a signal at one."""

    def __init__(self, at: int | None, number: int, tell: Connection) -> None:
        self.step = "plan"
        self._tell = tell
        self._left = at
        self._signal = number

    def reach(self, what: str) -> None:
        self._tell.send(f"{self.step}: {what}")
        if self._left == 0:
            os.kill(os.getpid(), self._signal)
        if self._left is not None:
            self._left -= 1


class WatchedPipeline(Pipeline):
    """The pipeline, with a point before and after each step, each statement, each COPY and each commit."""

    def __init__(self, settings: Settings, points: Points) -> None:
        settings = replace(settings, kafka_client={**settings.kafka_client, "debug": "protocol"})
        super().__init__(settings)
        self.kafka = WatchedKafka(settings, points)
        self._points = points
        drain_module._CHUNK_MESSAGES = CHUNK_MESSAGES
        watch_database(points)

    def drain(self, batch: Batch) -> Drained:
        self._points.step = "drain"
        self._points.reach("before")
        drained = super().drain(batch)
        self._points.reach("after the end")
        return drained

    def detect(self, drained: Drained) -> pd.DataFrame:
        detected = super().detect(drained)
        self._points.reach("detected")
        return detected

    def write(self, batch: Batch, drained: Drained, detected: pd.DataFrame, origin: Origin) -> Written:
        self._points.step = "write"
        written = super().write(batch, drained, detected, origin)
        self._points.step = "written"
        self._points.reach(f"{written.inserted} inserted, {written.already_ingested} already ingested")
        return written

    def commit(self, batch: Batch) -> dict[int, int]:
        self._points.step = "commit"
        offsets = super().commit(batch)
        self._points.reach("after the end")
        return offsets


class WatchedKafka(Kafka):
    def __init__(self, settings: Settings, points: Points) -> None:
        super().__init__(settings)
        self._points = points
        self._sent = threading.Semaphore(0)
        threading.Thread(target=self._read_log, args=(_own_errors(),), daemon=True).start()

    def drain(self, batch: Batch, wanted: Sequence[OffsetRange]) -> Iterator[Records | list[OffsetRange]]:
        is_first = True
        for part in super().drain(batch, wanted):
            if is_first:
                self._points.reach("after the first chunk")
            is_first = False
            yield part

    def commit_offsets(self, topic: str, offsets: dict[int, int]) -> None:
        self._points.reach("before the group's offsets")
        super().commit_offsets(topic, offsets)
        assert self._sent.acquire(timeout=PATIENCE_SECONDS)
        self._points.reach("after the group's offsets")

    def _read_log(self, log: int) -> None:
        with os.fdopen(log, "rb") as lines:
            for line in lines:
                if _COMMIT_SENT in line:
                    self._points.reach("the group's offsets were sent")
                    self._sent.release()


def _own_errors() -> int:
    """What this process writes to its standard error, to be read."""
    read, write = os.pipe()
    os.dup2(write, 2)
    return read


def watch_database(points: Points) -> None:
    """A point before each statement, before and after each commit, and before and during each COPY."""
    sa.event.listen(
        sa.Engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: points.reach(_short(statement))
    )
    commit, copy_readings, chunks = DefaultDialect.do_commit, transaction.copy_readings, copy._chunks

    def watched_commit(dialect: DefaultDialect, connection: Any) -> None:
        points.reach("before COMMIT")
        commit(dialect, connection)
        points.reach("after COMMIT")

    def watched_copy(*arguments: Any, **named: Any) -> int:
        points.reach("before COPY")
        return copy_readings(*arguments, **named)

    def watched_chunks(*arguments: Any) -> Iterator[bytes]:
        *rows, end = chunks(*arguments)
        yield from rows
        points.reach("COPY without its end")
        yield end

    DefaultDialect.do_commit = watched_commit  # type: ignore[method-assign]
    transaction.copy_readings = watched_copy
    copy._chunks = watched_chunks


def _short(statement: str) -> str:
    """The beginning of a statement, the same for every day."""
    return re.sub(r"\d{4}-?\d\d-?\d\d", "DAY", " ".join(statement.split()))[:80]
