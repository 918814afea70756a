"""The figures by name: each a function that measures some lines of the table on a site.

Every round of a figure runs the reference, or what it is compared with, right before the pipeline, on a database of its
own each; the first round is not counted. Where it has all of a work in one database, it is compared with the naive
result, and a difference ends the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sensor_pipeline.bench import costs, deployed, throughput, upkeep
from sensor_pipeline.bench.measured import Measured
from sensor_pipeline.bench.rounds import Effort
from sensor_pipeline.bench.site import Site

FIGURES: dict[str, Callable[[Site, Effort], Sequence[Measured]]] = {
    "throughput": throughput.throughput,
    "one-by-one": throughput.one_by_one,
    "sizes": throughput.sizes,
    "daemon": deployed.through_daemon,
    "memory": deployed.memory,
    "steady": deployed.steady,
    "late": costs.late,
    "failing": costs.failing,
    "machines": costs.machines,
    "table": costs.table,
    "batch-sizes": costs.batch_sizes,
    "idle": upkeep.idle,
    "resident": upkeep.resident,
    "month": upkeep.month,
}
# Of days and not of speed: measured where they are named.
NAMED_ONLY = ("idle", "resident", "month")
QUICK = ("throughput", "one-by-one")
