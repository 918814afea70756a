"""Every rule of the decoder: what is a reading, what is rejected and why, and that no bytes break it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline.messages import MessageDecoder, _NotPlainError
from sensor_pipeline.plain import find_plain, read_times
from sensor_pipeline.rules import Reading, Reason, RejectedError, Rejection, examine, parse_timestamp

TABLE_OF_REASONS = Path(__file__).parents[1] / "docs" / "rejected-messages.md"
LIMIT = 50_000
NOON = datetime(2026, 1, 1, 12)
NOON_MS = int(NOON.replace(tzinfo=UTC).timestamp() * 1000)
# The machine may be slow; nothing here is timed.
unhurried = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
EMOJI = "\N{NUT AND BOLT}"


def decoder(zone: str = "UTC", max_future: timedelta = timedelta(days=1), limit: int = LIMIT) -> MessageDecoder:
    return MessageDecoder(max_future, ZoneInfo(zone), limit)


DECODER = decoder()


def message(
    machine_id: str = '"m-1"',
    timestamp: str = '"2026-01-01T12:00:00"',
    values: str = "{}",
    has_failure: str = "false",
) -> bytes:
    """A message from the JSON text of each field."""
    inner = f'{{"readings": {values}, "has_failure": {has_failure}}}'
    return f'{{"machine_id": {machine_id}, "timestamp": {timestamp}, "readings": {inner}}}'.encode()


def accepted(value: bytes, by: MessageDecoder = DECODER) -> Reading:
    result = by.decode_one(value)
    assert isinstance(result, Reading), result
    return result


def rejected(value: bytes | None, by: MessageDecoder = DECODER) -> Reason:
    result = by.decode_one(value)
    assert isinstance(result, Rejection), result
    return result.reason


def pairs(values: bytes | str) -> Any:
    """JSON with exact numbers, and every type told apart (in Python `True == 1`)."""
    return json.loads(values, parse_float=exact, parse_int=exact, object_hook=_typed)


def exact(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # Decimal's exponents end; only a zero may have such a one
        assert not re.search("[1-9]", text.lower().partition("e")[0])
        return Decimal(0)


def _typed(document: dict[str, Any]) -> dict[str, Any]:
    return {key: (type(value).__name__, value) for key, value in document.items()}


REJECTED: list[tuple[Reason, bytes | None]] = [
    (Reason.TOMBSTONE, None),
    (Reason.TOO_LARGE, b" " * (LIMIT + 1)),
    (Reason.TOO_LARGE, message() + b" " * LIMIT),
    (Reason.NOT_UTF8, b"\xff"),
    (Reason.NOT_UTF8, message(machine_id='"caf\xe9"').decode().encode("latin-1")),
    (Reason.NOT_UTF8, message(machine_id='"m').replace(b'"m', b'"m\xed\xa0\xbd"')),
    (Reason.NOT_UTF8, b'{"unknown": "\xff",' + message()[1:]),
    (Reason.NOT_JSON, b""),
    (Reason.NOT_JSON, b"   "),
    (Reason.NOT_JSON, b"not json"),
    (Reason.NOT_JSON, message()[:-1]),
    (Reason.NOT_JSON, message() + b"}"),
    (Reason.NOT_JSON, message() + message()),
    (Reason.NOT_JSON, b"\xef\xbb\xbf" + message()),
    (Reason.NOT_JSON, message().replace(b'"', b"'")),
    (Reason.NOT_JSON, message(values='{"a": 1,}')),
    (Reason.NOT_JSON, message(values='{"a": 01}')),
    (Reason.NOT_JSON, message(values='{"a": +1}')),
    (Reason.NOT_JSON, message(values='{"a": .5}')),
    (Reason.NOT_JSON, message(values='{"a": 5.}')),
    (Reason.NOT_JSON, message(values='{"a": 0x10}')),
    (Reason.NOT_JSON, message(values='{"a": NaN}')),
    (Reason.NOT_JSON, message(values='{"a": Infinity}')),
    (Reason.NOT_JSON, message(values='{"a": -Infinity}')),
    (Reason.NOT_JSON, message(values='{"a": True}')),
    (Reason.NOT_JSON, message(values='{"a": "\x00"}')),
    (Reason.NOT_JSON, message(values='{"a": "line\nbreak"}')),
    (Reason.NOT_JSON, message(values='{"a": "\\q"}')),
    (Reason.NOT_JSON, message(values='{"a": "\\u12"}')),
    (Reason.NOT_JSON, message(values="{a: 1}")),
    (Reason.NOT_JSON, message(values='{"a": 1 /* one */}')),
    (Reason.NOT_JSON, b'{"unknown": NaN,' + message()[1:]),
    (Reason.NOT_JSON, b'{"unknown": "\\q",' + message()[1:]),
    (Reason.NOT_JSON, b'{"unknown": "\x01",' + message()[1:]),
    (Reason.NESTED_TOO_DEEP, b"[" * 65 + b"]" * 65),
    (Reason.NESTED_TOO_DEEP, b'{"a":' * 65 + b"1" + b"}" * 65),
    (Reason.NESTED_TOO_DEEP, b"[" * 20_000),
    (Reason.NESTED_TOO_DEEP, b'{"unknown": ' + b"[" * 64 + b"]" * 64 + b"," + message()[1:]),
    (Reason.NOT_AN_OBJECT, b"[1, 2]"),
    (Reason.NOT_AN_OBJECT, b'"text"'),
    (Reason.NOT_AN_OBJECT, b"1"),
    (Reason.NOT_AN_OBJECT, b"true"),
    (Reason.NOT_AN_OBJECT, b"null"),
    (Reason.NOT_AN_OBJECT, b"[" * 64 + b"]" * 64),
    (Reason.MISSING_MACHINE_ID, b"{}"),
    (Reason.MISSING_MACHINE_ID, message().replace(b"machine_id", b"Machine_id")),
    (Reason.MACHINE_ID_NOT_STRING, message(machine_id="7")),
    (Reason.MACHINE_ID_NOT_STRING, message(machine_id="null")),
    (Reason.MACHINE_ID_NOT_STRING, message(machine_id="true")),
    (Reason.MACHINE_ID_NOT_STRING, message(machine_id='["m-1"]')),
    (Reason.MACHINE_ID_NOT_STRING, message(machine_id='{"id": "m-1"}')),
    (Reason.MACHINE_ID_EMPTY, message(machine_id='""')),
    (Reason.MACHINE_ID_TOO_LONG, message(machine_id=f'"{"m" * 256}"')),
    (Reason.MACHINE_ID_TOO_LONG, message(machine_id=f'"{EMOJI * 256}"')),
    (Reason.MISSING_TIMESTAMP, b'{"machine_id": "m-1", "readings": {}}'),
    (Reason.TIMESTAMP_NOT_STRING, message(timestamp="1767268800")),
    (Reason.TIMESTAMP_NOT_STRING, message(timestamp="null")),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='""')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"yesterday"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"01/02/2026 12:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"1767268800"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-02-29T12:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-13-01T12:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T25:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T24:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-12-31T23:59:60"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00+24:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00+01:60"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00+0199"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00+01:00:60"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00+00:00:00.5"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00+01:00:00.500000"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-001T12:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-W54-1T12:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00 Europe/Berlin"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='" 2026-01-01T12:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00."')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01x12:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01\\ud80012:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00x+01:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:00:00 +01:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"0000-01-01T00:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"10000-01-01T00:00:00"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"-0001-01-01T00:00:00"')),
    # Half a minute or half an hour: Python's own reader takes the fraction for one of a second.
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:30.5"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01t12:30.5"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01 12:30,5Z"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"20260101T1230.5"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12.5"')),
    (Reason.TIMESTAMP_UNREADABLE, message(timestamp='"2026-01-01T12:30.55555555+00:00"')),
    (Reason.TIMESTAMP_OUT_OF_RANGE, message(timestamp='"0001-01-01T00:00:00+00:01"')),
    (Reason.TIMESTAMP_OUT_OF_RANGE, message(timestamp='"0001-01-01T23:00:00+23:59"')),
    (Reason.TIMESTAMP_OUT_OF_RANGE, message(timestamp='"9999-12-31T23:59:59.999999-00:01"')),
    (Reason.MISSING_READINGS, b'{"machine_id": "m-1", "timestamp": "2026-01-01T12:00:00"}'),
    (Reason.READINGS_NOT_OBJECT, b'{"machine_id": "m-1", "timestamp": "2026-01-01", "readings": [0.5]}'),
    (Reason.READINGS_NOT_OBJECT, b'{"machine_id": "m-1", "timestamp": "2026-01-01", "readings": null}'),
    (Reason.VALUES_NOT_OBJECT, message(values="[0.5]")),
    (Reason.VALUES_NOT_OBJECT, message(values="null")),
    (Reason.VALUES_NOT_OBJECT, message(values='"{}"')),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure='"false"')),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure='"0"')),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="null")),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="2")),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="-1")),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="0.5")),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="1e-400")),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="1e99999999999999999999")),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="[]")),
    (Reason.HAS_FAILURE_NOT_BOOLEAN, message(has_failure="{}")),
    (Reason.VALUE_NESTED, message(values='{"a": [1, 2]}')),
    (Reason.VALUE_NESTED, message(values='{"a": {"b": 1}}')),
    (Reason.VALUE_NESTED, message(values='{"a": []}')),
    (Reason.VALUE_OUT_OF_RANGE, message(values='{"a": 1e400}')),
    (Reason.VALUE_OUT_OF_RANGE, message(values='{"a": -1e309}')),
    (Reason.VALUE_OUT_OF_RANGE, message(values='{"a": 1.8e308}')),
    (Reason.VALUE_OUT_OF_RANGE, message(values=f'{{"a": {"9" * 400}}}')),
    (Reason.VALUE_OUT_OF_RANGE, message(values='{"a": 1e99999999999999999999}')),
    (Reason.VALUE_BEYOND_NUMERIC, message(values='{"a": 1e-16384}')),
    (Reason.VALUE_BEYOND_NUMERIC, message(values='{"a": -0.1e-16383}')),
    (Reason.VALUE_BEYOND_NUMERIC, message(values='{"a": 0e-16384}')),
    (Reason.VALUE_BEYOND_NUMERIC, message(values='{"a": 1e-' + "9" * 5_000 + "}")),
    (Reason.VALUE_BEYOND_NUMERIC, message(values=f'{{"a": 0.{"1" * 16_384}}}')),
    (Reason.STRING_HAS_NUL, message(machine_id='"m\\u0000"')),
    (Reason.STRING_HAS_NUL, message(values='{"a\\u0000": 1}')),
    (Reason.STRING_HAS_NUL, message(values='{"a": "\\u0000"}')),
    (Reason.STRING_HAS_LONE_SURROGATE, message(machine_id='"m\\ud83d"')),
    (Reason.STRING_HAS_LONE_SURROGATE, message(machine_id='"\\udd29\\ud83d"')),
    (Reason.STRING_HAS_LONE_SURROGATE, message(values='{"\\udd29": 1}')),
    (Reason.STRING_HAS_LONE_SURROGATE, message(values='{"a": "\\ud83d"}')),
]


@pytest.mark.parametrize(("reason", "value"), REJECTED, ids=lambda value: str(value)[:80])
def test_a_message_that_can_never_be_a_reading_is_rejected_with_its_reason(reason: Reason, value: bytes | None) -> None:
    result = DECODER.decode_one(value)
    assert isinstance(result, Rejection), result
    assert result.reason is reason
    assert result.detail
    assert result.detail.isprintable()
    assert result.detail.isascii()
    assert len(result.detail) < 1_000


def test_every_reason_has_a_message_here_and_a_row_in_the_documentation() -> None:
    # These take more than the message's bytes: its record's timestamp, what is kept (both below), and a database.
    others = {Reason.TIMESTAMP_IN_FUTURE, Reason.TIMESTAMP_TOO_OLD, Reason.REFUSED_BY_DATABASE}
    assert {reason for reason, _ in REJECTED} | others == set(Reason)
    codes = [row[0] for row in documented()]
    assert sorted(codes) == sorted(Reason)


def documented() -> list[list[str]]:
    """The documentation's table: code, what is wrong, example, what to do."""
    rows = re.findall(r"^\| `(.+)` \| (.+) \| (.+) \| (.+) \|$", TABLE_OF_REASONS.read_text(), re.MULTILINE)
    return [list(row) for row in rows]


