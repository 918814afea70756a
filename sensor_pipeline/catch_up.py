"""Batches one after the other in this process, until what was there at the start is ingested."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sensor_pipeline.backlog import TopicBacklog, read_backlog
from sensor_pipeline.batch import Pipeline, Prepared
from sensor_pipeline.errors import DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.kafka import Topic
from sensor_pipeline.offsets import (
    Batch,
    OffsetRange,
    PartitionBacklog,
    intersect,
    lane_of,
    pause,
    plan,
    subtract,
    total,
)
from sensor_pipeline.postgres.transaction import Written

log = logging.getLogger(__name__)

# Of a lane: the one that is written, and the one that is drained.
_BATCHES_HELD = 2
# A lane's first batch is this many times smaller than its largest.
_RAMP = 4
# What would be left after a batch is taken along where it is at most this share of it: a batch has costs of its own.
_REST = 0.5
# A partition whose batch failed is tried again, alone, this often.
TRIES = 3


class CatchUp:
    """Ingests a backlog, one thread a lane, with the same planning and the same batches as the sensor's runs.

    Args:
        pipeline: where to read and write; `settings.lanes` says how many lanes.
        on_batch: called after each batch, from its lane's thread.
        sleep: how to wait before a failed partition is tried again.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        on_batch: Callable[[Batch, Written], None],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._pipeline = pipeline
        self._on_batch = on_batch
        self._sleep = sleep

    def backlog(self) -> list[TopicBacklog]:
        """The backlog of every topic."""
        p = self._pipeline
        return [read_backlog(p.settings, p.kafka, p.database, name, register=True) for name in p.settings.kafka_topics]

    def run(self, backlogs: Sequence[TopicBacklog]) -> None:
        """Ingest a backlog as `backlog` returned it; what is published meanwhile is left for the next time.

        Raises:
            DataError: some partition cannot be ingested, as said; all others were.
            SensorPipelineError: nothing can go on.
        """
        problems: list[str] = []
        for backlog in backlogs:
            problems += [f"topic {backlog.topic.name} {said}" for p in backlog.partitions if (said := p.cut_off)]
            lanes = [
                _Lane(self._pipeline, self._on_batch, self._sleep, backlog, lane)
                for lane in range(self._pipeline.settings.lanes)
            ]
            with ThreadPoolExecutor(len(lanes), "lane") as pool:
                try:
                    for ended in wait([pool.submit(lane.run) for lane in lanes], return_when=FIRST_EXCEPTION).done:
                        problems += ended.result()
                except BaseException:
                    # Also Ctrl-C: the pool waits for its threads, and they for no more than their batches in flight.
                    for lane in lanes:
                        lane.stop()
                    raise
            self._mirror(backlog.topic, [partition for lane in lanes for partition in lane.behind])
        if problems:
            raise DataError("not all was ingested: " + "; ".join(problems))

    def _mirror(self, topic: Topic, partitions: Sequence[int]) -> None:
        """Where a process was killed between the two commits of a last batch, no other batch would mend the mirror."""
        if partitions:
            anything = tuple(OffsetRange(partition, 0, 1) for partition in partitions)
            self._pipeline.commit(Batch(topic.name, topic.kafka_topic_id, anything))


