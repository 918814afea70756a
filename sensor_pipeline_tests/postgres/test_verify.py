"""`verify` finds every kind of damage, and `recompute` mends what can be mended, by the commands that people type."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from sensor_pipeline.cli import main
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.postgres import verify
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.recompute import recompute_machine
from sensor_pipeline.postgres.verify import SNAPSHOT, find_machines, look
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect, failure_ids, stored
from sensor_pipeline_tests.orchestration.jobs import environment_of
from sensor_pipeline_tests.postgres.tables import (
    batch_of,
    busy_history,
    every_row,
    first_half,
    ingest_once,
    other_session,
    sessions,
    until,
    want,
)
from sensor_pipeline_tests.soak import amount
from sensor_pipeline_tests.test_any_history import BASE, Log, check_ids, message

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(database_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command on the test's database; its exit code and all that it said."""
    for name, value in environment_of(database_settings).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return run


def damage(settings: Settings, *statements: str) -> None:
    """What no pipeline does, past the checks that would stop it."""
    with connect(settings).begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def ingested(settings: Settings, readings: int = 240) -> Log:
    log = busy_history(settings, readings=readings)
    ingest_once(settings, log, *first_half(log))
    ingest_once(settings, log)
    return log


def test_a_sound_database_passes_every_check(database_settings: Settings, command: Command) -> None:
    ingested(database_settings)
    before = every_row(database_settings)
    code, said = command("verify")
    assert code == 0
    assert len(re.findall("^ok ", said, re.MULTILINE)) == len(verify.CHECKS) + 1
    assert "wrong" not in said
    assert command("recompute") == (
        0,
        "4 machines looked at, 0 mended: 0 failures made, 0 changed, 0 removed, 0 readings moved\n",
    )
    assert every_row(database_settings) == before


@pytest.mark.parametrize("name", ["verify", "recompute"])
def test_on_a_terminal_a_bar_shows_how_far_it_is(database_settings: Settings, name: str) -> None:
    ingested(database_settings)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sensor_pipeline", name],
        env={**os.environ, **environment_of(database_settings), "TERM": "xterm", "COLUMNS": "150"},
        stdout=theirs,
        stderr=subprocess.STDOUT,
    )
    os.close(theirs)
    said = b""
    # The end of a terminal whose program has ended is an error, on Linux.
    with suppress(OSError):
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    assert process.wait(60) == 0
    assert re.search(rb"failures by their readings .*100%", said)


def test_a_machine_without_a_reading_is_found_and_left_to_a_person(
    database_settings: Settings, command: Command
) -> None:
    ingested(database_settings)
    damage(database_settings, "INSERT INTO machines (machine_id, first_seen, last_seen) VALUES ('x', now(), now())")
    code, said = command("verify")
    assert code == 1
    assert "machine x: it has no reading" in said
    assert "0 mended" in command("recompute")[1]


def test_an_empty_database_passes_too(database_settings: Settings, command: Command) -> None:
    assert command("verify")[0] == 0
    assert command("recompute")[0] == 0


