"""One batch in one transaction: all of it or nothing, and what it holds adds up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pandas as pd
import pytest
import sqlalchemy as sa

from sensor_pipeline.drained import Drained
from sensor_pipeline.errors import ConservationError, DataError, SensorPipelineError, UnavailableError
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.postgres import days, ledger
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect, stored
from sensor_pipeline_tests.postgres.tables import (
    batch_of,
    counts,
    dated,
    every_row,
    ingest_once,
    other_session,
    want,
    write_once,
)
from sensor_pipeline_tests.test_any_history import Log, message


def log_of(settings: Settings, *, machines: int = 3, seconds: int = 20, topic: str = "readings") -> Log:
    """A topic of two partitions with readings in order, failing now and then, and a poison message in each."""
    log = Log(settings, topic, f"{topic}-id")
    for second in range(seconds):
        for machine in range(machines):
            log.publish((second + machine) % 2, message(f"m{machine}", second, (second + machine) % 7 < 2))
    for partition in (0, 1):
        log.publish(partition, b"poison", bad="not_json")
    return log


def drained_of(log: Log) -> Drained:
    return log.drain(list(batch_of(log).ranges))


# What does not add up is not written


def lacks_a_reading(drained: Drained) -> Drained:
    return replace(drained, readings=drained.readings.drop(index=[7]).reset_index(drop=True))


def has_a_reading_twice(drained: Drained) -> Drained:
    readings = drained.readings
    return replace(drained, readings=pd.concat([readings, readings.iloc[[7]]], ignore_index=True))


def has_one_reading_twice_and_lacks_another(drained: Drained) -> Drained:
    return has_a_reading_twice(replace(drained, readings=drained.readings.drop(index=[3]).reset_index(drop=True)))


def has_one_twice_and_lacks_one_of_another_partition(drained: Drained) -> Drained:
    readings = drained.readings
    first = readings.index[readings["partition"] == 0][0]
    other = readings.index[readings["partition"] == 1][0]
    changed = pd.concat([readings.drop(index=[first]), readings.loc[[other]]], ignore_index=True)
    return replace(drained, readings=changed)


def lacks_a_rejected_message(drained: Drained) -> Drained:
    return replace(drained, rejected=drained.rejected[1:])


def has_a_rejected_message_twice(drained: Drained) -> Drained:
    return replace(drained, rejected=(*drained.rejected, drained.rejected[0]))


def has_a_reading_that_is_rejected_too(drained: Drained) -> Drained:
    reading = drained.readings.iloc[0]
    place = {"partition": int(reading["partition"]), "offset": int(reading["offset"])}
    return replace(drained, rejected=(*drained.rejected, replace(drained.rejected[0], **place)))


def says_that_a_record_is_none(drained: Drained) -> Drained:
    return replace(drained, no_record=(OffsetRange(0, 3, 4),))


def says_that_a_record_is_none_and_lacks_another(drained: Drained) -> Drained:
    return lacks_a_reading(says_that_a_record_is_none(drained))


def has_nothing(drained: Drained) -> Drained:
    return Drained(drained.readings.iloc[:0], (), ())


DAMAGES = [
    lacks_a_reading,
    has_a_reading_twice,
    has_one_reading_twice_and_lacks_another,
    has_one_twice_and_lacks_one_of_another_partition,
    lacks_a_rejected_message,
    has_a_rejected_message_twice,
    has_a_reading_that_is_rejected_too,
    says_that_a_record_is_none,
    says_that_a_record_is_none_and_lacks_another,
    has_nothing,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_batch_that_does_not_add_up_writes_nothing(
    database_settings: Settings, damage: Callable[[Drained], Drained]
) -> None:
    log = log_of(database_settings)
    days.ensure_days(Database(database_settings), {date(2026, 1, 31), date(2026, 2, 1)})
    drained = drained_of(log)
    before = every_row(database_settings)
    with pytest.raises(DataError) as caught:
        write_once(database_settings, batch_of(log), damage(drained))
    assert "\n" not in str(caught.value)
    assert every_row(database_settings) == before
    assert ingest_once(database_settings, log).already_ingested == 0
    assert stored(database_settings) == want(log)


def test_a_batch_that_does_not_add_up_is_named_with_all_its_terms(database_settings: Settings) -> None:
    log = log_of(database_settings)
    with pytest.raises(ConservationError, match=r"readings 0:0-31 1:0-31 .*62 offsets.* 59 inserted .* 2 rejected"):
        write_once(database_settings, batch_of(log), lacks_a_reading(drained_of(log)))


def test_a_drained_reading_outside_of_the_batch_is_not_written(database_settings: Settings) -> None:
    log = log_of(database_settings)
    batch = batch_of(log, OffsetRange(0, 5, 10), OffsetRange(1, 2, 7))
    written = write_once(database_settings, batch, drained_of(log))
    assert (written.inserted, written.rejected) == (10, 0)
    assert {place[1:] for place in stored(database_settings).readings} == {
        *((0, offset) for offset in range(5, 10)),
        *((1, offset) for offset in range(2, 7)),
    }


def test_offsets_without_a_record_count_once_where_the_ledger_held_some_of_them(database_settings: Settings) -> None:
    log = Log(database_settings, "t", "t-id")
    empty = log.drain([])
    first = Batch("t", "t-id", (OffsetRange(0, 0, 6),))
    assert write_once(database_settings, first, replace(empty, no_record=(OffsetRange(0, 0, 6),))).no_record == 6
    second = Batch("t", "t-id", (OffsetRange(0, 4, 10),))
    written = write_once(database_settings, second, replace(empty, no_record=(OffsetRange(0, 4, 10),)))
    assert (written.no_record, written.already_ingested) == (4, 2)
    assert totals(database_settings) == {0: (10, 0, 0, 10, 0)}


def totals(settings: Settings) -> dict[int, tuple[int, ...]]:
    """By partition: offsets in the ledger, and the running totals."""
    with connect(settings).connect() as connection:
        rows = connection.execute(
            sa.text("""
                SELECT kafka_partition, (SELECT sum(upper(r) - lower(r)) FROM unnest(offsets) r)::bigint,
                       readings, rejected, no_record, lost
                FROM ingested_offsets
            """)
        ).all()
    return {partition: tuple(rest) for partition, *rest in rows}


def test_the_ledgers_totals_add_up_to_its_offsets_in_every_partition(database_settings: Settings) -> None:
    log = log_of(database_settings)
    ingest_once(database_settings, log, OffsetRange(0, 4, 9), OffsetRange(1, 3, 4))
    ingest_once(database_settings, log, OffsetRange(0, 0, 20))
    ingest_once(database_settings, log)
    assert totals(database_settings) == {0: (31, 30, 1, 0, 0), 1: (31, 30, 1, 0, 0)}


# Ingested before


def test_a_batch_that_is_already_ingested_writes_no_row_at_all(database_settings: Settings) -> None:
    log = log_of(database_settings)
    ingest_once(database_settings, log)
    before = every_row(database_settings)
    again = ingest_once(database_settings, log)
    assert (again.batch_id, again.inserted, again.rejected, again.no_record) == (None, 0, 0, 0)
    assert again.already_ingested == len(batch_of(log))
    nothing_drained = write_once(database_settings, batch_of(log), log.drain([]))
    assert nothing_drained == again
    part = ingest_once(database_settings, log, OffsetRange(1, 3, 9))
    assert part.already_ingested == 6
    assert every_row(database_settings) == before


def test_of_a_batch_that_is_partly_ingested_only_the_rest_is_written(database_settings: Settings) -> None:
    log = log_of(database_settings)
    ingest_once(database_settings, log, OffsetRange(0, 10, 20), OffsetRange(1, 0, 5))
    held = {table: set(rows) for table, rows in every_row(database_settings).items() if table.startswith("readings_")}
    written = ingest_once(database_settings, log)
    assert (written.already_ingested, written.inserted, written.rejected) == (15, 45, 2)
    after = every_row(database_settings)
    for table, rows in held.items():
        assert {row[0] for row in rows} <= {row[0] for row in after[table]}
    assert stored(database_settings) == want(log)


def test_the_second_half_of_a_batch_goes_on_where_the_first_ended(database_settings: Settings) -> None:
    """All of it comes after what is stored, so that nothing stored is read again."""
    log = log_of(database_settings)
    ingest_once(database_settings, log, OffsetRange(0, 0, 12), OffsetRange(1, 0, 12))
    assert any(end is None for end, _ in stored(database_settings).failures.values())
    assert ingest_once(database_settings, log).already_ingested == 24
    assert stored(database_settings) == want(log)


def test_the_batch_log_has_a_row_for_each_batch_that_wrote_something(database_settings: Settings) -> None:
    log = log_of(database_settings)
    ingest_once(database_settings, log, OffsetRange(0, 0, 10))
    ingest_once(database_settings, log, OffsetRange(0, 0, 10))
    ingest_once(database_settings, log)
    with connect(database_settings).connect() as connection:
        rows = connection.execute(
            sa.text("SELECT ranges, drained, inserted, already_ingested, rejected, no_record FROM batches ORDER BY id")
        ).all()
    assert [tuple(row) for row in rows] == [
        ([{"partition": 0, "start": 0, "end": 10}], 10, 10, 0, 0, 0),
        ([{"partition": 0, "start": 0, "end": 31}, {"partition": 1, "start": 0, "end": 31}], 52, 50, 10, 2, 0),
    ]


# Poison


def test_a_batch_of_nothing_but_poison_is_ingested(database_settings: Settings) -> None:
    log = Log(database_settings, "t", "t-id")
    for payload, bad in ((b"x", "not_json"), (None, "tombstone"), (b"", "not_json"), (b"\xff\x00", "not_utf8")):
        log.publish(0, payload, bad=bad)
    written = ingest_once(database_settings, log)
    assert (written.inserted, written.rejected, counts(database_settings)["machines"]) == (0, 4, 0)
    assert written.rejected_by_reason == {"not_json": 2, "not_utf8": 1, "tombstone": 1}
    assert stored(database_settings) == want(log)
    assert totals(database_settings) == {0: (4, 0, 4, 0, 0)}


def test_ten_thousand_poison_messages_take_no_good_one_with_them(database_settings: Settings) -> None:
    log = Log(database_settings, "t", "t-id")
    for number in range(10_000):
        log.publish(number % 3, f"poison {number}".encode(), bad="not_json")
        if number % 10 == 0:
            log.publish(number % 3, message(f"m{number % 7}", number // 10, number % 50 == 0))
    written = ingest_once(database_settings, log)
    assert (written.inserted, written.rejected) == (1_000, 10_000)
    assert stored(database_settings) == want(log)


def test_keys_and_headers_of_any_bytes_are_kept_with_a_rejected_message(database_settings: Settings) -> None:
    log = Log(database_settings, "t", "t-id")
    for payload in (b"\x00\xff", None, b""):
        log.publish(0, payload, bad="")
    drained = log.drain([OffsetRange(0, 0, 3)])
    headers = [
        ("text", "caf\u00e9 \U0001f529".encode()),
        ("text", b"again"),
        ("bytes", b"\xff\x00"),
        ("nul", b"a\x00b"),
        ("nothing", None),
        ("", b""),
        ("n\x00ul", b'quote " backslash \\'),
    ]
    keys = (b"\x00\xff'\\", None, b"")
    rejected = tuple(replace(m, key=key, headers=headers) for m, key in zip(drained.rejected, keys, strict=True))
    write_once(database_settings, batch_of(log), replace(drained, rejected=rejected))
    with connect(database_settings).connect() as connection:
        query = "SELECT key, payload, headers, first_seen FROM rejected_messages ORDER BY kafka_offset"
        rows = connection.execute(sa.text(query)).all()
    assert [None if row.key is None else bytes(row.key) for row in rows] == list(keys)
    assert [None if row.payload is None else bytes(row.payload) for row in rows] == [b"\x00\xff", None, b""]
    assert rows[0].headers == [
        {"key": "text", "value": "caf\u00e9 \U0001f529"},
        {"key": "text", "value": "again"},
        {"key": "bytes", "value_base64": "/wA="},
        {"key": "nul", "value_base64": "YQBi"},
        {"key": "nothing", "value": None},
        {"key": "", "value": ""},
        {"key_base64": "bgB1bA==", "value": 'quote " backslash \\'},
    ]


def test_no_statement_carries_more_than_a_few_megabytes_of_rejected_messages(database_settings: Settings) -> None:
    """PostgreSQL takes no statement over 1 GB, and bytes are sent as twice as many digits."""
    log = Log(database_settings, "t", "t-id")
    for number in range(300):
        log.publish(0, b"%d" % number + b"\x00" * 100_000, bad="not_json")
    log.publish(0, b"\xff" * 20_000_000, bad="too_large")
    sent: list[int] = []

    def note(*arguments: Any) -> None:
        query = arguments[1].query
        sent.append(len(query) if query else 0)

    sa.event.listen(sa.Engine, "after_cursor_execute", note)
    try:
        written = ingest_once(database_settings, log)
    finally:
        sa.event.remove(sa.Engine, "after_cursor_execute", note)
    assert written.rejected == 301
    alone = 2 * 20_000_000 + 1_000_000
    assert max(sent) < alone
    assert sorted(sent)[-2] < 32_000_000
    assert stored(database_settings).rejected == want(log).rejected


# Days


def test_a_batch_on_four_hundred_days_makes_those_from_the_horizon_on(database_settings: Settings) -> None:
    with connect(database_settings).connect() as connection:
        horizon: date = connection.scalars(sa.text("SELECT horizon FROM readings_horizon")).one()
    wanted = [horizon + timedelta(days=number) for number in range(-250, 150)] + [date(1, 1, 1), date(9999, 12, 31)]
    log = Log(database_settings, "t", "t-id")
    for number, day in enumerate(wanted):
        noon = datetime(day.year, day.month, day.day, 12)
        for moment in (noon.replace(hour=0), noon.replace(hour=23, minute=59, second=59, microsecond=999_999)):
            log.publish(number % 4, dated("m1", moment, number % 3 == 0))
    assert ingest_once(database_settings, log).inserted == 2 * len(wanted)
    assert stored(database_settings) == want(log)
    with connect(database_settings).connect() as connection:
        rows = connection.execute(
            sa.text(
                """SELECT DISTINCT tableoid::regclass::text, ("timestamp" AT TIME ZONE 'UTC')::date FROM readings"""
            )
        ).all()
    assert {(table, day) for table, day in rows} == {
        (f"readings_{day.isoformat().replace('-', '')}" if day >= horizon else "readings_before_horizon", day)
        for day in wanted
    }
    assert {table for table in counts(database_settings) if table.startswith("readings_2")} == {
        f"readings_{day.isoformat().replace('-', '')}" for day in wanted[250:400]
    }


TOMORROW = datetime.now(UTC).date() + timedelta(days=1)


def tomorrow_log(settings: Settings) -> Log:
    log = Log(settings, "t", "t-id")
    log.publish(0, dated("m1", datetime(TOMORROW.year, TOMORROW.month, TOMORROW.day, 12), True))
    return log


def test_a_new_day_is_attached_while_somebody_reads_and_writes(database_settings: Settings) -> None:
    log = tomorrow_log(database_settings)
    reading = "SELECT count(*) FROM readings"
    writing = """
        INSERT INTO readings (machine_id, "timestamp", kafka_offset, kafka_partition, topic_id, has_failure, "values")
        VALUES (1, '2000-01-01', 0, 0, 1, false, '{}')
    """
    with other_session(database_settings, reading), other_session(database_settings, writing):
        assert ingest_once(database_settings, log).inserted == 1
    assert stored(database_settings) == want(log)


def test_a_new_day_that_has_to_wait_too_long_fails_the_batch_to_be_tried_again(
    database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(days, "_LOCK_TIMEOUT", sa.text("SET LOCAL lock_timeout = '10ms'"))
    log = tomorrow_log(database_settings)
    before = every_row(database_settings)
    with other_session(database_settings, "LOCK TABLE readings IN SHARE MODE") as blocker:
        with pytest.raises(UnavailableError, match="55P03"):
            ingest_once(database_settings, log)
        assert every_row(database_settings) == before
        log.pipeline._sleep = lambda seconds: blocker.rollback()
        log.ingest(list(batch_of(log).ranges))
    assert stored(database_settings) == want(log)


def test_a_day_that_somebody_else_makes_meanwhile_is_made_once(database_settings: Settings) -> None:
    log = tomorrow_log(database_settings)
    database = Database(database_settings)
    assert days.ensure_days(database, [TOMORROW, TOMORROW]) == [TOMORROW]
    assert days.ensure_days(database, [TOMORROW]) == []
    ingest_once(database_settings, log)
    assert stored(database_settings) == want(log)


def test_a_partition_made_for_a_day_is_like_the_others(database_settings: Settings) -> None:
    days.ensure_days(Database(database_settings), [TOMORROW])
    name = f"readings_{TOMORROW.isoformat().replace('-', '')}"
    with connect(database_settings).connect() as connection:
        indexes, checks = (
            connection.scalars(sa.text(query), {"names": ["readings_before_horizon", name]}).all()
            for query in (
                """SELECT regexp_replace(indexdef, '^.* USING', '') FROM pg_indexes WHERE tablename = ANY (:names)""",
                """SELECT pg_get_constraintdef(oid) FROM pg_constraint
                   WHERE conrelid::regclass::text = ANY (:names) AND contype = 'c'""",
            )
        )
    assert len(indexes) == len(checks) == 2
    assert len(set(indexes)) == len(set(checks)) == 1


# Ties


@pytest.mark.parametrize("first_topic_fails", [True, False])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_readings_at_one_time_the_topics_name_decides(
    database_settings: Settings, first_topic_fails: bool, order: tuple[int, int]
) -> None:
    # The name decides before the Kafka topic id, and neither does the order in which topics became known.
    logs = [Log(database_settings, "b", "1"), Log(database_settings, "a", "2")]
    by_name = {log.topic: log for log in logs}
    by_name["a"].publish(1, message("m", 0, first_topic_fails))
    by_name["b"].publish(0, message("m", 0, not first_topic_fails))
    for place in order:
        ingest_once(database_settings, logs[place])
    rows = stored(database_settings)
    assert rows == want(*logs)
    (end,) = [end for end, _ in rows.failures.values()]
    assert (end is not None) == first_topic_fails


def test_a_topic_that_becomes_known_later_may_come_before_the_others(database_settings: Settings) -> None:
    late = Log(database_settings, "b", "1")
    late.publish(0, message("m", 0, False))
    late.publish(0, message("m", 1, True))
    ingest_once(database_settings, late)
    early = Log(database_settings, "a", "2")
    early.publish(0, message("m", 0, True))
    early.publish(0, message("m", 1, False))
    ingest_once(database_settings, early)
    assert stored(database_settings) == want(early, late)


def test_a_topic_that_the_ledger_lost_since_the_drain_fails_the_batch_with_a_word(database_settings: Settings) -> None:
    """As after a server was restarted into an older backup."""
    log = log_of(database_settings)
    drained = drained_of(log)
    with Database(database_settings).begin() as connection:
        assert ledger.find_topic(connection, log.topic_id)
        connection.execute(sa.text("DELETE FROM topics"))
    with pytest.raises(SensorPipelineError, match="readings"):
        write_once(database_settings, batch_of(log), drained)


# Many days


def test_a_late_reading_locks_the_days_that_it_can_touch_and_not_every_day_there_is(
    database_settings: Settings,
) -> None:
    """A lock for each day and index would use up PostgreSQL's table of locks after a few years, and stop everything."""
    days.ensure_days(Database(database_settings), [TOMORROW + timedelta(days=number) for number in range(60)])
    start = datetime(TOMORROW.year, TOMORROW.month, TOMORROW.day) + timedelta(days=30)
    log = Log(database_settings, "t", "t-id")
    for second in (0, 1, 2, 3, 7, 8, 9):
        log.publish(0, dated("m", start + timedelta(seconds=second), second in (1, 2, 3, 8)))
    # One splits, one extends, one starts something.
    for half, failing in ((3, False), (5, True), (15, True), (19, False)):
        log.publish(0, dated("m", start + timedelta(seconds=half / 2), failing))
    ingest_once(database_settings, log, OffsetRange(0, 0, 7))
    seen: list[int] = []

    def count(connection: sa.Connection, *arguments: Any) -> None:
        query = (
            "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND relation::regclass::text ~ '^readings_2'"
        )
        cursor = connection.connection.cursor()
        cursor.execute(query)
        seen.append(cursor.fetchone()[0])

    sa.event.listen(sa.Engine, "commit", count)
    try:
        ingest_once(database_settings, log)
    finally:
        sa.event.remove(sa.Engine, "commit", count)
    assert stored(database_settings) == want(log)
    assert 0 < max(seen) < 12


