"""`sensor-pipeline rejected list|show|replay`, as people type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from rich.cells import cell_len

from sensor_pipeline.cli.printable import cut, pad, printable
from sensor_pipeline.cli.rejected import _table
from sensor_pipeline.postgres.rejected import headers_from_json
from sensor_pipeline.postgres.rejected_search import Listed
from sensor_pipeline.rules import Reason
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.orchestration.jobs import environment_of
from sensor_pipeline_tests.postgres.tables import batch_of, every_row, ingest_once, write_once
from sensor_pipeline_tests.rejecting import check_replayed, publish_rejected, rejecting_history, strict
from sensor_pipeline_tests.test_any_history import Log, message

# Clears the screen, sets the window's title, turns the direction of text around.
EVIL = b"\x1b[2J\x1b]0;title\x07\r\xc2\x9b31m \xe2\x80\xae \xff\x00 \xc3\xa9"
KEY = b"\x1b[1mkey"
RECORD_MS = 1_769_904_000_123
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(database_settings: Settings) -> Command:
    """Runs `sensor-pipeline rejected …` in a process of its own; its exit code and all that it said."""

    def run(*arguments: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "sensor_pipeline", "rejected", *arguments],
            env={**os.environ, **environment_of(database_settings), **more},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def on_terminal(settings: Settings, columns: int, *arguments: str) -> bytes:
    """What the same command writes to a terminal of so many columns."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sensor_pipeline", "rejected", *arguments],
        env={**os.environ, **environment_of(settings), "TERM": "xterm", "COLUMNS": str(columns)},
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
    return said


def evil_log(settings: Settings) -> Log:
    log = Log(strict(settings), "machine.sensor.readings", "id")
    log.publish(0, EVIL, bad="not_utf8")
    log.publish(0, None, bad="tombstone")
    log.publish(1, b'{"machine_id": "m",\n "timestamp": "\x1b[31mnever"}', bad="not_json")
    publish_rejected(log, 1, message("m", 1, True))
    drained = log.drain(list(batch_of(log).ranges))
    headers = [("trace", b"abc"), ("colour", b"\x1b[31m"), ("none", None)]
    marked = tuple(replace(m, key=KEY, headers=headers, timestamp_ms=RECORD_MS) for m in drained.rejected)
    log.partitions = {p: [replace(m, key=KEY) for m in of_partition] for p, of_partition in log.partitions.items()}
    write_once(settings, batch_of(log), replace(drained, rejected=marked))
    return log


# list


def test_list_shows_a_line_for_each_message_and_how_many_there_are_of_each_reason(
    database_settings: Settings, command: Command
) -> None:
    evil_log(database_settings)
    code, said = command("list")
    assert code == 0
    head, *lines = said.split("\n\n")[0].splitlines()
    assert head.split() == ["topic", "part", "offset", "reason", "first", "seen", "(UTC)", "bytes", "detail"]
    assert [line.split()[:4] for line in lines] == [
        ["machine.sensor.readings", "0", "1", "tombstone"],
        ["machine.sensor.readings", "0", "0", "not_utf8"],
        ["machine.sensor.readings", "1", "1", "too_large"],
        ["machine.sensor.readings", "1", "0", "not_json"],
    ]
    assert re.search(r"tombstone +\d{4}-\d\d-\d\d \d\d:\d\d +none  the message has no value$", lines[0])
    assert said.split("\n\n")[1].splitlines() == [
        "4 rejected messages",
        "  1  not_json",
        "  1  not_utf8",
        "  1  tombstone",
        "  1  too_large",
    ]


def test_list_shows_the_newest_up_to_a_limit_and_says_that_there_are_more(
    database_settings: Settings, command: Command
) -> None:
    log = rejecting_history(database_settings)
    ingest_once(database_settings, log)
    with connect(database_settings).begin() as connection:
        total = connection.scalar(sa.text("SELECT count(*) FROM rejected_messages"))
        newest = "UPDATE rejected_messages SET first_seen = now() WHERE (kafka_partition, kafka_offset) = (0, "
        connection.execute(
            sa.text(newest + "(SELECT min(kafka_offset) FROM rejected_messages WHERE kafka_partition = 0))")
        )
    code, said = command("list", "--limit", "3")
    assert code == 0
    lines = said.splitlines()
    assert len(lines[1].split()[2]) < 4
    assert lines[1].split()[1] == "0"
    assert lines[4] == f"… and {total - 3} older ones; --limit shows more"
    assert f"\n{total} rejected messages\n" in said
    assert "older ones" not in command("list", "--limit", str(total))[1]