# Everything that can be off, by an example: what was done to the rows, and what is said of it.
LEDGER_DAMAGE = {
    "a batch counts one too many": (
        "UPDATE batches SET inserted = inserted + 1 WHERE id = 2",
        r"wrong   every logged batch adds up: 1 difference\n +batch 2: \d+ offsets in its ranges, but \d+ inserted",
    ),
    "a batch drained another number than it wrote": (
        "UPDATE batches SET drained = drained - 1 WHERE id = 1",
        r"batch 1: .* of \d+ drained",
    ),
    "the ledger forgot some offsets of a batch": (
        "UPDATE ingested_offsets SET offsets = offsets - int8multirange(int8range(3, 5)), readings = readings - 2 "
        "WHERE kafka_partition = 1",
        r"batch \d: offsets \[0, \d+\) of topic 1 partition 1 are not all in the ledger",
    ),
    "the ledger lost a partition": (
        "DELETE FROM ingested_offsets WHERE kafka_partition = 2",
        r"partition 2 are not all in the ledger(?s:.*)topic 1 partition 2: the ledger says 0, there are \d+",
    ),
    "a total does not fit the offsets": (
        "UPDATE ingested_offsets SET no_record = no_record + 1 WHERE kafka_partition = 0",
        r"topic 1 partition 0: \d+ offsets are done, but \d+ readings",
    ),
    "offsets are lost that nobody accepted": (
        "UPDATE ingested_offsets SET lost = lost + 2, readings = readings - 2 WHERE kafka_partition = 0",
        r"topic 1 partition 0: 2 offsets are lost by the ledger, 0 by the accepted gaps",
    ),
    "a gap was accepted outside of the ledger": (
        "INSERT INTO accepted_gaps (topic_id, kafka_partition, offsets, who, why) VALUES (1, 9, '[0,5)', 'me', 'x')",
        r"topic 1 partition 9: an accepted gap of a partition that is not in the ledger",
    ),
    "a gap was accepted of what was ingested": (
        "INSERT INTO accepted_gaps (topic_id, kafka_partition, offsets, who, why) VALUES (1, 0, '[0,1)', 'me', 'x')",
        r"topic 1 partition 0: 0 offsets are lost by the ledger, 1 by the accepted gaps"
        r"(?s:.*)topic 1 partition 0 offset 0: is not in the ledger, or was accepted as lost",
    ),
    "a rejected message is gone": (
        "DELETE FROM rejected_messages WHERE ctid = (SELECT min(ctid) FROM rejected_messages)",
        r"wrong   there are as many rejected messages as the ledger says: 1 difference",
    ),
    "a rejected message came from nowhere": (
        "INSERT INTO rejected_messages (topic_id, kafka_partition, kafka_offset, headers, reason, detail) "
        "VALUES (1, 0, 999999, '[]', 'not_json', '')",
        r"topic 1 partition 0 offset 999999: is not in the ledger",
    ),
    "a reading is gone": (
        "DELETE FROM readings WHERE kafka_partition = 3 AND NOT has_failure AND kafka_offset = "
        "(SELECT min(kafka_offset) FROM readings WHERE kafka_partition = 3 AND NOT has_failure)",
        r"topic 1 partition 3: the ledger says \d+, there are \d+",
    ),
    "a reading came from nowhere": (
        "UPDATE readings SET kafka_offset = 999999 WHERE id = (SELECT min(id) FROM readings)",
        r"topic 1 partition \d offset 999999: is not in the ledger",
    ),
    "a reading is there twice": (
        'INSERT INTO readings (machine_id, "timestamp", has_failure, failure_id, topic_id, kafka_partition, '
        'kafka_offset, "values") SELECT machine_id, "timestamp", has_failure, failure_id, topic_id, kafka_partition, '
        'kafka_offset, "values" FROM readings WHERE id = (SELECT min(id) FROM readings)',
        r"topic 1 partition \d offset \d+: stored 2 times",
    ),
    "a message is a reading and rejected": (
        "INSERT INTO rejected_messages (topic_id, kafka_partition, kafka_offset, headers, reason, detail) "
        "SELECT topic_id, kafka_partition, kafka_offset, '[]', 'not_json', '' FROM readings LIMIT 1",
        r"topic 1 partition \d offset \d+: stored 2 times",
    ),
    "a reading's machine is not there": (
        "UPDATE readings SET machine_id = 77 WHERE id = (SELECT min(id) FROM readings WHERE NOT has_failure)",
        r"topic 1 partition \d offset \d+: there is no machine 77",
    ),
    "a reading's topic is not there": (
        "UPDATE readings SET topic_id = 9 WHERE id = (SELECT min(id) FROM readings)",
        r"topic 9 partition \d offset \d+: there is no topic 9",
    ),
}


@pytest.mark.parametrize("name", LEDGER_DAMAGE)
def test_damage_to_the_ledger_or_to_readings_is_found_and_named(
    database_settings: Settings, command: Command, name: str
) -> None:
    statement, words = LEDGER_DAMAGE[name]
    ingested(database_settings)
    damage(database_settings, statement)
    code, said = command("verify")
    assert code == 1
    assert re.search(words, said), said
    assert "restore the database from a backup" in said


