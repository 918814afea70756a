"""The tags of runs: what people filter by, and those by which Dagster and the schedules tell them apart."""

from __future__ import annotations

from sensor_pipeline.offsets import Batch

# dagster.yaml limits the runs of a lane by this tag.
LANE = "lane"
TOPIC = "topic"
RANGES = "ranges"
MACHINES = "machines"
OUTCOME = "outcome"
# What there was for the job of a schedule to see when it was launched.
SEEN = "seen"
# Dagster's own: seconds after which a run is given up, in place of dagster.yaml's max_runtime_seconds.
MAX_RUNTIME = "dagster/max_runtime"

# A batch takes seconds, and dagster.yaml's max_runtime_seconds is made for that. Jobs with these tags may take hours,
# and hold up nothing that would have to be freed.
MAY_TAKE_HOURS = {MAX_RUNTIME: "86400"}

_CHARACTERS = 200


def of_batch(batch: Batch) -> dict[str, str]:
    """What a batch is."""
    ranges = " ".join(map(str, batch.ranges))
    return {TOPIC: batch.topic, RANGES: ranges if len(ranges) <= _CHARACTERS else ranges[:_CHARACTERS] + "…"}


def of_run(batch: Batch, outcome: str, machines: int) -> dict[str, str]:
    """What became of it; a run by hand has none of the sensor's tags, so that those of the batch are there too."""
    return of_batch(batch) | {OUTCOME: outcome, MACHINES: str(machines)}