def test_the_examples_in_the_documentation_are_rejected_for_the_reason_they_stand_for() -> None:
    tried = []
    for code, _, shown, _ in documented():
        if not shown.startswith("`"):
            continue
        text = shown.strip("`")
        # Of a repeated key the last counts.
        whole = message().decode()[:-1] + f", {text}}}" if text.startswith('"') else text
        assert rejected(whole.encode()) == code
        tried.append(code)
    assert len(tried) > len(Reason) / 2


def test_the_code_of_a_reason_is_stored_and_so_never_renamed() -> None:
    assert {str(reason) for reason in Reason} == {reason.name.lower() for reason in Reason}


# What is accepted


def test_the_fleets_message_becomes_a_reading() -> None:
    value = (
        b'{"machine_id": "a1b2c3d4", "timestamp": "2026-01-01T12:00:00.123456",\n'
        b' "readings": {"readings": {"Sensor 1": 0.45, "Sensor 2": -0.12}, "has_failure": false}}'
    )
    machine_id, timestamp, has_failure, values = accepted(value)
    assert (machine_id, timestamp, has_failure) == ("a1b2c3d4", datetime(2026, 1, 1, 12, 0, 0, 123456), False)
    assert values == b'{"Sensor 1": 0.45, "Sensor 2": -0.12}'


