"""A process that catches up and shows, in memory that outlives it, what each thread of its lanes is doing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from datetime import date
from enum import IntEnum
from typing import Any

import pandas as pd
from sqlalchemy.engine.default import DefaultDialect

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.catch_up import CatchUp
from sensor_pipeline.drained import Drained
from sensor_pipeline.offsets import Batch
from sensor_pipeline.postgres import transaction
from sensor_pipeline.postgres.transaction import Origin, Written
from sensor_pipeline.settings import Settings

# A lane's threads: one drains, one writes, one commits offsets.
THREADS_A_LANE = 3
_THREAD = threading.local()


class Stage(IntEnum):
    """What a lane's thread is doing."""

    PLAN = 0
    DRAIN = 1
    DETECT = 2
    WRITE = 3
    DATABASE_COMMIT = 4
    OFFSET_COMMIT = 5


def catch_up(settings: Settings, shown: MutableSequence[int]) -> None:
    """Catch up; `shown` has a place for each thread of each lane."""
    runner = CatchUp(StagedPipeline(settings, shown), lambda *_: None)
    runner.run(runner.backlog())


class StagedPipeline(Pipeline):
    def __init__(self, settings: Settings, shown: MutableSequence[int]) -> None:
        super().__init__(settings)
        self._shown = shown
        self._places = iter(range(len(shown)))
        commit, make_days = DefaultDialect.do_commit, transaction.ensure_days

        def watched_commit(dialect: DefaultDialect, connection: Any) -> None:
            with self._stage(Stage.DATABASE_COMMIT, only_in=Stage.WRITE):
                commit(dialect, connection)

        def watched_days(database: Any, days: list[date]) -> list[date]:
            with self._stage(Stage.PLAN):
                return make_days(database, days)

        DefaultDialect.do_commit = watched_commit  # type: ignore[method-assign]
        transaction.ensure_days = watched_days

    def drain(self, batch: Batch) -> Drained:
        return self._within(Stage.DRAIN, super().drain, batch)

    def detect(self, drained: Drained) -> pd.DataFrame:
        return self._within(Stage.DETECT, super().detect, drained)

    def write(self, batch: Batch, drained: Drained, detected: pd.DataFrame, origin: Origin) -> Written:
        return self._within(Stage.WRITE, super().write, batch, drained, detected, origin)

    def commit(self, batch: Batch) -> dict[int, int]:
        return self._within(Stage.OFFSET_COMMIT, super().commit, batch)

    def _within(self, stage: Stage, step: Callable[..., Any], *arguments: Any) -> Any:
        with self._stage(stage):
            return step(*arguments)

    @contextmanager
    def _stage(self, stage: Stage, *, only_in: Stage | None = None) -> Iterator[None]:
        if not hasattr(_THREAD, "place"):
            if stage == Stage.DATABASE_COMMIT:  # the planning's own, not in a lane
                yield
                return
            _THREAD.place = next(self._places, None)
        if _THREAD.place is None:  # the last look at the mirror, after all lanes
            yield
            return
        before = self._shown[_THREAD.place]
        if only_in is None or before == only_in:
            self._shown[_THREAD.place] = stage
        try:
            yield
        finally:
            self._shown[_THREAD.place] = before