def test_list_takes_filters_and_says_where_nothing_is_left(database_settings: Settings, command: Command) -> None:
    assert command("list") == (0, "no rejected message\n")
    evil_log(database_settings)
    assert "\n2 rejected messages\n" in command("list", "--reason", "tombstone", "--reason", "too_large")[1]
    assert "\n4 rejected messages\n" in command("list", "--topic", "machine.sensor.readings", "--since", "1 hour")[1]
    assert command("list", "--until", "1 hour") == (0, "no rejected message that the filters let through\n")
    code, said = command("list", "--reason", "nonsense")
    assert code == 1
    assert said.startswith("sensor-pipeline: there is no reason nonsense; the reasons are tombstone, too_large, ")
    code, said = command("list", "--topic", "nonsense")
    assert (code, said) == (
        1,
        "sensor-pipeline: there is no topic nonsense in the database; it has machine.sensor.readings\n",
    )


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_list_fits_the_terminal_and_lets_nothing_through_that_steers_it(
    database_settings: Settings, columns: int
) -> None:
    evil_log(database_settings)
    said = on_terminal(database_settings, columns, "list")
    assert b"\x1b" not in said
    lines = said.decode().replace("\r\n", "\n").splitlines()
    assert all(cell_len(line) <= columns for line in lines)
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 11


def test_a_row_is_a_line_at_any_width(database_settings: Settings) -> None:
    worst = Listed(
        topic="t" * 249,
        partition=99_999,
        offset=10**12,
        reason=max(Reason, key=len),
        detail="\u4f60\u597d" * 100,
        first_seen=datetime(2026, 1, 1, tzinfo=UTC),
        bytes=104_857_600,
    )
    for columns in range(100, 400, 7):
        lines = list(_table([worst, worst], columns))
        assert len(lines) == 3
        assert max(map(cell_len, lines)) <= columns
        assert str(worst.offset) in lines[1]
        assert worst.reason in lines[1]
    assert "\u4f60" in list(_table([worst], None))[1]


# show


def test_show_prints_a_message_whole_and_nothing_that_steers_a_terminal(database_settings: Settings) -> None:
    evil_log(database_settings)
    said = on_terminal(database_settings, 80, "show", "machine.sensor.readings", "0", "0").decode()
    lines = said.replace("\r\n", "\n").splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[0] == "topic       machine.sensor.readings, of Kafka's id id"
    assert lines[1:4] == ["partition   0", "offset      0", "reason      not_utf8"]
    assert lines[4].startswith("detail      ")
    assert re.fullmatch(r"first seen  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", lines[5])
    assert lines[6:] == [
        "Kafka time  2026-02-01 00:00:00.123 UTC",
        r"key         \x1b[1mkey",
        "headers     ",
        "  trace: abc",
        r"  colour: \x1b[31m",
        "  none: none",
        f"payload     {len(EVIL)} bytes",
        r"  \x1b[2J\x1b]0;title\x07\r\x9b31m \u202e \xff\x00 é",
    ]


def test_show_keeps_the_lines_of_a_payload_apart_from_its_own(database_settings: Settings, command: Command) -> None:
    evil_log(database_settings)
    code, said = command("show", "machine.sensor.readings", "1", "0")
    assert code == 0
    assert said.endswith('  {"machine_id": "m",\n   "timestamp": "\\x1b[31mnever"}\n')
    assert command("show", "machine.sensor.readings", "0", "1")[1].endswith("payload     none: a tombstone\n")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("t", "0", "0"), "partition 0 offset 0: it became a reading, held no record, or was accepted as lost"),
        (("t", "0", "7"), "partition 0 offset 7: that offset was not ingested yet"),
        (("t", "9", "0"), "partition 9 offset 0: that offset was not ingested yet"),
        (("other", "0", "0"), "there is no topic other in the database; it has t"),
    ],
)
def test_show_says_why_there_is_none(
    database_settings: Settings, command: Command, place: tuple[str, ...], words: str
) -> None:
    log = Log(database_settings, "t", "t-id")
    log.publish(0, message("m", 1, False))
    ingest_once(database_settings, log)
    code, said = command("show", *place)
    assert code == 1
    assert words in said
    assert said.count("\n") == 1
    assert command("show", "t", "-1", "0")[0] == 2