def test_missing_values_mean_none_and_a_missing_flag_means_healthy() -> None:
    value = b'{"machine_id": "m-1", "timestamp": "2026-01-01T12:00:00", "readings": {}}'
    assert accepted(value) == Reading("m-1", NOON, False, b"{}")
    # The same by the full rules, which an unknown zero sends it to.
    value = b'{"machine_id": "m-1", "timestamp": "2026-01-01T12:00:00", "readings": {}, "note": "\\u0000"}'
    assert accepted(value) == Reading("m-1", NOON, False, b"{}")


@pytest.mark.parametrize("text", ["true", "1", "1.0", "1e0", "10e-1", "0.1e1"])
def test_true_and_the_number_one_mean_failing(text: str) -> None:
    assert accepted(message(has_failure=text)).has_failure is True


@pytest.mark.parametrize(
    "text", ["false", "0", "0.0", "-0", "0e5", "0e-9", "0.0E+99999999999999999999", "-0e-99999999999999999999"]
)
def test_false_and_the_number_zero_mean_healthy(text: str) -> None:
    assert accepted(message(has_failure=text)).has_failure is False


@pytest.mark.parametrize("unknown", ['"x"', "1e999", '{"deep": [[[1]]]}', '"\\u0000"', '"\\ud83d"', "null"])
def test_unknown_fields_are_ignored_at_every_level(unknown: str) -> None:
    inner = f'{{"extra": {unknown}, "readings": {{"a": 1}}, "has_failure": true, "more": {unknown}}}'
    value = (
        f'{{"x": {unknown}, "machine_id": "m-1", "timestamp": "2026-01-01T12:00:00", '
        f'"readings": {inner}, "y": {unknown}}}'
    )
    reading = accepted(value.encode())
    assert reading[:3] == ("m-1", NOON, True)
    assert pairs(reading.values) == pairs('{"a": 1}')


GOOD = {"machine_id": '"m-1"', "timestamp": '"2026-01-01T12:00:00"', "readings": '{"readings": {"a": 1}}'}
BAD = {
    "machine_id": ["7", '""', '"\\ud83d"', '"\\u0000"'],
    "timestamp": ["7", '"x"', '"2026-01-01T12:30.5"'],
    "readings": [
        "7",
        '{"readings": []}',
        '{"has_failure": "x"}',
        '{"readings": {"a": {}}}',
        '{"readings": {"a": 1e999}}',
    ],
}
REPEATED = [(field, bad) for field, examples in BAD.items() for bad in examples]


@pytest.mark.parametrize(("field", "bad"), REPEATED)
def test_of_a_repeated_key_the_last_counts(field: str, bad: str) -> None:
    members = [f'"{name}": {text}' for name, text in GOOD.items()]
    bad_first = "{" + ", ".join([f'"{field}": {bad}', *members]) + "}"
    reading = accepted(bad_first.encode())
    assert reading[:3] == ("m-1", NOON, False)
    assert pairs(reading.values) == pairs('{"a": 1}')
    bad_last = "{" + ", ".join([*members, f'"{field}": {bad}']) + "}"
    rejected(bad_last.encode())


@pytest.mark.parametrize("bad", ["[]", "{}", "1e999", "1e-99999", '"\\u0000"', '"\\ud83d"'])
def test_of_a_repeated_sensor_or_inner_field_the_last_counts(bad: str) -> None:
    assert pairs(accepted(message(values=f'{{"a": {bad}, "a": 2}}')).values) == pairs('{"a": 2}')
    assert pairs(accepted(message(values=f'{{"\\u0061": {bad}, "a": 2}}')).values) == pairs('{"a": 2}')
    rejected(message(values=f'{{"a": 2, "a": {bad}}}'))
    reading = accepted(
        message(values=f'{{"a": {bad}}}, "readings": {{"b": 2}}', has_failure='"x", "has_failure": true')
    )
    assert pairs(reading.values) == pairs('{"b": 2}')
    assert reading.has_failure