class _Lane:
    """One lane of a topic, batch after batch: while one is written the next is drained, on another processor.

    Together they hold at most BATCH_SIZE messages. The first is small, since nothing is written while it is drained,
    and each is twice as large as the one before it.
    Offsets are committed behind the lane's back: they only mirror what is durable. `behind` are the partitions for
    which that was not done.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        on_batch: Callable[[Batch, Written], None],
        sleep: Callable[[float], None],
        backlog: TopicBacklog,
        lane: int,
    ) -> None:
        self._pipeline = pipeline
        self._on_batch = on_batch
        self._sleep = sleep
        self._name = backlog.topic.name
        self._known: TopicBacklog | None = backlog
        self._ends = {p.partition: p.end for p in backlog.partitions}
        self._lane = lane
        self.behind = {p for p in backlog.topic.partitions if lane_of(p, pipeline.settings.lanes) == lane}
        self._most = max(1, pipeline.settings.batch_size // _BATCHES_HELD)
        self._size = max(1, self._most // _RAMP)
        self._failed: list[tuple[OffsetRange, datetime]] = []
        self._given_up: dict[int, str] = {}
        self._ahead: deque[tuple[Batch, Future[Prepared]]] = deque()
        self._stopped = False
        self._is_all_planned = False

    def stop(self) -> None:
        """Plan no further batch."""
        self._stopped = True

    def run(self) -> list[str]:
        """Ingest the lane; returns what is wrong with the partitions given up."""
        with ThreadPoolExecutor(1, "drain") as drain, ThreadPoolExecutor(1, "commit") as commit:
            committed: Future[None] | None = None
            self._look_ahead(drain)
            while self._ahead:
                if stored := self._store_next():
                    if committed:
                        committed.result()
                    committed = commit.submit(self._commit, stored)
                self._look_ahead(drain)
        return list(self._given_up.values())

    def _store_next(self) -> Batch | None:
        """Write the batch that was drained first, which is gone from memory after it; returns it if that worked."""
        batch, prepared = self._ahead.popleft()
        try:
            written = self._pipeline.store(batch, prepared.result())
        except (DataError, UnavailableError) as error:
            self._note(batch, error)
            return None
        finally:
            # A failed drain's error refers to this frame, and would keep what was drained by way of it.
            del prepared
        # What failed before this batch's offsets has still to be tried, alone.
        self._failed = [f for f in self._failed if not intersect([f[0]], batch.ranges)]
        self._on_batch(batch, written)
        return batch

    def _look_ahead(self, drain: ThreadPoolExecutor) -> None:
        # To look for a next batch takes 30 ms, in which nothing is written: not where it is known that none is left.
        while len(self._ahead) < _BATCHES_HELD and not self._stopped and not self._is_all_planned:
            if not (batch := self._plan()):
                return
            self._ahead.append((batch, drain.submit(self._pipeline.prepare, batch)))
            self._size = min(2 * self._size, self._most)

    def _plan(self) -> Batch | None:
        """The next batch, if anything is left."""
        p = self._pipeline
        backlog = self._known or read_backlog(p.settings, p.kafka, p.database, self._name, register=True)
        self._known = None
        of_lane = [b for b in backlog.partitions if lane_of(b.partition, p.settings.lanes) == self._lane]
        mine = [left for b in of_lane if b.partition not in self._given_up and (left := self._as_left(b))]
        planned = plan(
            mine,
            lanes=p.settings.lanes,
            # A batch that a gap will fail is planned at full size, so that it names all that is lost.
            batch_size=p.settings.batch_size if any(b.gap for b in mine) else self._size_for(mine),
            in_flight_limit=1,
            in_flight={},
            # Nothing else runs in this lane meanwhile, so that the pauses are made here (`_note`).
            now=datetime.now(UTC) + timedelta(days=1),
        )
        if not planned.batches:
            return None
        batch = Batch(self._name, backlog.topic.kafka_topic_id, planned.batches[0].ranges)
        self._is_all_planned = len(mine) == len(of_lane) and len(batch) == _left(mine)
        return batch

    def _size_for(self, backlogs: Sequence[PartitionBacklog]) -> int:
        left = _left(backlogs)
        return max(1, min(left, self._most)) if left <= (1 + _REST) * self._size else self._size

    def _as_left(self, backlog: PartitionBacklog) -> PartitionBacklog | None:
        """A partition as this lane sees it; None while a batch of it is ahead that may fail."""
        ahead = tuple(r for batch, _ in self._ahead for r in batch.ranges if r.partition == backlog.partition)
        failed = tuple(f for f in self._failed if f[0].partition == backlog.partition)
        if ahead and (backlog.gap or failed):
            return None
        # What comes later is left alone, as if another run had it.
        end = min(self._ends.get(backlog.partition, 0), backlog.end)
        later = OffsetRange(backlog.partition, end, backlog.end)
        return replace(backlog, in_flight=(*ahead, later), failed=failed)

    def _commit(self, batch: Batch) -> None:
        self.behind.update(batch.partitions)
        try:
            self._pipeline.commit(batch)
        except UnavailableError as error:
            # The next batch's commit, or the topic's at the end, makes up for it.
            log.warning("offsets of batch %s are not committed yet: %s", batch, error)
        else:
            self.behind.difference_update(batch.partitions)

    def _note(self, batch: Batch, error: SensorPipelineError) -> None:
        self._is_all_planned = False
        self._failed += [(r, datetime.now(UTC)) for r in batch.ranges]
        tries = Counter(r.partition for r, _ in self._failed)[batch.ranges[0].partition]
        if len(batch.ranges) == 1 and (isinstance(error, DataError) or tries > TRIES):
            self._given_up[batch.ranges[0].partition] = str(error)
        elif isinstance(error, UnavailableError) and not self._stopped:
            self._sleep(pause(tries).total_seconds())


def _left(backlogs: Sequence[PartitionBacklog]) -> int:
    """How many offsets are still to be planned."""
    return sum(total(subtract(b.unread, b.in_flight)) for b in backlogs)