def test_show_tells_two_topics_of_one_name_apart_and_what_was_not_kept(
    database_settings: Settings, command: Command
) -> None:
    for name in ("first", "second"):
        log = Log(database_settings, "t", name)
        log.publish(0, name.encode(), bad="not_json")
        ingest_once(database_settings, log)
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text("UPDATE rejected_messages SET kafka_timestamp_ms = NULL WHERE topic_id = 1"))
    code, said = command("show", "t", "0", "0")
    assert code == 0
    first, second = said.split("\n\n")
    assert "of Kafka's id first\n" in first
    assert "Kafka time  not kept: the message was rejected by an older version\n" in first
    assert "of Kafka's id second\n" in second
    assert "Kafka time  none\n" in second


# replay


def test_replay_is_tried_dry_and_then_for_good(database_settings: Settings, command: Command) -> None:
    log = evil_log(database_settings)
    before = every_row(database_settings)
    code, said = command("replay", "--dry-run")
    assert code == 0
    assert every_row(database_settings) == before
    assert said.endswith("4 rejected messages looked at; 1 would become readings, 3 would be bad again\n")
    assert "bad again: 1 tombstone, such as\n  machine.sensor.readings 0 1: the message has no value\n" in said
    assert "\x1b" not in said
    code, said = command("replay")
    assert code == 0
    assert said.endswith(
        "4 rejected messages looked at; 1 became readings (1 failures started, 0 ended), 3 are bad again\n"
    )
    check_replayed(database_settings, log)
    assert command("replay", "--reason", "too_large") == (
        0,
        "0 rejected messages looked at; 0 became readings (0 failures started, 0 ended), 0 are bad again\n",
    )


def test_replay_goes_by_the_settings_in_the_environment(database_settings: Settings, command: Command) -> None:
    evil_log(database_settings)
    assert "0 became readings" in command("replay", MAX_MESSAGE_BYTES="10")[1]
    assert "1 became readings" in command("replay")[1]


def test_on_a_terminal_replay_shows_how_far_it_is(database_settings: Settings) -> None:
    log = rejecting_history(database_settings)
    ingest_once(database_settings, log)
    said = on_terminal(database_settings, 120, "replay").decode()
    assert re.search("rejected messages .*100%", said)
    assert "became readings" in said
    check_replayed(database_settings, log)


# What is printed


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"plain \xc3\xa9 \xe4\xbd\xa0", "plain é 你"),
        (b"\x00\x07\t\n\r\x1b\x7f", r"\x00\x07\t\n\r\x1b\x7f"),
        (b"\xff\xc3", r"\xff\xc3"),
        ("\x85\x9b\u2028\u200b\u202e\ufeff\ud800", r"\x85\x9b\u2028\u200b\u202e\ufeff\ud800"),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_is_printed_as_an_escape(content: str | bytes, text: str) -> None:
    assert printable(content) == text


def test_every_character_is_printable_after_that() -> None:
    everything = "".join(map(chr, range(0x110000)))
    assert printable(everything).isprintable()
    assert printable(bytes(range(256))).isprintable()


def test_texts_are_cut_and_padded_by_the_columns_that_they_take() -> None:
    assert cut("你好你好", 8) == "你好你好"
    assert cut("你好你好", 7) == "你好你…"
    assert cut("你好你好", 6) == "你好…"
    assert cut("words and", 7) == "words…"
    assert pad("你", 4) == "你  "
    assert pad("你", 4, right=True) == "  你"


def test_headers_come_back_as_they_went_in() -> None:
    stored = [
        {"key": "a", "value": "é"},
        {"key": "b", "value_base64": "/wA="},
        {"key_base64": "bgB1bA==", "value": None},
    ]
    assert headers_from_json(stored) == [("a", "é".encode()), ("b", b"\xff\x00"), ("n\x00ul", None)]