@pytest.mark.parametrize(
    "machine_id",
    ["m", " ", "m" * 255, "\u00fc" * 255, EMOJI * 255, 'quote " backslash \\ slash /', "null", "\x7f\u2028", "{a,b}"],
    ids=lambda name: ascii(name)[:30],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_machine_id_of_up_to_255_characters_is_taken_as_it_is(machine_id: str, ascii_only: bool) -> None:
    text = json.dumps(machine_id, ensure_ascii=ascii_only)
    assert accepted(message(machine_id=text)).machine_id == machine_id


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-01T12:00:00", NOON),
        ("2026-01-01T12:00:00Z", NOON),
        ("2026-01-01t12:00:00z", NOON),
        ("2026-01-01 12:00:00", NOON),
        ("2026-01-01T12:00", NOON),
        ("2026-01-01T12", NOON),
        ("20260101T120000Z", NOON),
        ("2026-W01-4T12:00:00", NOON),
        ("2026-01-01T13:00:00+01:00", NOON),
        ("2026-01-01T13:00:00+0100", NOON),
        ("2026-01-01T13:00:00+01", NOON),
        ("2026-01-01T00:01:00-11:59", NOON),
        ("2026-01-02T11:59:00+23:59", NOON),
        ("2026-01-01T12:00:00-00:00", NOON),
        ("2026-01-01T12:53:28+00:53:28", NOON),
        ("2024-02-29T12:00:00", datetime(2024, 2, 29, 12)),
        ("2020-W53-7", datetime(2021, 1, 3)),
        ("2026W01", datetime(2025, 12, 29)),
        ("2026-01-01", datetime(2026, 1, 1)),
        ("2026-01-01T12:00:00.5", NOON.replace(microsecond=500_000)),
        ("2026-01-01T12:00:00,5", NOON.replace(microsecond=500_000)),
        ("2026-01-01T12:00:00.123456", NOON.replace(microsecond=123_456)),
        ("2026-01-01T12:00:00.123456789", NOON.replace(microsecond=123_456)),
        ("2026-01-01T12:00:00.9999999", NOON.replace(microsecond=999_999)),
        ("2026-01-01T12:00:00.0000009Z", NOON),
        ("2026-01-01T13:00:00.123456789+01:00", NOON.replace(microsecond=123_456)),
        ("0001-01-01T00:00:00", datetime.min),
        ("0001-01-01T01:00:00+01:00", datetime.min),
        ("9999-12-31T23:59:59.999999", datetime.max),
        ("9999-12-31T22:59:59.999999-01:00", datetime.max),
    ],
)
def test_timestamps_are_iso_8601_in_utc_cut_to_microseconds(text: str, moment: datetime) -> None:
    assert accepted(message(timestamp=f'"{text}"')).timestamp == moment


@pytest.mark.parametrize(
    ("zone", "text", "moment"),
    [
        ("Europe/Berlin", "2026-01-01T13:00:00", NOON),
        ("Europe/Berlin", "2026-07-01T14:00:00", datetime(2026, 7, 1, 12)),
        ("Europe/Berlin", "2026-01-01T12:00:00Z", NOON),
        ("Europe/Berlin", "2026-01-01T12:00:00+00:00", NOON),
        ("Europe/Berlin", "2026-01-01t12:00:00z", NOON),
        # Of the hour that comes twice, the first; the hour that does not come is counted from before the change.
        ("Europe/Berlin", "2026-10-25T02:30:00", datetime(2026, 10, 25, 0, 30)),
        ("Europe/Berlin", "2026-03-29T02:30:00", datetime(2026, 3, 29, 1, 30)),
        ("America/New_York", "2026-01-01", datetime(2026, 1, 1, 5)),
        ("Asia/Kolkata", "2026-01-01T17:30:00.25", NOON.replace(microsecond=250_000)),
    ],
)
def test_a_timestamp_without_an_offset_is_in_the_zone_of_the_settings(zone: str, text: str, moment: datetime) -> None:
    assert accepted(message(timestamp=f'"{text}"'), decoder(zone)).timestamp == moment


def test_a_zone_may_push_a_timestamp_out_of_range() -> None:
    first, last = message(timestamp='"0001-01-01T00:00:00"'), message(timestamp='"9999-12-31T23:59:59"')
    assert rejected(first, decoder("Asia/Tokyo")) is Reason.TIMESTAMP_OUT_OF_RANGE
    assert rejected(last, decoder("America/New_York")) is Reason.TIMESTAMP_OUT_OF_RANGE
    accepted(first, decoder("America/New_York"))
    accepted(last, decoder("Asia/Tokyo"))


@unhurried
@given(
    moment=st.datetimes(),
    separator=st.sampled_from(["T", "t", " "]),
    fraction=st.from_regex(r"([.,][0-9]{1,12})?", fullmatch=True),
    offset=st.none() | st.just("Z") | st.just("z") | st.integers(-1439, 1439),
    colon=st.sampled_from(["", ":"]),
)
def test_any_way_to_write_a_timestamp_means_the_same_time(
    moment: datetime, separator: str, fraction: str, offset: str | int | None, colon: str
) -> None:
    text = f"{moment.year:04}-{moment:%m-%d}{separator}{moment:%H:%M:%S}{fraction}"
    if isinstance(offset, int):
        text += f"{'-' if offset < 0 else '+'}{abs(offset) // 60:02}{colon}{abs(offset) % 60:02}"
    else:
        text += offset or ""
    result = DECODER.decode_one(message(timestamp=json.dumps(text)))
    # Counted in whole microseconds since year 1, with no code that reads or shifts timestamps.
    whole = (moment.replace(microsecond=0) - datetime.min) // timedelta(microseconds=1)
    whole += int((fraction[1:] + "000000")[:6]) - 60_000_000 * (offset if isinstance(offset, int) else 0)
    if 0 <= whole < (datetime.max - datetime.min) // timedelta(microseconds=1) + 1:
        assert isinstance(result, Reading)
        assert (result.timestamp - datetime.min) // timedelta(microseconds=1) == whole
    else:
        assert isinstance(result, Rejection)
        assert result.reason is Reason.TIMESTAMP_OUT_OF_RANGE


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_message_may_have_as_many_bytes_as_the_limit_and_not_one_more(size: int) -> None:
    value = message(machine_id=f'"{EMOJI}"')
    limited = decoder(limit=len(value) + size)
    if size < 0:
        assert rejected(value, limited) is Reason.TOO_LARGE
    else:
        accepted(value, limited)


