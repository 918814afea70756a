"""What the figures have in common: how much is measured, and the runs of which they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sensor_pipeline.bench import naive, reference
from sensor_pipeline.bench.processes import Ran, run
from sensor_pipeline.bench.site import Site
from sensor_pipeline.bench.work import Work
from sensor_pipeline.settings import Settings

_STAGES = """
    SELECT stage, sum(CAST(seconds AS double precision))
    FROM batches CROSS JOIN LATERAL jsonb_each_text(timings) AS spent (stage, seconds) GROUP BY stage
"""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        rounds: counted rounds of each figure.
        readings: in the backlog of a throughput figure; other figures take a fraction or a multiple of it.
        steady_seconds: for how long readings come in at a steady rate.
        say: told what is done now.
    """

    rounds: int
    readings: int
    steady_seconds: int
    say: Callable[[str], None]

    def each_round(self, title: str) -> Iterator[bool]:
        """Says each round; whether it counts."""
        for number in range(self.rounds + 1):
            self.say(f"{title}: round {number} of {self.rounds}" if number else f"{title}: warming up")
            yield number > 0


def prepare(site: Site, effort: Effort, *works: Work, compared: Work | None = None) -> None:
    """Publish works and write the rows of the reference, before anything is timed."""
    for work in works:
        effort.say(f"publishing {work.total:,} messages")
        site.topic(work)
    if compared:
        effort.say("writing the reference's rows")
        site.rows(compared)


def bare_copy(site: Site, work: Work) -> float:
    """Seconds of the reference."""
    rows = site.rows(work)
    with site.database(migrated=False) as settings, site.connection(settings) as connection:
        reference.make_plain_table(connection)
        site.settle()
        return reference.bare_copy(connection, rows)


def catch_up(site: Site, work: Work, *, lanes: int, check: bool = False) -> tuple[Ran, dict[str, float]]:
    """The command over all of the work, in a fresh database; and its batches' seconds by stage."""
    with site.database() as fresh:
        settings = replace(fresh, kafka_topics=(site.topic(work),), lanes=lanes)
        site.settle()
        ran = run(["sensor_pipeline", "catch-up"], settings)
        if check:
            check_result(site, work, settings)
        with site.connection(settings) as connection, connection.cursor() as cursor:
            cursor.execute(_STAGES)
            return ran, dict(cursor.fetchall())


def check_result(site: Site, work: Work, settings: Settings) -> None:
    """Make sure that the database holds what the work must become.

    Raises:
        DataError: it does not.
    """
    with site.connection(settings) as connection:
        naive.check(work, connection)