# The same for what can be made again from the readings. The constraints that forbid some of it were dropped before.
FREE = ("ALTER TABLE failures DROP CONSTRAINT failures_do_not_overlap",)
ANY = "(SELECT min(id) FROM failures WHERE end_time > last_failing_time)"
FAILURE_DAMAGE = {
    "a failure is gone": (f"DELETE FROM failures WHERE id = {ANY}", r"which is not stored for this machine and time"),
    "all failures are gone": ("DELETE FROM failures", r"which is not stored for this machine and time"),
    "a failure starts early": (
        f"UPDATE failures SET start_time = start_time - interval '1 day' WHERE id = {ANY}",
        r"failure \d+ is stored as: starts .*; by its readings it starts",
    ),
    "a failure ends late": (
        f"UPDATE failures SET end_time = end_time + interval '1 day' WHERE id = {ANY}",
        r"by its readings it",
    ),
    "a failure is said to go on": (
        f"UPDATE failures SET end_time = NULL, is_active = true WHERE id = {ANY}",
        r"is active; by its readings it .* ends",
    ),
    "the last failing time is wrong": (
        f"UPDATE failures SET last_failing_time = end_time WHERE id = {ANY}",
        r"by its readings it",
    ),
    "a failure that nothing shows": (
        "INSERT INTO failures (machine_id, start_time, last_failing_time, end_time, is_active) "
        "SELECT id, '2001-01-01', '2001-01-01', '2001-01-02', false FROM machines",
        r"failure \d+ is stored .starts 2001-01-01T00:00:00\+00:00, .* and no reading is in it",
    ),
    "a failure that nothing shows in the middle": (
        "INSERT INTO failures (machine_id, start_time, last_failing_time, end_time, is_active) "
        "SELECT machine_id, min(start_time), max(last_failing_time), max(end_time), false FROM failures "
        "WHERE NOT is_active GROUP BY 1",
        r"and no reading is in it",
    ),
    "a failure of another machine": (
        f"UPDATE failures SET machine_id = (SELECT max(id) FROM machines) WHERE id = {ANY}",
        r"which is not stored for this machine and time",
    ),
    "readings point to the wrong failure": (
        f"UPDATE readings SET failure_id = {ANY} WHERE has_failure",
        r"as those of another failure do",
    ),
    "one reading points to the wrong failure": (
        "UPDATE readings SET failure_id = (SELECT max(id) FROM failures) WHERE id = "
        "(SELECT min(id) FROM readings WHERE has_failure)",
        r"point to",
    ),
    "a reading points to a failure that never was": (
        "UPDATE readings SET failure_id = 987654321 WHERE id = (SELECT min(id) FROM readings WHERE has_failure)",
        r"there is no failure 987654321",
    ),
    "healthy where it failed": (
        "UPDATE readings SET has_failure = false, failure_id = NULL WHERE id = "
        "(SELECT min(id) FROM readings WHERE has_failure)",
        r"machine m\d: ",
    ),
    "a machine was seen too early": (
        "UPDATE machines SET first_seen = '2001-01-01', last_seen = 'now'",
        r"first_seen and last_seen are 2001-01-01T00:00:00\+00:00 and .*, and by its readings",
    ),
}


@pytest.mark.parametrize("name", FAILURE_DAMAGE)
def test_damage_to_failures_is_found_and_named_and_recompute_mends_it(
    database_settings: Settings, command: Command, name: str
) -> None:
    statement, words = FAILURE_DAMAGE[name]
    log = ingested(database_settings)
    damage(database_settings, *FREE, statement)
    code, said = command("verify")
    assert code == 1
    assert re.search(words, said), said
    assert "`sensor-pipeline recompute" in said
    code, said = command("recompute")
    assert code == 0
    assert re.search(r"4 machines looked at, [1-4] mended", said), said
    code, said = command("verify")
    assert code == 0, said
    if name != "healthy where it failed":
        assert stored(database_settings) == want(log)


def test_what_is_right_is_left_as_it_is_beside_what_is_mended(database_settings: Settings, command: Command) -> None:
    ingested(database_settings)
    before = {row[2]: row for row in every_row(database_settings)["failures"]}
    damage(database_settings, f"UPDATE failures SET last_failing_time = start_time WHERE id = {ANY}")
    command("recompute")
    after = {row[2]: row for row in every_row(database_settings)["failures"]}
    assert before.keys() == after.keys()
    assert sum(before[key] != after[key] for key in before) == 1


