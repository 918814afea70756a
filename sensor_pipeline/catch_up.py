"""Batches one after the other in this process, until what was there at the start is ingested."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sensor_pipeline.backlog import TopicBacklog, read_backlog
from sensor_pipeline.batch import Pipeline
from sensor_pipeline.errors import DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.kafka import Topic
from sensor_pipeline.offsets import Batch, OffsetRange, lane_of, pause, plan
from sensor_pipeline.postgres.transaction import Written

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
            ends = {p.partition: p.end for p in backlog.partitions}
            lanes = range(self._pipeline.settings.lanes)
            with ThreadPoolExecutor(len(lanes), "lane") as pool:
                for found in pool.map(
                    lambda lane, name=backlog.topic.name, ends=ends: self._lane(name, ends, lane), lanes
                ):
                    problems += found
            self._mirror(backlog.topic)
        if problems:
            raise DataError("not all was ingested: " + "; ".join(problems))

    def _mirror(self, topic: Topic) -> None:
        """Where a process was killed between the two commits of a last batch, no other batch would mend the mirror."""
        anything = tuple(OffsetRange(partition, 0, 1) for partition in topic.partitions)
        self._pipeline.commit(Batch(topic.name, topic.kafka_topic_id, anything))

    def _lane(self, name: str, ends: Mapping[int, int], lane: int) -> list[str]:
        """Ingest one lane of a topic; returns what is wrong with the partitions given up."""
        failed: list[tuple[OffsetRange, datetime]] = []
        given_up: dict[int, str] = {}
        for batch in self._batches(name, ends, lane, failed, given_up):
            try:
                written = self._pipeline.run(batch)
            except (DataError, UnavailableError) as error:
                self._note(batch, error, failed, given_up)
            else:
                failed[:] = [f for f in failed if f[0].partition not in batch.partitions]
                self._on_batch(batch, written)
        return list(given_up.values())

    def _batches(
        self,
        name: str,
        ends: Mapping[int, int],
        lane: int,
        failed: Sequence[tuple[OffsetRange, datetime]],
        given_up: Mapping[int, str],
    ) -> Iterator[Batch]:
        p = self._pipeline
        while True:
            backlog = read_backlog(p.settings, p.kafka, p.database, name, register=True)
            partitions = [
                replace(
                    b,
                    # What comes later is left alone, as if another run had it.
                    in_flight=(OffsetRange(b.partition, min(ends.get(b.partition, 0), b.end), b.end),),
                    failed=tuple(f for f in failed if f[0].partition == b.partition),
                )
                for b in backlog.partitions
                if lane_of(b.partition, p.settings.lanes) == lane and b.partition not in given_up
            ]
            planned = plan(
                partitions,
                lanes=p.settings.lanes,
                batch_size=p.settings.batch_size,
                in_flight_limit=1,
                in_flight={},
                # Nothing else runs in this lane meanwhile, so that the pauses are made here (`_note`).
                now=datetime.now(UTC) + timedelta(days=1),
            )
            if not planned.batches:
                return
            yield Batch(name, backlog.topic.kafka_topic_id, planned.batches[0].ranges)

    def _note(
        self,
        batch: Batch,
        error: SensorPipelineError,
        failed: list[tuple[OffsetRange, datetime]],
        given_up: dict[int, str],
    ) -> None:
        failed += [(r, datetime.now(UTC)) for r in batch.ranges]
        tries = Counter(r.partition for r, _ in failed)[batch.ranges[0].partition]
        if len(batch.ranges) == 1 and (isinstance(error, DataError) or tries > TRIES):
            given_up[batch.ranges[0].partition] = str(error)
        elif isinstance(error, UnavailableError):
            self._sleep(pause(tries).total_seconds())