@pytest.mark.parametrize("depth", [59, 60, 61])
def test_values_in_unknown_fields_may_nest_up_to_the_limit(depth: int) -> None:
    # Brackets in strings do not nest, and neither do those beside one another.
    beside = '"b": "[[[[{{{{\\"[[[[", "c": [[], [], {}], '
    value = f'{{"u": {{{beside}"d": {"[" * depth}{"]" * depth}}}, '.encode() + message()[1:]
    accepted(value)
    value = f'{{"u": {{{beside}"d": {"[" * (depth + 4)}{"]" * (depth + 4)}}}, '.encode() + message()[1:]
    assert rejected(value) is Reason.NESTED_TOO_DEEP


def test_the_values_of_a_message_the_fast_path_does_not_take_are_the_same_values() -> None:
    values = (
        '{"a": 1.50, "b": -0, "c": 1E+2, "d": "\\u00e9\\n\\"\\\\\\/", "e": null, "f": true, "": 12345678901234567890}'
    )
    plain = accepted(message(values=values))
    padded = accepted(message(values=values) + b" " * 10_000)
    assert plain.values == values.encode()
    assert padded.values != plain.values
    assert pairs(padded.values) == pairs(plain.values)


@pytest.mark.parametrize(
    "number",
    ["1e-16383", "-1E-16383", "0e-16383", "0.1e-16382", "0." + "3" * 16_383, "9" * 308, "1.7976931348623157e308", "-0"],
    ids=lambda number: number[:22],
)
def test_a_number_may_be_as_long_as_a_float_and_a_numeric_allow(number: str) -> None:
    assert pairs(accepted(message(values=f'{{"a": {number}}}')).values) == pairs(f'{{"a": {number}}}')


# A timestamp ahead of its record's


@pytest.mark.parametrize("record_ms", [NOON_MS, NOON_MS + 1, 0])
@pytest.mark.parametrize("max_future", [timedelta(0), timedelta(milliseconds=1), timedelta(days=1, microseconds=1)])
def test_a_timestamp_may_lie_max_future_ahead_of_its_record_and_not_a_microsecond_more(
    record_ms: int, max_future: timedelta
) -> None:
    record = datetime(1970, 1, 1) + timedelta(milliseconds=record_ms)
    allowed, beyond = record + max_future, record + max_future + timedelta(microseconds=1)
    values = [message(timestamp=f'"{moment.isoformat()}"') for moment in (allowed, beyond)]
    decoded = decoder(max_future=max_future).decode(values, np.full(2, record_ms))
    assert decoded.index.tolist() == [0]
    assert decoded.timestamp.tolist() == [allowed]
    assert [(place, rejection.reason) for place, rejection in decoded.rejected] == [(1, Reason.TIMESTAMP_IN_FUTURE)]
    assert str(np.datetime64(beyond)) in decoded.rejected[0][1].detail
    assert decoded.rejected[0][1].detail.isascii()


def test_a_timestamp_may_lie_on_the_day_from_which_readings_are_kept_and_not_a_microsecond_before() -> None:
    values = [
        message(timestamp=f'"{text}"') for text in ("2026-01-01T00:00:00", "2025-12-31T23:59:59.999999", "0001-01-01")
    ]
    decoded = DECODER.decode(
        [*values, message(timestamp='"2026-01-01T00:30:00+01:00"')], np.full(4, -1), date(2026, 1, 1)
    )
    assert decoded.index.tolist() == [0]
    assert [(place, rejection.reason) for place, rejection in decoded.rejected] == [
        (place, Reason.TIMESTAMP_TOO_OLD) for place in (1, 2, 3)
    ]
    assert "2025-12-31T23:59:59.999999 UTC is before 2026-01-01" in decoded.rejected[0][1].detail


def test_a_record_without_a_timestamp_sets_no_limit() -> None:
    decoded = DECODER.decode([message(timestamp='"9999-12-31T23:59:59"')], np.array([-1]))
    assert decoded.index.tolist() == [0]


@pytest.mark.parametrize("record_ms", [NOON_MS, 9_223_372_036_854_775, 9_223_372_036_854_776, 2**62, 2**63 - 1])
def test_a_record_from_the_far_future_rejects_no_reading(record_ms: int) -> None:
    decoded = DECODER.decode([message()], np.array([record_ms]))
    assert decoded.rejected == []


@pytest.mark.parametrize("days", [1, 3_652_059, 106_751_991, 106_751_992, 999_999_999])
def test_any_max_future_that_the_settings_take_works(days: int) -> None:
    decoded = decoder(max_future=timedelta(days=days)).decode([message()], np.array([NOON_MS]))
    assert decoded.rejected == []