def test_more_damage_than_fits_the_screen_is_counted(database_settings: Settings, command: Command) -> None:
    ingested(database_settings)
    damage(database_settings, "UPDATE ingested_offsets SET lost = lost - 1", "DELETE FROM rejected_messages")
    damage(database_settings, "DELETE FROM failures")
    code, said = command("verify")
    assert code == 1
    assert "the ledger's totals add up to its offsets: 4 differences" in said
    assert re.search(r" +… and \d+ more\n", said)


# Time and machines


@dataclass(frozen=True)
class Damaged:
    """Two machines with twenty failures each, an hour apart; all were moved by a second."""

    log: Log
    since: datetime
    until: datetime


@pytest.fixture
def damaged(database_settings: Settings) -> Damaged:
    log = Log(database_settings, "t", "t-id")
    for hour in range(20):
        for second in range(6):
            for name in ("a", "b"):
                log.publish(0, message(name, hour * 3600 + second, second in (2, 3)))
    ingest_once(database_settings, log)
    damage(database_settings, "UPDATE failures SET start_time = start_time - interval '1 second'")
    return Damaged(log, BASE + timedelta(hours=5, seconds=3), BASE + timedelta(hours=9, seconds=2))


def test_only_the_machine_that_is_named_is_looked_at_and_mended(
    database_settings: Settings, command: Command, damaged: Damaged
) -> None:
    code, said = command("verify", "--machine", "a")
    assert code == 1
    assert "left    every reading is in the ledger: it reads every reading" in said
    assert "readings of 1 machines make them: 20 differences" in said
    assert "machine b" not in said
    said = command("recompute", "--machine", "a")[1]
    assert said.count("machine a: failure") == verify.EXAMPLES
    assert "machine a: … and 15 more\n" in said
    assert said.endswith("20 changed, 0 removed, 0 readings moved\n")
    assert command("verify", "--machine", "a")[0] == 0
    assert command("verify", "--machine", "b")[0] == 1
    assert command("verify", "--machine", "a", "--machine", "b")[0] == 1


def test_a_machine_that_is_not_there_is_named(command: Command) -> None:
    for name in ("verify", "recompute"):
        code, said = command(name, "--machine", "ghost")
        assert code == 1
        assert "there is no machine ghost" in said


def test_only_failures_that_touch_the_time_are_looked_at_and_mended_whole(
    database_settings: Settings, command: Command, damaged: Damaged
) -> None:
    assert "make them: 30 differences" in command("verify", "--since", damaged.since.isoformat())[1]
    code, said = command("recompute", "--since", damaged.since.isoformat(), "--until", damaged.until.isoformat())
    assert code == 0
    assert said.endswith("2 mended: 0 failures made, 10 changed, 0 removed, 0 readings moved\n")
    assert "make them: 30 differences" in command("verify")[1]
    assert "make them: 20 differences" in command("verify", "--since", damaged.since.isoformat())[1]
    command("recompute", "--since", damaged.since.isoformat())
    assert command("verify", "--since", damaged.since.isoformat())[0] == 0
    assert "make them: 10 differences" in command("verify")[1]
    command("recompute")
    assert stored(database_settings) == want(damaged.log)


def test_a_time_may_be_a_duration_that_lies_back(command: Command, damaged: Damaged) -> None:
    assert command("verify", "--since", "1s")[0] == 0
    assert command("verify", "--since", "50000 days")[0] == 1
    code, said = command("verify", "--since", "soon")
    assert code == 2
    assert "'soon' is neither an ISO 8601 time nor a duration" in said
    assert "lies after until" in command("recompute", "--since", "1 day", "--until", "2 days")[1]


# While ingestion goes on


