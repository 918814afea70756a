"""Runs of the pipeline that stop before every step: to die there, or to take turns in an order that a test chooses.

A step is a statement, a COPY, a commit, a part of the drain: whatever one process does that another, or a `kill -9`,
can come before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from threading import Condition, Semaphore, Thread
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import pytest
import sqlalchemy as sa

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import SensorPipelineError
from sensor_pipeline.offsets import Batch
from sensor_pipeline.postgres import transaction
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect

# Only a test that fails waits as long.
_PATIENCE_SECONDS = 120
_LOOK_SECONDS = 0.005


class Kind(StrEnum):
    """What comes next where a run stops."""

    DRAIN = "drain"
    DETECTED = "detected"
    STATEMENT = "statement"
    COPY = "copy"
    COMMIT = "commit"
    COMMITTED = "committed"
    BATCH_COMMIT = "commit of the batch"
    BATCH_COMMITTED = "batch committed"
    OFFSETS = "commit of the offsets"
    OFFSETS_COMMITTED = "offsets committed"
    RETRY = "retry"


@dataclass(frozen=True)
class Step:
    """A place where a run can stop: before what `kind` says, or after what it says was done."""

    kind: Kind
    said: str = ""

    def __str__(self) -> str:
        return self.said or self.kind.value


@dataclass(frozen=True)
class Death:
    """Where a run dies: at its n-th step of a kind, counted from 0."""

    kind: Kind
    nth: int = 0


class Died(BaseException):
    """The process is gone: nothing of it runs any more, and no `except Exception` of the program sees it."""


class Process:
    """A pipeline whose every step can be stopped at, as if it were a process of its own.

    Args:
        settings: of the pipeline.
        name: for people.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self.pipeline = Pipeline(settings, sleep=lambda _: self._at(Kind.RETRY))
        self.before: Callable[[Step], None] = lambda _: None
        self.death: Death | None = None
        self.is_dead = False
        self.steps: list[Step] = []
        self.backend = 0
        self.batch: Batch | None = None
        self._count: Counter[Kind] = Counter()
        self._is_logged = False
        self._run = self.pipeline.run
        self._watch_database()
        self._watch_kafka()

    def run(self, batch: Batch) -> Written:
        """Run a batch; `death` counts from here."""
        self.batch = batch
        self._count.clear()
        self.steps.clear()
        return self._run(batch)

    def _at(self, kind: Kind, said: str = "", connection: sa.Connection | None = None) -> None:
        if not self.is_dead:
            step = Step(kind, said)
            self.steps.append(step)
            self.before(step)
            self._count[kind] += 1
            death = self.death
            self.is_dead |= death is not None and death.kind == kind and self._count[kind] > death.nth
        if self.is_dead:
            if connection is not None:
                # It hangs up and says nothing, not even ROLLBACK.
                connection.invalidate()
            raise Died

    def _watch_database(self) -> None:
        database = self.pipeline.database
        original = database.begin
        _processes[database._engine] = ref(self)
        sa.event.listen(database._engine, "before_cursor_execute", self._before_statement)

        @contextmanager
        def begin() -> Iterator[sa.Connection]:
            self._is_logged = False
            with original() as connection:
                yield connection
                self._at(Kind.BATCH_COMMIT if self._is_logged else Kind.COMMIT, connection=connection)
            self._at(Kind.BATCH_COMMITTED if self._is_logged else Kind.COMMITTED)

        database.begin = begin  # type: ignore[method-assign]

    def _before_statement(self, connection: sa.Connection, _: object, statement: str, *__: object) -> None:
        self.backend = connection.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
        self._at(Kind.STATEMENT, " ".join(statement.split())[:90], connection)
        self._is_logged |= "INSERT INTO batches" in statement

    def before_copy(self, connection: sa.Connection, rows: int, *, failing: bool) -> None:
        """The raw COPY, which SQLAlchemy does not see."""
        self._at(Kind.COPY, f"COPY {rows} {'failing' if failing else 'healthy'} readings", connection)

    def _watch_kafka(self) -> None:
        kafka, detect = self.pipeline.kafka, self.pipeline.detect
        drain, commit_offsets = kafka.drain, kafka.commit_offsets

        def watched_drain(*arguments: Any) -> Iterator[Any]:
            self._at(Kind.DRAIN)
            for part in drain(*arguments):
                yield part
                self._at(Kind.DRAIN)

        def watched_detect(*arguments: Any) -> Any:
            detected = detect(*arguments)
            self._at(Kind.DETECTED)
            return detected

        def watched_commit(topic: str, offsets: Any) -> None:
            self._at(Kind.OFFSETS, f"commit offsets {dict(offsets)}")
            commit_offsets(topic, offsets)
            self._at(Kind.OFFSETS_COMMITTED)

        kafka.drain = watched_drain  # type: ignore[method-assign]
        kafka.commit_offsets = watched_commit  # type: ignore[method-assign]
        self.pipeline.detect = watched_detect  # type: ignore[method-assign]


# A process holds its engine: held from here too, none of them and of their clients would ever go.
_processes: WeakKeyDictionary[sa.Engine, ReferenceType[Process]] = WeakKeyDictionary()


@contextmanager
def watched_copies() -> Iterator[None]:
    """Processes stop before a COPY during this block."""
    copy_readings = transaction.copy_readings

    def watched(connection: sa.Connection, **columns: Any) -> int:
        if len(columns["values"]):
            failing = columns.get("failure_id") is not None
            process = _processes[connection.engine]()
            assert process is not None
            process.before_copy(connection, len(columns["values"]), failing=failing)
        return copy_readings(connection, **columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transaction, "copy_readings", watched)
        yield