def test_a_chunk_is_decoded_into_columns_that_say_where_each_reading_stood() -> None:
    values = [
        message(machine_id='"a"', has_failure="true"),
        None,
        message(machine_id='"b"', timestamp='"2027-01-01T00:00:00"'),
        b"poison",
        message(machine_id='"c"', timestamp='"2026-01-01T12:00:01.5"', values='{"x": 1}'),
    ]
    decoded = DECODER.decode(values, np.full(5, NOON_MS))
    assert decoded.index.tolist() == [0, 4]
    assert decoded.machine_id == ["a", "c"]
    assert decoded.timestamp.dtype == "datetime64[us]"
    assert decoded.timestamp.tolist() == [NOON, datetime(2026, 1, 1, 12, 0, 1, 500_000)]
    assert decoded.has_failure.tolist() == [True, False]
    assert decoded.values == [b"{}", b'{"x": 1}']
    reasons = {place: rejection.reason for place, rejection in decoded.rejected}
    assert reasons == {1: Reason.TOMBSTONE, 2: Reason.TIMESTAMP_IN_FUTURE, 3: Reason.NOT_JSON}
    assert len(decoded.rejected) == 3


def test_no_messages_give_empty_columns() -> None:
    decoded = DECODER.decode([], np.array([], np.int64))
    assert (len(decoded.index), len(decoded.timestamp), len(decoded.has_failure)) == (0, 0, 0)
    assert decoded.timestamp.dtype == "datetime64[us]"


# No bytes break it


def test_a_message_of_nothing_but_escaped_quotes_is_decided() -> None:
    # A pattern that backtracks takes hours for this one; the limit is for the process, not a measure.
    code = """if True:
        from datetime import timedelta
        from zoneinfo import ZoneInfo
        from sensor_pipeline.messages import MessageDecoder
        decoder = MessageDecoder(timedelta(days=1), ZoneInfo("UTC"), 2_000_000)
        for start in (b"[" * 65, b"[" * 64, b'{"a":'):
            for body in (b'\\\\"', b'"', b'"[', b"\\\\", b"\\\\\\\\", b"9", b"9e", b"-", b" ", b"[]"):
                value = start + b'"' + body * (1_000_000 // len(body))
                decoder.decode_one(value)
                decoder.decode_one(start + body * (1_000_000 // len(body)))
        print("decided")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "decided\n", done.stderr


ODD_NUMBERS = [
    "0e99999999999",
    "0E+99999",
    "0e-16383",
    "0e-16384",
    "1e-16383",
    "1e-20000",
    "1e400",
    "-0",
    "-0.0",
    "5e-324",
    "1e308",
    "1.7976931348623157e308",
    "01",
    "1.",
    "-",
    ".5",
    "1e-00016384",
    "1.5e+00000000001",
    "1e-9999",
    "1E-10000",
    "0.0e-16382",
    "-1e-308",
    "1e00010",
    "123456789012345678901234567890",
    "NaN",
    "-Infinity",
]
ODD_NUMBERS += [
    "9" * 309,
    "9" * 300,
    "9" * 400 + "e-100",
    "0." + "1" * 16_383,
    "0." + "0" * 16_384,
    "1" * 5_000 + "e-15000",
]
ODD_STRINGS = [
    "\\u0000",
    "\\ud83d",
    "\\ud83d\\udd29",
    "\\\\",
    "\\\\u0000",
    "\\n\\t",
    '\\"',
    "\\/",
    "\\q",
    "\\u12",
    "[",
    "}",
    "\t",
]
ODD_STRINGS += ["\u00fc", EMOJI, "", " ", "\x7f", "\u2028", "'", "%s", "$$", "e-99999", "NaN"]
ODD_TIMES = [
    "2026-01-01T12:00:00.5+01:00",
    "2026-01-01t12:00:00z",
    "0001-01-01T00:00:00+01:00",
    "9999-12-31T23:59:59.9999999",
    "2026-01-01",
    "2026-01-01T12:30.5",
    "2026-02-30T00:00:00",
    "2026-01-01T12:00:60",
    "20260101T1200Z",
    "2026-W01-1T12",
    "2026-01-01T12:00:00x+01:00",
]
FLAGS = [
    "true",
    "false",
    "true",
    "false",
    "true",
    "false",
    "0",
    "1",
    "1.0",
    "2",
    '"true"',
    "null",
    "1e-400",
    "0e-99999999999",
]
FIELDS = ["machine_id", "timestamp", "readings", "has_failure"]


class Scribe:
    """Writes messages as a producer gone a little wrong might: each piece is odd with the given probability."""

    def __init__(self, random: Random, odd: float) -> None:
        self._random = random
        self._odd = odd

    def message(self, machine_id: str | None = None) -> str:
        """The JSON text of a message."""
        members = [
            ("machine_id", self._or_anything(self.string() if machine_id is None else json.dumps(machine_id))),
            ("timestamp", self._or_anything(f'"{self.time()}"')),
            ("readings", self._or_anything(self._inner())),
        ]
        return self._object(self._disturbed(members))

    def time(self) -> str:
        """A timestamp."""
        if self._is_odd():
            return self._random.choice(ODD_TIMES)
        moment = NOON + timedelta(microseconds=self._random.randrange(-(10**15), 10**10))
        return moment.isoformat() + self._random.choice(["", "", "Z", "+05:30", "-11:00"])

    def number(self) -> str:
        """A number."""
        if self._is_odd():
            return self._random.choice(ODD_NUMBERS)
        value = self._random.choice([self._random.random(), self._random.gauss(0, 10**9), self._random.getrandbits(70)])
        return self._random.choice([repr(value), f"{value:e}", str(int(value)), f"{value:.40f}", repr(value / 1e20)])

    def string(self) -> str:
        """A string, with its quotes."""
        pieces = [self._random.choice("abXY 7_") for _ in range(self._random.randrange(1, 8))]
        if self._is_odd():
            pieces.insert(self._random.randrange(len(pieces)), self._random.choice(ODD_STRINGS))
        return f'"{"".join(pieces)}"'

    def _inner(self) -> str:
        flag = self._random.choice(FLAGS[:6] if not self._is_odd() else FLAGS)
        return self._object(self._disturbed([("readings", self._values()), ("has_failure", self._or_anything(flag))]))

    def _values(self) -> str:
        keys = ['"a"', '"\\u0061"', '"b"', '"Sensor 1"', '""', self.string()]
        members = [
            (self._random.choice(keys), self._or_anything(self._scalar())) for _ in range(self._random.randrange(6))
        ]
        return self._object(members)

    def _scalar(self) -> str:
        return self._random.choice([self.number, self.number, self.string, lambda: self._random.choice(FLAGS)])()

    def _or_anything(self, text: str) -> str:
        if self._random.random() >= self._odd / 4:
            return text
        deep = self._random.randrange(1, 66)
        return self._random.choice([self._scalar(), "[]", "{}", f"[{self._scalar()}]", "[" * deep + "]" * deep])

    def _disturbed(self, members: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Members in any order, one repeated, one left out, one more."""
        members = [(f'"{name}"', text) for name, text in members]
        if self._is_odd():
            self._random.shuffle(members)
        if self._is_odd():
            name = self._random.choice([f'"{self._random.choice(FIELDS)}"', self.string()])
            members.insert(self._random.randrange(len(members) + 1), (name, self._or_anything(self._scalar())))
        if self._random.random() < self._odd / 4:
            members.pop()
        return members

    def _object(self, members: list[tuple[str, str]]) -> str:
        space = (
            self._random.choice(["", " ", "\n", "\t\r\n "]) if not self._is_odd() else self._random.choice("\f\u00a0 ")
        )
        return f"{space}{{" + ",".join(f"{space}{name}{space}:{text}{space}" for name, text in members) + f"}}{space}"

    def _is_odd(self) -> bool:
        return self._random.random() < self._odd


