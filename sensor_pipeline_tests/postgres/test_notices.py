"""The outbox: what batches and `recompute` write to it, in the transaction that finds it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa

from sensor_pipeline.errors import DataError
from sensor_pipeline.notices import Kind, RunNotice
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.postgres import notices
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.recompute import recompute_machine
from sensor_pipeline.postgres.verify import find_machines
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import query
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.postgres.tables import batch_of, busy_history, dated, every_row
from sensor_pipeline_tests.soak import amount
from sensor_pipeline_tests.test_any_history import BASE, Log, message

Told = list[tuple[str, int, int | None]]
STARTED, ENDED, CORRECTED, WITHDRAWN = Kind.STARTED, Kind.ENDED, Kind.CORRECTED, Kind.WITHDRAWN


@pytest.fixture
def telling(database_settings: Settings) -> Settings:
    """Settings by which the tests' readings, of some months ago, are told."""
    return replace(database_settings, alert_max_age=timedelta(days=3650))


def seconds(moment: datetime | None) -> int | None:
    return None if moment is None else round((moment - BASE).total_seconds())


def told(settings: Settings, after: int = 0) -> Told:
    """(kind, start, end) of the notices after an id, in order, in seconds after BASE."""
    rows = query(settings, f"SELECT kind, start_time, end_time FROM notices WHERE id > {after} ORDER BY id")
    return [(kind, seconds(start) or 0, seconds(end)) for kind, start, end in rows]


def one_machine(settings: Settings, states: dict[int, bool]) -> Log:
    """A topic of one partition with a machine's readings, by second whether it fails; ingested."""
    log = Log(settings, "readings", "readings-id")
    more(log, states)
    return log


def more(log: Log, states: dict[int, bool]) -> Told:
    """Ingest more of the machine's readings in one batch; what was told for them."""
    start = len(log.partitions.get(0, []))
    settings = log.pipeline.settings
    (known,) = query(settings, "SELECT coalesce(max(id), 0) FROM notices")
    for second, failing in states.items():
        log.publish(0, message("m", second, failing))
    log.ingest([OffsetRange(0, start, start + len(states))])
    return told(settings, known[0])


def test_a_failure_is_told_as_it_starts_and_as_it_ends(telling: Settings) -> None:
    log = one_machine(telling, {0: False})
    assert more(log, {1: True, 2: True}) == [(STARTED, 1, None)]
    assert more(log, {3: True}) == []
    assert more(log, {4: False, 5: False}) == [(ENDED, 1, 4)]
    assert more(log, {6: False}) == []
    assert more(log, {7: True, 8: False, 9: True}) == [(STARTED, 7, 8), (ENDED, 7, 8), (STARTED, 9, None)]


def test_late_data_corrects_what_was_told(telling: Settings) -> None:
    log = one_machine(telling, {0: False, 10: True, 14: True, 20: False, 30: True})
    assert more(log, {8: True}) == [(CORRECTED, 8, 20)]
    assert more(log, {17: False}) == [(CORRECTED, 8, 17)]
    # In two: what comes after is a failure of its own.
    assert more(log, {12: False}) == [(CORRECTED, 8, 12), (STARTED, 14, 17), (ENDED, 14, 17)]
    assert more(log, {25: True}) == [(CORRECTED, 25, None)]
    assert more(log, {24: True, 40: False}) == [(CORRECTED, 24, 40), (ENDED, 24, 40)]
    assert more(log, {9: True, 35: False, 50: False}) == [(CORRECTED, 24, 35)]


def adds_up(settings: Settings) -> None:
    """What was told, one after the other, makes the failures that are stored, with their ids."""
    known: dict[int, tuple[Any, ...]] = {}
    rows = query(settings, "SELECT kind, failure_id, machine_id, start_time, end_time FROM notices ORDER BY id")
    for kind, failure_id, *failure in rows:
        assert (failure_id in known) == (kind != STARTED)
        if kind == WITHDRAWN:
            assert known.pop(failure_id) == tuple(failure)
        else:
            assert kind != ENDED or failure[-1] is not None
            known[failure_id] = tuple(failure)
    stored = query(settings, "SELECT id, machine_id, start_time, end_time FROM failures")
    assert known == {failure_id: tuple(failure) for failure_id, *failure in stored}


def test_what_batches_told_adds_up_to_the_stored_failures(telling: Settings) -> None:
    for seed in range(amount(4, 200)):
        log = busy_history(telling, seed=seed, readings=120)
        log = renamed(telling, log, f"topic-{seed}")
        random = Random(seed)
        for _ in range(8):
            p, messages = random.choice(list(log.partitions.items()))
            start = random.randrange(len(messages))
            log.ingest([OffsetRange(p, start, min(len(messages), start + random.randrange(1, 20)))])
            adds_up(telling)
        log.ingest(list(batch_of(log).ranges))
        adds_up(telling)


def renamed(settings: Settings, log: Log, name: str) -> Log:
    """The same messages under another topic, so that a database takes several histories."""
    other = Log(settings, name, f"{name}-id")
    for partition, messages in log.partitions.items():
        for published in messages:
            other.publish(partition, published.value, bad=published.bad)
    return other