def test_no_stored_reading_is_read_for_machines_that_are_new_or_whose_readings_come_in_order(
    database_settings: Settings,
) -> None:
    log = Log(database_settings, "t", "t-id")
    for second in range(40):
        log.publish(0, message(f"m{second % 3}", second, second % 7 < 3))
    late = len(log.partitions[0])
    log.publish(0, message("m0", 5, True))
    statements: list[str] = []

    def note(connection: sa.Connection, cursor: object, statement: str, *arguments: Any) -> None:
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        for start, end in ((0, 20), (20, late)):
            ingest_once(database_settings, log, OffsetRange(0, start, end))
            assert not [statement for statement in statements if "FROM readings " in statement]
        ingest_once(database_settings, log)
        assert [statement for statement in statements if "FROM readings " in statement]
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert stored(database_settings) == want(log)


@pytest.mark.parametrize(("set_on_the_server", "limit"), [("0", "5min"), ("2h", "2h"), ("20s", "20s")])
def test_a_session_may_stand_still_for_five_minutes_or_as_long_as_the_server_says(
    database_settings: Settings, administer: Callable[[str], None], set_on_the_server: str, limit: str
) -> None:
    name = database_settings.postgres_db
    administer(f"ALTER DATABASE {name} SET idle_in_transaction_session_timeout = '{set_on_the_server}'")
    log = Log(database_settings, "t", "t-id")
    log.publish(0, message("m", 1, True))
    seen: list[str] = []

    def look(connection: sa.Connection) -> None:
        cursor = connection.connection.cursor()
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        seen.append(cursor.fetchone()[0])

    sa.event.listen(sa.Engine, "commit", look)
    try:
        ingest_once(database_settings, log)
    finally:
        sa.event.remove(sa.Engine, "commit", look)
    assert seen[-1] == limit