def test_recompute_waits_for_a_batch_of_the_machine_and_sees_what_it_wrote(database_settings: Settings) -> None:
    log = busy_history(database_settings)
    ingest_once(database_settings, log, *first_half(log))
    damage(database_settings, *FREE, "DELETE FROM failures WHERE NOT is_active")
    database = Database(database_settings)
    with database.begin() as connection:
        machines = find_machines(connection)
    with ThreadPoolExecutor() as pool:
        with other_session(database_settings, "LOCK TABLE batches IN SHARE MODE"):
            batch = pool.submit(ingest_once, database_settings, log)
            until(lambda: sessions(database_settings, waiting=True))
            mends = [pool.submit(recompute_machine, database, machine) for machine in machines]
            until(lambda: len(sessions(database_settings, waiting=True)) == 1 + len(machines))
        batch.result()
        for mend in mends:
            mend.result()
    with database.begin() as connection:
        machines = find_machines(connection)
    # What the batch made of damaged failures, after its machines were mended.
    for machine in machines:
        recompute_machine(database, machine)
    assert stored(database_settings) == want(log)


def test_machines_are_verified_and_mended_while_batches_come_in(database_settings: Settings) -> None:
    """Whoever looks while batches are written sees a whole state; whoever mends changes nothing that is right."""
    log = busy_history(database_settings, readings=600)
    database = Database(database_settings)
    parts = list(zip(*(_cut(span.partition, len(span)) for span in batch_of(log).ranges), strict=True))
    with ThreadPoolExecutor() as pool:
        batches = pool.submit(lambda: [ingest_once(database_settings, log, *part) for part in parts])
        looks = 0
        while not batches.done():
            with database.begin() as connection:
                connection.execute(SNAPSHOT)
                for check in verify.CHECKS:
                    assert verify.ask(connection, check).examples == []
                machines = find_machines(connection)
                assert [look(connection, machine) for machine in machines] == [([], None)] * len(machines)
            assert [recompute_machine(database, machine) for machine in machines] == [None] * len(machines)
            looks += 1
        batches.result()
    assert looks > 1
    assert stored(database_settings) == want(log)


def _cut(partition: int, length: int, parts: int = 12) -> list[OffsetRange]:
    borders = [length * part // parts for part in range(parts + 1)]
    return [OffsetRange(partition, start, end) for start, end in itertools.pairwise(borders)]


# Ids


@pytest.mark.soak
def test_random_damage_is_mended_to_the_oracles_rows_with_ids_by_the_rule(database_settings: Settings) -> None:
    """Rows of failures deleted, moved and made up, readings pointed elsewhere: never twice the same."""
    random = Random(3)
    log = busy_history(database_settings, readings=400)
    ingest_once(database_settings, log)
    damage(database_settings, *FREE)
    database = Database(database_settings)
    wanted = want(log)
    order = [places for _, (_, places) in sorted(wanted.failures.items())]
    with database.begin() as connection:
        machines = find_machines(connection)
    names = [machine.name for machine in machines]
    mended = 0
    for _ in range(amount(30, 1_500)):
        with connect(database_settings).begin() as connection:
            connection.execute(sa.text(random.choice(RANDOM_DAMAGE)), {"share": random.choice([0.05, 0.3, 0.9])})
            kept = set(connection.scalars(sa.text("SELECT id FROM failures")))
        before = {i: places for i, places in failure_ids(database_settings, names).items() if i in kept}
        for machine in random.sample(machines, len(machines)):
            mended += recompute_machine(database, machine) is not None
        assert stored(database_settings) == wanted
        check_ids(before, failure_ids(database_settings, names), order)
    print(f"{mended} damaged machines mended")
    assert mended > 20


RANDOM_DAMAGE = [
    "DELETE FROM failures WHERE random() < :share",
    "UPDATE failures SET start_time = start_time - random() * interval '20 seconds' WHERE random() < :share",
    "UPDATE failures SET end_time = NULL, is_active = true WHERE random() < :share",
    "UPDATE failures SET end_time = last_failing_time + random() * interval '30 seconds', is_active = false "
    "WHERE random() < :share",
    "UPDATE failures SET last_failing_time = start_time WHERE random() < :share",
    """
        UPDATE readings SET failure_id = other.id FROM failures own, failures other
        WHERE readings.failure_id = own.id AND other.machine_id = own.machine_id
            AND random() < 0.2 AND random() < :share
    """,
    """
        INSERT INTO failures (machine_id, start_time, last_failing_time, end_time, is_active)
        SELECT machine_id, "timestamp", "timestamp", "timestamp" + interval '9 seconds', false
        FROM readings WHERE random() < 0.2 AND random() < :share
    """,
]