def test_a_batch_that_is_rolled_back_tells_nothing(telling: Settings) -> None:
    log = one_machine(telling, {0: False})
    with connect(telling).begin() as connection:
        connection.execute(sa.text("ALTER TABLE batches ADD CONSTRAINT none CHECK (false) NOT VALID"))
    with pytest.raises(DataError):
        more(log, {1: True, 2: False})
    assert told(telling) == []
    with connect(telling).begin() as connection:
        connection.execute(sa.text("ALTER TABLE batches DROP CONSTRAINT none"))
    log.ingest([OffsetRange(0, 0, 3)])
    assert told(telling) == [(STARTED, 1, 2), (ENDED, 1, 2)]


def test_a_batch_run_again_tells_nothing_twice(telling: Settings) -> None:
    log = one_machine(telling, {0: False, 1: True, 2: False})
    before = every_row(telling)["notices"]
    log.ingest([OffsetRange(0, 0, 3)])
    assert every_row(telling)["notices"] == before
    assert len(before) == 2


def test_what_happened_long_ago_is_recorded_and_not_sent(database_settings: Settings) -> None:
    now = datetime.now(UTC)
    log = Log(database_settings, "readings", "readings-id")
    ago = {"old": timedelta(days=3), "new": timedelta(hours=3)}
    for machine, since in ago.items():
        log.publish(0, dated(machine, now - since, True))
        log.publish(0, dated(machine, now - since + timedelta(seconds=1), False))
    # It began long ago and has just ended.
    log.publish(0, dated("long", now - timedelta(days=3), True))
    log.publish(0, dated("long", now - timedelta(minutes=1), False))
    log.ingest([OffsetRange(0, 0, 6)])
    rows = query(
        database_settings,
        """
        SELECT m.machine_id, kind, outcome, closed_at IS NOT NULL FROM notices n JOIN machines m ON m.id = n.machine_id
        ORDER BY 1, n.id
        """,
    )
    assert [tuple(row) for row in rows] == [
        ("long", STARTED, "old", True),
        ("long", ENDED, None, False),
        ("new", STARTED, None, False),
        ("new", ENDED, None, False),
        ("old", STARTED, "old", True),
        ("old", ENDED, "old", True),
    ]
    with Database(database_settings).begin() as connection:
        assert notices.waiting(connection).undelivered == 3


def test_recompute_tells_what_it_mends(telling: Settings) -> None:
    one_machine(telling, {0: False, 1: True, 2: False, 3: True, 4: True, 5: False, 6: False, 7: True})
    damage = """
        UPDATE readings SET has_failure = false, failure_id = NULL WHERE kafka_offset = 1;
        UPDATE readings SET has_failure = true, failure_id = 2 WHERE kafka_offset = 5;
        UPDATE failures SET start_time = start_time + interval '30 s', last_failing_time = last_failing_time
            + interval '30 s' WHERE id = 3
    """
    with connect(telling).begin() as connection:
        connection.execute(sa.text(damage))
        (known,) = connection.execute(sa.text("SELECT max(id) FROM notices")).one()
    database = Database(telling)
    with database.begin() as connection:
        (machine,) = find_machines(connection)
    assert recompute_machine(database, machine, alert_max_age=telling.alert_max_age) is not None
    assert told(telling, known) == [(WITHDRAWN, 1, 2), (CORRECTED, 3, 6), (CORRECTED, 7, None)]
    assert recompute_machine(database, machine) is None
    assert len(told(telling, known)) == 3


# The pipeline's own


def add(
    settings: Settings, *, subject: str = "0@t DataError", ago: timedelta = timedelta(0), **more: timedelta
) -> bool:
    notice = RunNotice(Kind.BATCH_FAILED, subject, "said", datetime.now(UTC) - ago, {"run_id": "r"})
    ages = {"max_age": timedelta(days=1), "repeat": timedelta(hours=1)} | more
    with Database(settings).begin() as connection:
        return notices.add_run_notice(connection, notice, ages["max_age"], ages["repeat"])


def test_a_state_that_lasts_is_told_again_only_after_a_while(database_settings: Settings) -> None:
    assert add(database_settings)
    assert not add(database_settings)
    assert add(database_settings, subject="1@t DataError")
    assert add(database_settings, repeat=timedelta(0))
    assert len(query(database_settings, "SELECT FROM notices")) == 3


def test_a_run_that_failed_long_ago_is_recorded_and_keeps_nothing_from_being_told(database_settings: Settings) -> None:
    assert add(database_settings, ago=timedelta(days=2))
    assert add(database_settings)
    assert [row.outcome for row in query(database_settings, "SELECT outcome FROM notices ORDER BY id")] == ["old", None]


def test_of_delivered_notices_those_of_some_days_ago_are_deleted(database_settings: Settings) -> None:
    for subject in ("kept", "closed", "open"):
        add(database_settings, subject=subject)
    with Database(database_settings).begin() as connection:
        connection.execute(
            sa.text("UPDATE notices SET found_at = found_at - interval '8 days' WHERE subject <> 'kept'")
        )
        connection.execute(
            sa.text("UPDATE notices SET outcome = 'sent', closed_at = now() WHERE subject IN ('kept', 'closed')")
        )
        assert notices.delete_old(connection, timedelta(days=7), 100) == 1
    assert {row.subject for row in query(database_settings, "SELECT subject FROM notices")} == {"kept", "open"}
