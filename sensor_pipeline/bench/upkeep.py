"""What it costs to keep the stack running: with nothing to ingest, after many runs, and after a month of them."""

from __future__ import annotations

import time
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
_DAY_ONE_RUNS = 300
_KEPT_DAYS = 14
_POLL_SECONDS = 5
_SIZE = "SELECT pg_database_size(current_database())"
_RUNS = "SELECT count(*) FROM runs"


def idle(site: Site, effort: Effort) -> list[Measured]:
    """CPU of `sensor-pipeline up` over ten minutes with nothing to ingest, and the batches that it launched."""
    with running_up(site, "idle", "--no-simulate") as up:
        effort.say("idle: settling")
        time.sleep(_SETTLING_SECONDS)
        before, runs, began = up.cpu_seconds(), up.ended_runs(), time.monotonic()
        effort.say(f"idle: looking on for {_IDLE_SECONDS} s")
        time.sleep(_IDLE_SECONDS)
        after, seconds, launched = up.cpu_seconds(), time.monotonic() - began, up.ended_runs() - runs
    shares = {part: 100 * (after[part] - before[part]) / seconds for part in sorted(after)}
    said = ", ".join(f"{part} {share:.2f} %" for part, share in shares.items())
    return [
        Measured("CPU with nothing to ingest", [sum(shares.values())], "% of a core", Bound(5, 3, False), said),
        Measured("batches launched with nothing to ingest", [launched], "batches", Bound(0, 0, at_least=False)),
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
    """The UI after a month at a run every 5 s, of which a fortnight is kept, against the first day's 300 runs."""
    with running_up(site, "month") as up:
        _await_runs(up, 20, effort)
        past.prepare(up)
        past.add(up, _DAY_ONE_RUNS * past.EVERY_SECONDS / 86_400, time.time(), effort.say)
        first_day = _seconds(up, effort)
        sizes = up.ask(_SIZE)[0][0], up.ask(_RUNS)[0][0]
        past.add(up, _KEPT_DAYS, time.time(), effort.say)
        after = _seconds(up, effort)
        size, runs = up.ask(_SIZE)[0][0] - sizes[0], up.ask(_RUNS)[0][0] - sizes[1]
    return [
        Measured(
            f"{page} after a month",
            [median(after[page]) / median(first_day[page])],
            "x",
            Bound(1.5, 1.0, at_least=False),
            f"{1000 * median(after[page]):,.0f} ms with {runs:,} runs more",
            f"{1000 * median(first_day[page]):,.0f} ms",
        )
        for page in questions.PAGES
    ] + [Measured("Dagster's database, by run", [size / runs / 1024], "kB", None, f"{size / 1e9:,.1f} GB")]


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