Outcome = Written | SensorPipelineError | Died


def outcome_of(run: Callable[[], Written]) -> Outcome:
    """What came of a run: its result, the pipeline's own error, or its death."""
    try:
        return run()
    except (SensorPipelineError, Died) as ended:
        return ended


class Turns:
    """Two runs, or more, of which only one takes a step at a time.

    One that waits for a lock which another holds, as PostgreSQL itself says, is passed over until it has it.

    Args:
        settings: the database that all use.
        runs: each a process and its batch.
        lengths: how many steps one takes before it is the next one's turn; after the last of them each goes to its end.
        gather: stops them all here before the turns begin, where they get so far.
        on_step: called when a run has come to a step, with nothing running.
    """

    def __init__(
        self,
        settings: Settings,
        runs: Sequence[tuple[Process, Batch]],
        lengths: Sequence[int],
        *,
        gather: Kind | None,
        on_step: Callable[[Process, Step], None],
    ) -> None:
        self._settings = settings
        self._lengths = list(lengths)
        self._gather = gather
        self._on_step = on_step
        self._changed = Condition()
        self._actors = [_Actor(process, batch, self._changed) for process, batch in runs]
        self.story: list[str] = []
        self.waits = 0
        self.switches = 0

    def run(self) -> list[Outcome]:
        """Let them take turns until all have ended.

        Raises:
            AssertionError: nobody could go on, or `on_step` raised.
        """
        with connect(self._settings).connect() as connection:
            self._connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            try:
                for actor in self._actors:
                    actor.start()
                self._all()
            finally:
                for actor in self._actors:
                    actor.stop()
                for actor in self._actors:
                    actor.join(_PATIENCE_SECONDS)
        assert not any(actor.is_alive() for actor in self._actors)
        for actor in self._actors:
            if actor.crashed is not None:
                raise actor.crashed
        return [actor.outcome for actor in self._actors if actor.outcome is not None]

    def _all(self) -> None:
        self._settle()
        if self._gather is not None:
            for actor in self._actors:
                while actor.is_ready and not actor.has_come_to(self._gather):
                    self._grant(actor)
        at, left = 0, self._next_length()
        while ready := [actor for actor in self._actors if actor.is_ready]:
            actor = self._actors[at % len(self._actors)]
            if left == 0 or not actor.is_ready:
                others = [other for other in ready if other is not actor]
                if others:
                    self.switches += 1
                    actor = others[0]
                    at = self._actors.index(actor)
                left = self._next_length() or 1
            left -= 1
            self._grant(actor)

    def _next_length(self) -> int:
        return self._lengths.pop(0) if self._lengths else -1

    def _grant(self, actor: _Actor) -> None:
        self.story.append(f"{actor.process.name}: {actor.at}")
        actor.grant()
        self._settle()
        if isinstance(actor.outcome, Died):
            self.story.append(f"{actor.process.name}: dies there")

    def _settle(self) -> None:
        """Wait until each one stands before a step, has ended, or waits for one that stands."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        moving = list(self._actors)
        while moving:
            with self._changed:
                if not any(actor.stands for actor in moving):
                    self._changed.wait(_LOOK_SECONDS)
            moving = [actor for actor in self._actors if not actor.stands and not self._waits(actor)]
            assert time.monotonic() < deadline, f"nobody goes on: {self.story[-10:]}"
        for actor in self._actors:
            if actor.is_new:
                actor.is_new = False
                if actor.at is not None:
                    self._on_step(actor.process, actor.at)

    def _waits(self, actor: _Actor) -> bool:
        others = [other.process.backend for other in self._actors if other is not actor and other.at is not None]
        query = sa.text("SELECT pg_blocking_pids(:pid) && CAST(:others AS integer[])")
        waits = bool(self._connection.scalar(query, {"pid": actor.process.backend, "others": others}))
        self.waits += waits and not actor.waits
        actor.waits |= waits
        return waits


class _Actor(Thread):
    """One run in a thread of its own, which stands still before each of its steps until that is granted."""

    def __init__(self, process: Process, batch: Batch, changed: Condition) -> None:
        super().__init__(name=process.name, daemon=True)
        self.process = process
        self.at: Step | None = None
        self.is_new = False
        self.waits = False
        self.outcome: Outcome | None = None
        self.crashed: BaseException | None = None
        self._batch = batch
        self._changed = changed
        self._granted = Semaphore(0)
        self._seen: set[Kind] = set()
        self._is_stopped = False

    def run(self) -> None:
        self.process.before = self._stand
        try:
            self.outcome = outcome_of(lambda: self.process.run(self._batch))
        except BaseException as error:  # noqa: BLE001 - it is the test's to raise
            self.crashed = error
        finally:
            self.process.before = lambda _: None
            with self._changed:
                self._is_stopped = True
                self._changed.notify_all()

    @property
    def is_ready(self) -> bool:
        """Whether it stands before a step."""
        return self.at is not None

    @property
    def stands(self) -> bool:
        """Whether it does nothing: it stands before a step, or has ended."""
        return self.at is not None or self._is_stopped

    def has_come_to(self, kind: Kind) -> bool:
        """Whether it stands before such a step or has done one."""
        return kind in self._seen

    def grant(self) -> None:
        """Let it take the step."""
        self.at = None
        self.waits = False
        self._granted.release()

    def stop(self) -> None:
        """Let it die where it stands."""
        self.process.is_dead |= not self._is_stopped
        self._granted.release()

    def _stand(self, step: Step) -> None:
        with self._changed:
            self.at = step
            self.is_new = True
            self._seen.add(step.kind)
            self._changed.notify_all()
        self._granted.acquire()