BERLIN, SMALL = decoder("Europe/Berlin"), decoder("Asia/Tokyo", limit=300)


@hypothesis_settings(unhurried, max_examples=300)
@given(seed=st.integers(0, 2**64), odd=st.floats(0, 0.4))
def test_no_message_raises_and_what_the_fast_path_takes_the_full_rules_take_with_the_same_result(
    seed: int, odd: float
) -> None:
    random = Random(seed)
    scribe = Scribe(random, odd)
    for _ in range(100):
        value = scribe.message().encode("utf-8", "surrogatepass")
        event(check(value, random.choice([DECODER, DECODER, BERLIN, SMALL])))


def test_both_paths_are_tried_by_these_messages_and_nearly_every_reason_too() -> None:
    """Otherwise the comparison would compare little."""
    random = Random(3)
    outcomes = Counter(check(Scribe(random, random.random() / 2).message().encode(), DECODER) for _ in range(4_000))
    assert outcomes["accepted by the fast path"] > 400
    assert outcomes["accepted by the full rules"] > 100
    assert len(outcomes) > 15


@hypothesis_settings(unhurried, max_examples=300)
@given(seed=st.integers(0, 2**64))
def test_no_bytes_raise_and_what_the_fast_path_takes_the_full_rules_take_with_the_same_result(seed: int) -> None:
    """Bytes cut out, put in, doubled and exchanged among all messages of this file, by the hundred."""
    random = Random(seed)
    pool = [value for _, value in REJECTED if value is not None and len(value) < 2_000]
    pool += [message(values='{"Sensor 1": 0.45, "b": -1.5e-7, "c": "\\u00e9\\\\"}', has_failure="true")] * 20
    pool += [Scribe(random, 0.1).message().encode() for _ in range(20)]
    for _ in range(250):
        value = bytearray(random.choice(pool))
        for _ in range(random.randrange(5)):
            at, size, other = random.randrange(len(value) + 1), random.randrange(6), random.choice(pool)
            start = random.randrange(len(other) + 1)
            piece = [
                random.randbytes(2),
                other[start : start + random.randrange(30)],
                b"",
                bytes(value[at : at + 30]) * 2,
            ]
            value[at : at + size] = random.choice(piece)
        check(bytes(value), random.choice([DECODER, BERLIN, SMALL]))


