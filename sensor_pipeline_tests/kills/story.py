"""A topic that grows by alike episodes, each of which makes a batch use every statement of the write."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.offsets import Batch
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import batch
from sensor_pipeline_tests.kafka.producing import Publisher, reading
from sensor_pipeline_tests.oracle import Published

_EPISODE_SECONDS = 100
# Healthy, failing twice, and a failure that is still active when the next episode comes.
_FLAGS = "..###..####....##"


class Story:
    """Publishes one episode after the other; `published` is what the oracle takes."""

    def __init__(self, settings: Settings) -> None:
        # A year of days without a partition lies in the future.
        self.settings = settings = replace(settings, max_future=timedelta(days=999))
        self._publisher = Publisher(settings)
        self._pipeline = Pipeline(settings)
        self._episode = 0

    @property
    def published(self) -> list[Published]:
        return list(self._publisher.published)

    def go_on(self) -> Batch:
        """Publish the next episode; returns its batch, of which the middle of one partition is ingested already."""
        starts = self._ends()
        self._publish(self._episode)
        self._episode += 1
        ends = self._ends()
        middle = starts[1] + 2
        self._pipeline.run(batch(self.settings, {1: (middle, middle + 2)}))
        return batch(self.settings, {p: (starts.get(p, 0), end) for p, end in ends.items()})

    def before(self, whole: Batch) -> list[Published]:
        """What is ingested before the batch is."""
        starts = {span.partition: span.start for span in whole.ranges}
        middle = starts[1] + 2
        return [
            message
            for message in self.published
            if message.offset < starts[message.partition]
            or (message.partition == 1 and middle <= message.offset < middle + 2)
        ]

    def _ends(self) -> dict[int, int]:
        ends = dict.fromkeys(range(4), 0)
        for message in self._publisher.published:
            ends[message.partition] = max(ends[message.partition], message.offset + 1)
        return ends

    def _publish(self, episode: int) -> None:
        now = episode * _EPISODE_SECONDS
        values = [
            reading(machine, now + second, failing=flag == "#")
            for second, flag in enumerate(_FLAGS)
            for machine in ("a", "b")
        ]
        if episode:
            late = now - _EPISODE_SECONDS
            # Of the episode before, a failure that lasted is split, one is made longer.
            values += [reading("a", late + 8.5), reading("b", late + 5, failing=True), reading("b", late + 0.5)]
        values.append(reading(f"new-{episode}", now, failing=True))
        for place, value in enumerate(values):
            self._publisher.send(place % 4, value)
        for partition in (0, 3):
            self._publisher.send(partition, b"poison", bad="not_json", key=b"key")
        self._publish_new_day(episode)

    def _publish_new_day(self, episode: int) -> None:
        """A reading on a day without a partition yet."""
        day = datetime.now(UTC) + timedelta(days=10 + episode)
        inner = {"readings": {}, "has_failure": False}
        value = {"machine_id": "tomorrow", "timestamp": day.isoformat(), "readings": inner}
        self._publisher.send(2, json.dumps(value).encode())
