"""What it costs to keep the stack running: with nothing to ingest, after many runs, and after a month of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from urllib.error import URLError

from sensor_pipeline.bench import past, questions
from sensor_pipeline.bench.measured import Bound, Measured
from sensor_pipeline.bench.rounds import Effort
from sensor_pipeline.bench.running import Up, running_up
from sensor_pipeline.bench.site import Site

_SETTLING_SECONDS = 120
_IDLE_SECONDS = 600
_EARLY_RUNS, _LATE_RUNS = 50, 500
_GROWING = ("daemon", "code server", "web server")
_KEPT_DAYS = 14
# What `keep_house` finds to delete: more than it does in one run.
_OLDER_DAYS = 0.5
_LOOKING_SECONDS = 120
_POLL_SECONDS = 5
_SIZE = "SELECT pg_database_size(current_database())"
_RUNS = "SELECT count(*), max(id) FROM runs"
_OF_THEM = "SELECT count(*) FROM runs WHERE id <= %s"
_RUN_SECONDS = "SELECT end_time - start_time FROM runs WHERE run_id = %s AND end_time IS NOT NULL"
_BATCH_SECONDS = """
    SELECT end_time - extract(epoch FROM create_timestamp) FROM runs
    WHERE pipeline_name = 'ingest_batch' AND status = 'SUCCESS'
    AND create_timestamp > to_timestamp(%s) AT TIME ZONE 'UTC'
"""


def idle(site: Site, effort: Effort) -> list[Measured]:
    """CPU of `sensor-pipeline up` over ten minutes with nothing to ingest, and the runs that it launched."""
    with running_up(site, "idle", "--no-simulate") as up:
        effort.say("idle: settling")
        time.sleep(_SETTLING_SECONDS)
        before, runs, began = up.cpu_seconds(), up.ask(_RUNS)[0][0], time.monotonic()
        effort.say(f"idle: looking on for {_IDLE_SECONDS} s")
        time.sleep(_IDLE_SECONDS)
        after, seconds, launched = up.cpu_seconds(), time.monotonic() - began, up.ask(_RUNS)[0][0] - runs
    shares = {part: 100 * (after[part] - before[part]) / seconds for part in sorted(after)}
    said = ", ".join(f"{part} {share:.2f} %" for part, share in shares.items())
    return [
        Measured("CPU with nothing to ingest", [sum(shares.values())], "% of a core", Bound(5, 3, False), said),
        Measured("runs launched with nothing to ingest", [launched], "runs", Bound(0, 0, at_least=False)),
    ]


def resident(site: Site, effort: Effort) -> list[Measured]:
    """Memory of the processes that live on, after 500 runs against after 50, while the runs page is open."""
    with running_up(site, "resident") as up:
        _await_runs(up, _EARLY_RUNS, effort)
        early = up.resident_mb(*_GROWING)
        _await_runs(up, _LATE_RUNS, effort)
        late = up.resident_mb(*_GROWING)
    return [
        Measured(
            f"memory of the {part} after {_LATE_RUNS} runs",
            [late[part] / early[part]],
            "x",
            Bound(1.1, 1.0, at_least=False),
            f"{late[part]:,.0f} MB",
            f"{early[part]:,.0f} MB after {_EARLY_RUNS} runs",
        )
        for part in _GROWING
    ]


def month(site: Site, effort: Effort) -> list[Measured]:
    """The UI and the batches after a month at a run every 5 s, of which a fortnight is kept, against the first day."""
    with running_up(site, "month") as up:
        _await_runs(up, 20, effort)
        past.prepare(up)
        past.add_runs(up, 1, time.time(), effort.say, ticks=True)
        first_day, working = _seconds(up, effort), _batch_seconds(up, effort)
        sizes = up.ask(_SIZE)[0][0], up.ask(_RUNS)[0][0]
        past.add_runs(up, _KEPT_DAYS + _OLDER_DAYS, time.time(), effort.say)
        size, runs = up.ask(_SIZE)[0][0] - sizes[0], up.ask(_RUNS)[0][0] - sizes[1]
        after, still_working = _seconds(up, effort), _batch_seconds(up, effort)
        deleted_a_second, while_deleting = _deleting(up, effort)
    return [
        *(_compared(page, after[page], first_day[page], f" with {runs:,} runs more") for page in questions.PAGES),
        _compared("a batch, from request to end,", still_working, working),
        _compared("a batch, while old runs are deleted,", while_deleting, working),
        Measured(
            "old runs deleted",
            [deleted_a_second],
            "runs/s",
            Bound(4, 14),
            f"{3600 / past.EVERY_SECONDS:,.0f} an hour come",
        ),
        Measured("Dagster's database, by run", [size / runs / 1024], "kB", None, f"{size / 1e9:,.1f} GB"),
    ]


def _compared(what: str, after: Sequence[float], first_day: Sequence[float], more: str = "") -> Measured:
    return Measured(
        f"{what} after a month",
        [median(after) / median(first_day)],
        "x",
        Bound(1.5, 1.0, at_least=False),
        f"{1000 * median(after):,.0f} ms{more}",
        f"{1000 * median(first_day):,.0f} ms",
    )


def _batch_seconds(up: Up, effort: Effort) -> list[float]:
    """From the request of a batch's run to its end, of those requested while one looks on."""
    effort.say(f"month: batches for {_LOOKING_SECONDS} s")
    began = time.time()
    time.sleep(_LOOKING_SECONDS)
    return [float(row[0]) for row in up.ask(_BATCH_SECONDS, [began])]


def _deleting(up: Up, effort: Effort) -> tuple[float, list[float]]:
    """How many old runs `keep_house` deletes a second, and how long batches take meanwhile."""
    effort.say("month: keep_house deletes old runs")
    began = time.time()
    there, last = up.ask(_RUNS)[0]
    run_id = questions.launch(up, "keep_house")
    while not (ended := up.ask(_RUN_SECONDS, [run_id])):
        time.sleep(_POLL_SECONDS)
    deleted = there - up.ask(_OF_THEM, [last])[0][0]
    while not (batches := up.ask(_BATCH_SECONDS, [began])):
        time.sleep(_POLL_SECONDS)
    return deleted / float(ended[0][0]), [float(row[0]) for row in batches]


def _await_runs(up: Up, runs: int, effort: Effort) -> None:
    """With a page of the UI open meanwhile, which asks every 5 s."""
    while (ended := up.ended_runs()) < runs:
        effort.say(f"{ended:,} of {runs:,} runs")
        try:
            questions.runs(up)
        except URLError:
            effort.say("the web server does not answer yet")
        time.sleep(_POLL_SECONDS)


def _seconds(up: Up, effort: Effort) -> dict[str, list[float]]:
    """How long each page's questions take, over rounds of which the first does not count."""
    taken: dict[str, list[float]] = {page: [] for page in questions.PAGES}
    for counts in effort.each_round("month: the UI"):
        for page, ask in questions.PAGES.items():
            began = time.perf_counter()
            ask(up)
            if counts:
                taken[page].append(time.perf_counter() - began)
    return taken
