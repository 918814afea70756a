"""Mends failures, and when a machine was first and last seen, from its readings, while ingestion goes on.

For each machine in two transactions: one that only looks, and, where something is wrong, one that locks the machine as
a batch does and mends the part of its history in which it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import pandas as pd
import sqlalchemy as sa

from sensor_pipeline.failures import NONE, keep_ids
from sensor_pipeline.notices import changes
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.failure_rows import failure_frame, store_failures
from sensor_pipeline.postgres.history import (
    SEEN_BY_READINGS,
    Span,
    Window,
    compare,
    find_episodes,
    point_readings,
    stored_failures,
    widen,
)
from sensor_pipeline.postgres.machines import lock
from sensor_pipeline.postgres.notices import add_changes
from sensor_pipeline.postgres.verify import EXAMPLES, SNAPSHOT, Machine, find_machines, look
from sensor_pipeline.settings import ALERT_MAX_AGE, check_order

_SETTINGS = sa.text("SET LOCAL jit = off")
_SEE = sa.text(f"""
    UPDATE machines SET first_seen = seen.first, last_seen = seen.last
    FROM (SELECT id, held.first, held.last FROM {SEEN_BY_READINGS} WHERE id = :machine) AS seen
    WHERE machines.id = seen.id AND (first_seen, last_seen) <> (seen.first, seen.last)
""")


@dataclass(frozen=True)
class Mended:
    """What was wrong with a machine, in words, and how many rows were written for it."""

    differences: list[str]
    failures_made: int = 0
    failures_changed: int = 0
    failures_removed: int = 0
    readings_moved: int = 0

    def examples(self) -> list[str]:
        """The first differences, and how many more there are."""
        more = len(self.differences[EXAMPLES:])
        return [*self.differences[:EXAMPLES], *([f"… and {more:,} more"] if more else [])]


@dataclass
class Total:
    """What was mended over several machines."""

    machines: int = 0
    machines_mended: int = 0
    failures_made: int = 0
    failures_changed: int = 0
    failures_removed: int = 0
    readings_moved: int = 0

    def add(self, mended: Mended | None) -> None:
        """Add one machine."""
        self.machines += 1
        if mended is None:
            return
        self.machines_mended += 1
        self.failures_made += mended.failures_made
        self.failures_changed += mended.failures_changed
        self.failures_removed += mended.failures_removed
        self.readings_moved += mended.readings_moved

    def sentence(self) -> str:
        """The total in one line."""
        return (
            f"{self.machines:,} machines looked at, {self.machines_mended:,} mended: {self.failures_made:,} failures "
            f"made, {self.failures_changed:,} changed, {self.failures_removed:,} removed, {self.readings_moved:,} "
            "readings moved"
        )


class Recompute:
    """Mends machines one by one; `total` grows with each.

    Args:
        database: to read and mend.
        names: of machines; none: all of them.
        since: with `until`, the time that a failure has to touch.
        until: see `since`.
        alert_max_age: notices of what is older are recorded and not sent.

    Raises:
        ConfigurationError: a name is no machine's, the time ends before it begins, or the schema is not this code's.
    """

    def __init__(
        self,
        database: Database,
        names: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        alert_max_age: timedelta = ALERT_MAX_AGE,
    ) -> None:
        check_order(since, until)
        self._database = database
        self._since, self._until = since, until
        self._alert_max_age = alert_max_age
        self.total = Total()
        with database.begin() as connection:
            database.check_schema(connection)
            self.machines = find_machines(connection, names)

    def run(self) -> Iterator[tuple[Machine, Mended | None]]:
        """Each machine, and what was mended of it."""
        for machine in self.machines:
            mended = recompute_machine(self._database, machine, self._since, self._until, self._alert_max_age)
            self.total.add(mended)
            yield machine, mended


def recompute_machine(
    database: Database,
    machine: Machine,
    since: datetime | None = None,
    until: datetime | None = None,
    alert_max_age: timedelta = ALERT_MAX_AGE,
) -> Mended | None:
    """Mend what is wrong with a machine's failures that touch some time (None: from its beginning, to its end).

    Ids are kept by the rule that batches follow, and so are notices; what lies further back than `alert_max_age` is
    told to nobody. Returns None where nothing was wrong.
    """
    with database.begin() as connection:
        connection.execute(SNAPSHOT)
        differences, seen = look(connection, machine, since, until)
    if not differences and not seen:
        return None
    with database.begin() as connection:
        connection.execute(_SETTINGS)
        lock(connection, [machine.id])
        said = [seen] if seen and connection.execute(_SEE, {"machine": machine.id}).rowcount else []
        if not differences:
            return Mended(said) if said else None
        ends = [difference.until for difference in differences]
        last = None if None in ends else max(end for end in ends if end is not None)
        # Anew, since a batch may have come in between.
        return _mend(connection, widen(connection, machine.id, differences[0].since, last), said, alert_max_age)


def _mend(connection: sa.Connection, window: Window, said: list[str], alert_max_age: timedelta) -> Mended:
    found, stored = find_episodes(connection, window), stored_failures(connection, window)
    # An id that is another machine's, or that of a failure before or after, is none of these failures'.
    shared = [(episode.number, failure_id) for episode in found for failure_id in episode.ids if failure_id in stored]
    kept = keep_ids(pd.DataFrame(shared, columns=["episode", "failure_id"], dtype="int64"))
    episodes = _frame(window, [(kept.get(episode.number, NONE), episode.span) for episode in found])
    vanished = sorted(stored.keys() - set(kept.values()))
    before = _frame(window, stored.items())
    written = store_failures(connection, episodes, before, vanished)
    add_changes(connection, changes(before, written.episodes, vanished), alert_max_age)
    ids = dict(zip((episode.number for episode in found), written.episodes["id"].tolist(), strict=True))
    return Mended(
        [*said, *(difference.text for difference in compare(found, stored))],
        failures_made=int(written.is_new.sum()),
        failures_changed=int(written.is_changed.sum()),
        failures_removed=len(vanished),
        readings_moved=point_readings(connection, window, ids),
    )


def _frame(window: Window, failures: Iterable[tuple[int, Span]]) -> pd.DataFrame:
    return failure_frame((i, window.machine, span.start, span.last, span.end) for i, span in failures)
