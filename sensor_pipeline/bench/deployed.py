"""How the pipeline does under Dagster: its daemon, code server, default launcher, and the processes of its runs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from sensor_pipeline.bench import daemon
from sensor_pipeline.bench.measured import Bound, Measured, per_second
from sensor_pipeline.bench.processes import Ran, run
from sensor_pipeline.bench.rounds import Effort, bare_copy, check_result, prepare
from sensor_pipeline.bench.site import Site
from sensor_pipeline.bench.work import PARTITIONS, Work
from sensor_pipeline.kafka import Kafka
from sensor_pipeline.settings import Settings

_RATE = 1_000
# Until the first runs are over, it is not steady yet.
_SETTLING_SECONDS = 20
_POLL_SECONDS = 0.05


def through_daemon(site: Site, effort: Effort) -> list[Measured]:
    """A backlog of twice as much through Dagster's daemon, sensor and default launcher, with two lanes."""
    work = Work(2 * effort.readings)
    compared = Work(effort.readings)
    prepare(site, effort, work, compared=compared)
    copied: list[float] = []
    drained: list[float] = []
    for counts in effort.each_round("daemon"):
        base = bare_copy(site, compared) / compared.total
        with site.database() as fresh:
            settings = replace(fresh, kafka_topics=(site.topic(work),), lanes=2)
            site.settle()
            with daemon.running(site, settings) as ran:
                ran.await_offsets(work.total)
                seconds = ran.seconds()
            if not counts:
                check_result(site, work, settings)
        if counts:
            copied.append(base)
            drained.append(seconds / work.total)
    return [
        Measured(
            f"daemon, two lanes, {work.total:,} readings",
            [base / one for base, one in zip(copied, drained, strict=True)],
            "x",
            Bound(0.55, 0.70),
            per_second(1, drained),
            f"bare COPY {per_second(1, copied)}",
        )
    ]


def memory(site: Site, effort: Effort) -> list[Measured]:
    """The peak of a Dagster process that runs one batch, of 100,000 messages and of 250,000."""
    work = Work(max(250_000, effort.readings))
    prepare(site, effort, work)
    bounds = {100_000: Bound(450, 400, at_least=False), 250_000: Bound(600, 500, at_least=False)}
    peaks: dict[int, list[float]] = {size: [] for size in bounds}
    for counts in effort.each_round("memory"):
        for size in peaks:
            with site.database() as fresh:
                ran = _run_job(site, replace(fresh, kafka_topics=(site.topic(work),)), size)
            if counts:
                peaks[size].append(ran.peak_mb)
    return [
        Measured(f"memory of a run of {size:,} messages", peaks[size], "MB", bound) for size, bound in bounds.items()
    ]


def _run_job(site: Site, settings: Settings, size: int) -> Ran:
    topic = Kafka(settings).topic(settings.kafka_topics[0])
    ranges = [{"partition": p, "start": 0, "end": size // PARTITIONS} for p in range(PARTITIONS)]
    batch = {"topic": topic.name, "kafka_topic_id": topic.kafka_topic_id, "ranges": ranges}
    path = site.folder / "run.json"  # which is YAML too
    path.write_text(json.dumps({"resources": {"batch": {"config": batch}}}))
    module = "sensor_pipeline.orchestration.definitions"
    return run(["dagster", "job", "execute", "-m", module, "-j", "ingest_batch", "-c", str(path)], settings)


def steady(site: Site, effort: Effort) -> list[Measured]:
    """1,000 readings a second for ten minutes through the daemon: from a reading's event time to its visible row."""
    with site.database() as fresh, site.new_topic() as topic:
        settings = replace(fresh, kafka_topics=(topic,))
        with daemon.running(site, settings) as ran:
            visible: dict[int, float] = {}
            effort.say(f"steady: {_RATE:,} readings/s for {effort.steady_seconds} s")
            duration = _SETTLING_SECONDS + effort.steady_seconds
            arguments = ["sensor_pipeline", "simulate", "--machines", "50", "--rate", str(_RATE)]
            publisher = Thread(target=run, args=([*arguments, "--duration", str(duration)], settings))
            began = time.time()
            publisher.start()
            while publisher.is_alive() or ran.done() < duration * _RATE:
                _note_visible(site, settings, visible)
            _note_visible(site, settings, visible)
            launches = ran.launch_seconds()
        delays = _delays(site, settings, visible, began + _SETTLING_SECONDS)
    return [
        Measured(
            f"event to visible row at {_RATE:,} readings/s, p{percent}",
            [float(np.percentile(delays, percent))],
            "s",
            Bound(limit, aim, at_least=False),
            f"{len(delays):,} readings in {len(visible)} batches",
        )
        for percent, limit, aim in ((50, 8, 6), (95, 13, 10))
    ] + [Measured("from launch to first op", launches, "s", Bound(2.0, 2.0, at_least=False))]


def _note_visible(site: Site, settings: Settings, visible: dict[int, float]) -> None:
    """For some seconds: when each new batch can be seen by another session."""
    with site.connection(settings) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for _ in range(round(5 / _POLL_SECONDS)):
            cursor.execute("SELECT id FROM batches WHERE id > %s", (max(visible, default=0),))
            now = time.time()
            visible |= {row[0]: now for row in cursor}
            time.sleep(_POLL_SECONDS)


def _delays(site: Site, settings: Settings, visible: dict[int, float], since: float) -> NDArray[np.float64]:
    """Seconds from each reading's timestamp, from `since` on, to when its batch was seen."""
    with site.connection(settings) as connection, connection.cursor() as cursor:
        cursor.execute("""
            SELECT b.id, extract(epoch FROM r."timestamp")
            FROM batches b CROSS JOIN LATERAL jsonb_array_elements(b.ranges) AS range
            JOIN readings r ON r.kafka_partition = (range ->> 'partition')::integer
                AND r.kafka_offset >= (range ->> 'start')::bigint AND r.kafka_offset < (range ->> 'end')::bigint
        """)
        found = [(visible[batch], float(moment)) for batch, moment in cursor]
    seen, moments = np.array(found, np.float64).T
    delays: NDArray[np.float64] = (seen - moments)[moments >= since]
    return delays