@pytest.mark.parametrize(
    "value",
    [
        message(values='{"a": 1e-20000, "a": 1}'),
        message(values='{"a": 0e99999999999}'),
        message(values='{"a": 0E+99999999999}'),
        message(values='{"a": 0e-99999}'),
        message(values='{"a": 1e308, "b": 5e-324}'),
        b'{"unknown": "\\q",' + message()[1:],
        b'{"readings": {"readings": {"a": "\\q"}}, ' + message()[1:],
        *(value for _, value in REJECTED if value is not None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_both_paths_agree_on_messages_that_once_divided_them_and_on_every_rejected_one(value: bytes) -> None:
    check(value, DECODER)


def check(value: bytes, by: MessageDecoder) -> str:
    """What must hold for any bytes; returns what became of them."""
    result = by.decode_one(value)
    if isinstance(result, Rejection):
        assert result.detail.isprintable()
        assert result.detail.isascii()
    else:
        assert 0 < len(result.machine_id) <= 255
        assert result.timestamp.tzinfo is None
        assert isinstance(result.has_failure, bool)
        held = json.loads(result.values, parse_float=exact, parse_int=exact, object_pairs_hook=_check_pairs)
        assert isinstance(held, dict)
    outcome = str(result.reason) if isinstance(result, Rejection) else "accepted by the full rules"
    if outcome == Reason.TOO_LARGE:
        return outcome
    _check_among_plain_ones(value, by, result)
    try:
        fast = by._accept(value)
    except (_NotPlainError, ValueError, RecursionError, OverflowError):
        return outcome
    try:
        full = examine(value, by._zone)
    except RejectedError as error:
        pytest.fail(f"the fast path takes {value!r}, which the full rules reject: {error.rejection}")
    assert fast == result, value
    assert fast[:3] == full[:3], value
    assert pairs(fast.values) == pairs(full.values), value
    return "accepted by the fast path"


NEIGHBOUR = message(values='{"Sensor 1": 0.5, "Sensor 2": -1}')


def _check_among_plain_ones(value: bytes, by: MessageDecoder, result: Reading | Rejection) -> None:
    """Decoded together with others, a message says the same, and they say what they do without it."""
    together = by.decode([NEIGHBOUR, value, NEIGHBOUR], np.full(3, -1))
    assert [*together.index.tolist(), *(place for place, _ in together.rejected)] in ([0, 1, 2], [0, 2, 1])
    columns = (together.machine_id, together.timestamp.tolist(), together.has_failure.tolist(), together.values)
    rows = dict(zip(together.index.tolist(), zip(*columns, strict=True), strict=True))
    assert rows[0] == rows[2] == tuple(accepted(NEIGHBOUR, by))
    if isinstance(result, Rejection):
        assert dict(together.rejected) == {1: result}
    else:
        assert rows[1][:3] == tuple(result)[:3]
        assert pairs(rows[1][3]) == pairs(result.values)


def plain_places(values: list[bytes | None]) -> list[int]:
    return find_plain(values, most_bytes=LIMIT, naive_is_utc=True).place.tolist()


def test_what_nearly_every_fleet_sends_is_plain() -> None:
    """Otherwise the comparison above would compare nothing."""
    for value in (
        NEIGHBOUR,
        message(),
        message(timestamp='"2026-01-01T12:00:00.123Z"', values='{"mode": "warm", "on": true, "unit": null}'),
        message(timestamp='"2026-01-01T12:00:00.123456+00:00"', has_failure="1"),
        message(values=f'{{"caf\u00e9 {EMOJI}": 1}}'),
        message(machine_id=f'"{EMOJI}"'),
        b' {"extra": "", ' + message()[1:] + b"\n",
    ):
        assert plain_places([value]) == [0], value


@pytest.mark.parametrize(
    "value",
    [
        message(values='{"a": 1e-5}'),
        message(values='{"a": 1E5}'),
        message(values='{"1e5": 1}'),
        message(values='{"a": ' + "9" * 400 + "}"),
        message(values='{"a": "\\u0041"}'),
        message(values='{"a": [1]}'),
        message(values='{"a": "{"}'),
        message(timestamp='"2026-02-30T12:00:00"'),
        message(timestamp='"0000-01-01T12:00:00"'),
        message(timestamp='"2026-01-01T24:00:00"'),
        message(timestamp='"2026-01-01T12:00:00."'),
        message(timestamp='"2026-01-01T12:00:00+01:00"'),
        message(machine_id='""'),
        b'{"machine_id": "m", "timestamp": "2026-01-01T12:00:00", "readings": {}}',
        b'{"note": "\xff", ' + message()[1:],
        b'{"note": {"deep": 1}, ' + message()[1:],
        message(values='{"a": {}}'),
        message(values="null"),
        message(values="12345"),
        message(values='"text"'),
    ],
    ids=lambda value: str(value)[:70],
)
def test_what_its_bytes_do_not_show_is_left_to_the_rules_alone(value: bytes) -> None:
    without_values = b'{"machine_id": "m", "timestamp": "2026-01-01T12:00:00", "readings": {}}'
    assert plain_places([NEIGHBOUR, value, None, NEIGHBOUR, without_values, b"}{", NEIGHBOUR]) == [0, 3, 6]


@pytest.mark.parametrize("short", [b'{"readings": null}', b'{"readings": 12345}', b'{"readings": "text"}', b"{}"])
@pytest.mark.parametrize("deep", [b'{"readings": {"a": {}}}', b'{"note": {}, "readings": {}}'])
def test_a_message_with_a_brace_too_few_does_not_make_up_for_one_with_a_brace_too_many(
    short: bytes, deep: bytes
) -> None:
    start = b'{"machine_id": "m", "timestamp": "2026-01-01T12:00:00", "readings": '
    assert plain_places([start + short + b"}", start + deep + b"}", NEIGHBOUR]) == [2]


def test_a_plain_message_over_the_size_limit_is_too_large() -> None:
    small = decoder(limit=100).decode([NEIGHBOUR], np.array([-1]))
    assert [rejection.reason for _, rejection in small.rejected] == [Reason.TOO_LARGE]


def _is_readable(text: str) -> bool:
    try:
        parse_timestamp(text, None)
    except (ValueError, OverflowError):
        return False
    return True


@unhurried
@given(
    st.lists(
        st.one_of(
            st.datetimes().map(lambda moment: moment.isoformat()),
            st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
            st.from_regex(r"\A20[0-2][0-9]-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-6][0-9](\.[0-9]{0,7})?\Z"),
            st.text(max_size=30),
        ),
        max_size=20,
    )
)
def test_times_read_together_are_those_read_one_by_one(texts: list[str]) -> None:
    for text, time in zip(texts, read_times(texts, naive_is_utc=True), strict=True):
        if not np.isnat(time):
            assert time == np.datetime64(parse_timestamp(text, None)), text
        elif re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z?", text, re.ASCII):
            assert not _is_readable(text), text


def _check_pairs(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """PostgreSQL reads every value, those of repeated keys too: each must be one that it can hold."""
    for key, value in members:
        for text in (key, value):
            if isinstance(text, str):
                assert "\x00" not in text
                text.encode()
        assert not isinstance(value, dict | list)
        if isinstance(value, Decimal):
            exponent = value.as_tuple().exponent
            assert isinstance(exponent, int)
            assert -16_383 <= exponent <= 100_000
    return dict(members)


def test_the_fast_path_takes_the_fleets_messages() -> None:
    """Otherwise the comparison above would compare nothing."""
    sensors = {f"Sensor {number}": number / 7 for number in range(20)}
    for extra in ({}, {"note": "caf\u00e9 " + EMOJI}, {"unit": None, "on": True, "n": -3, "small": 1e-5}):
        text = json.dumps(sensors | extra, ensure_ascii=False)
        assert DECODER._accept(message(values=text)).values == text.encode()
