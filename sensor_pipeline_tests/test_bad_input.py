"""What no sane producer sends, through Kafka, one batch and PostgreSQL: the good becomes the oracle's rows, the bad is
kept whole with its reason, and neither takes the other with it.

Each odd message stands between two plain ones. What a good one means is written out beside it.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from sensor_pipeline.batch import Pipeline
from sensor_pipeline.postgres.transaction import Written
from sensor_pipeline.rules import Reason
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.kafka.inspecting import batch, catch_up, check_rows, query, totals
from sensor_pipeline_tests.kafka.producing import (
    Headers,
    Publisher,
    create_topic,
    group_offsets,
    high_watermarks,
    reading,
)
from sensor_pipeline_tests.test_messages import EMOJI, LIMIT, REJECTED, message

UNICODE = "caf\u00e9 " + EMOJI


@dataclass(frozen=True)
class Case:
    """A message, and either what it means, as a message that the oracle can read, or why it must be rejected."""

    value: bytes | None
    means: bytes | None = None
    bad: Reason | None = None
    key: bytes | None = None
    headers: Headers = ()


def good(value: bytes, means: bytes | None = None, *, key: bytes | None = None, headers: Headers = ()) -> Case:
    return Case(value, value if means is None else means, None, key, headers)


def bad(value: bytes | None, reason: Reason, *, key: bytes | None = None, headers: Headers = ()) -> Case:
    return Case(value, None, reason, key, headers)


def ingest(settings: Settings, *cases: Case) -> Written:
    """Publish the cases among plain readings, run all of it as one batch, and check every row."""
    publisher = Publisher(settings)
    publisher.readings({0: 1, 1: 1})
    for number, case in enumerate(cases):
        sent = publisher.send(number % 2, case.value, bad=case.bad, key=case.key, headers=case.headers)
        if case.means is not None:
            publisher.published[-1] = replace(sent, value=case.means)
        publisher.readings({number % 2: 1})
    written = run_all(settings)
    assert written.rejected_by_reason == Counter(str(case.bad) for case in cases if case.bad)
    check_rows(settings, publisher.published)
    return written


def run_all(settings: Settings) -> Written:
    """One batch of all there is."""
    ends = high_watermarks(settings, settings.kafka_topics[0])
    return Pipeline(settings).run(batch(settings, {p: (0, end) for p, end in ends.items() if end}))


def with_unknown(text: str) -> bytes:
    """A good message with an ignored field of this JSON text."""
    return f'{{"unknown": {text}, '.encode() + message()[1:]


# Many


def test_ten_thousand_poison_messages_of_every_kind_take_no_good_one_with_them(settings: Settings) -> None:
    limited = replace(settings, max_message_bytes=LIMIT)
    publisher = Publisher(limited)
    kinds = itertools.cycle((str(reason), value) for reason, value in REJECTED)
    queue: list[tuple[int, bytes | None, str | None]] = []
    for number in range(10_000):
        reason, value = next(kinds)
        queue.append((number % 4, value, reason))
        if number % 10 == 0:
            queue.append((number % 3, reading(f"m{number % 7}", number / 10, failing=number % 90 < 30), None))
    publisher.send_all(queue)

    written = run_all(limited)

    assert (written.inserted, written.rejected) == (1_000, 10_000)
    assert written.rejected_by_reason == Counter(reason for _, _, reason in queue if reason)
    assert len(written.rejected_by_reason) > 20
    check_rows(settings, publisher.published)
    assert totals(settings) == (1_000, 10_000, 0, 0)
    again = run_all(limited)
    assert (again.batch_id, again.already_ingested) == (None, 11_000)
    check_rows(settings, publisher.published)


def test_a_batch_of_poison_only_is_ingested_and_what_comes_after_it_too(settings: Settings) -> None:
    limited = replace(settings, max_message_bytes=LIMIT)
    publisher = Publisher(limited)
    publisher.send_all((number % 2, value, str(reason)) for number, (reason, value) in enumerate(REJECTED))

    written = run_all(limited)

    assert (written.inserted, written.rejected) == (0, len(REJECTED))
    check_rows(settings, publisher.published)
    assert query(settings, "SELECT * FROM machines") == []
    assert group_offsets(settings) == {0: (len(REJECTED) + 1) // 2, 1: len(REJECTED) // 2}
    publisher.readings({0: 5, 3: 2})
    catch_up(Pipeline(limited))
    check_rows(settings, publisher.published)


# Large


def test_messages_of_nearly_a_megabyte_come_in_whole(settings: Settings) -> None:
    sensors = json.dumps({f"Sensor {number}": number / 7 for number in range(10_000)})
    ingest(
        settings,
        good(message('"text"', values=f'{{"a": "{"x" * 900_000}"}}')),
        good(message('"emoji"', values=f'{{"a": "{EMOJI * 220_000}"}}')),
        good(message('"name"', values=f'{{"{"n" * 1_000_000}": 1}}')),
        good(message('"space"', values=f"{{{' ' * 900_000}}}")),
        good(message('"sensors"', values=sensors)),
        good(with_unknown(f'"{"u" * 900_000}"'), message()),
        good(f'{{"{"k" * 1_000_000}": 1, '.encode() + message()[1:], message()),
        good(with_unknown("[" + "1," * 400_000 + "1]"), message()),
        good(message('"big key"'), key=b"k" * 1_000_000),
        good(message('"big header"'), headers=[("h", b"\xff" * 1_000_000)]),
    )


def test_poison_of_nearly_a_megabyte_is_kept_whole(settings: Settings) -> None:
    ingest(
        settings,
        bad(b"x" * 1_000_000, Reason.NOT_JSON),
        bad(b"\xff" * 1_000_000, Reason.NOT_UTF8),
        bad(b"\x00" * 1_000_000, Reason.NOT_JSON),
        bad(b" " * 1_000_000, Reason.NOT_JSON),
        bad(b'"' + b'\\"' * 500_000, Reason.NOT_JSON),
        bad(message(values=f'{{"a": {"9" * 1_000_000}}}'), Reason.VALUE_OUT_OF_RANGE),
        bad(message(values=f'{{"a": 0.{"0" * 1_000_000}}}'), Reason.VALUE_BEYOND_NUMERIC),
        bad(message(values=f'{{"a": 1e{"9" * 1_000_000}}}'), Reason.VALUE_OUT_OF_RANGE),
        bad(message(has_failure="1" * 1_000_000), Reason.HAS_FAILURE_NOT_BOOLEAN),
        bad(message(machine_id=f'"{"m" * 1_000_000}"'), Reason.MACHINE_ID_TOO_LONG),
        bad(message(timestamp=f'"{"2" * 1_000_000}"'), Reason.TIMESTAMP_UNREADABLE),
        bad(message(values=f'{{"{"n" * 1_000_000}": []}}'), Reason.VALUE_NESTED),
        bad(b"", Reason.NOT_JSON, key=b"\x00" * 1_000_000),
        bad(None, Reason.TOMBSTONE, key=b"\xff" * 1_000_000),
        bad(b"", Reason.NOT_JSON, headers=[("h", b"\x00" * 1_000_000)]),
        bad(b"", Reason.NOT_JSON, headers=[(f"h{number}", b"") for number in range(10_000)]),
    )


def test_a_message_over_the_pipelines_limit_is_rejected_however_good_it_is(settings: Settings) -> None:
    value = message(values=f'{{"a": "{"x" * 900_000}"}}')
    ingest(replace(settings, max_message_bytes=len(value)), good(value), bad(value + b" ", Reason.TOO_LARGE))


# Deep


@pytest.mark.parametrize("levels", [1_000, 100_000])
def test_deep_nesting_is_rejected_wherever_it_stands(settings: Settings, levels: int) -> None:
    array, half = "[" * levels + "]" * levels, "[" * levels
    obj = '{"a":' * levels + "1" + "}" * levels
    deep = [array, half, obj, '[{"a":' * (levels // 2), "[" * levels + "1" + "]" * (levels - 1)]
    ingest(
        settings,
        *(bad(text.encode(), Reason.NESTED_TOO_DEEP) for text in deep),
        *(bad(message(values=f'{{"a": {text}}}'), Reason.NESTED_TOO_DEEP) for text in deep),
        *(bad(with_unknown(text), Reason.NESTED_TOO_DEEP) for text in deep),
        *(bad(message(has_failure=text), Reason.NESTED_TOO_DEEP) for text in deep),
        bad(f'{{"unknown": "\\u0000", "x": {array}}}'.encode(), Reason.NESTED_TOO_DEEP),
        bad(("]" * levels).encode(), Reason.NOT_JSON),
        # In a string it is no nesting.
        good(message(values=f'{{"a": "{half}"}}')),
        good(with_unknown(f'"{half}"'), message()),
        good(with_unknown("[" + "[]," * levels + "{}]"), message()),
    )


def test_nesting_up_to_the_limit_is_ignored_with_its_field_and_rejected_as_a_value(settings: Settings) -> None:
    deep = "[" * 60 + "]" * 60
    ingest(
        settings,
        good(with_unknown(deep), message()),
        good(with_unknown('{"a":' * 60 + "1" + "}" * 60), message()),
        bad(message(values=f'{{"a": {deep}}}'), Reason.VALUE_NESTED),
        bad(message(machine_id=deep), Reason.MACHINE_ID_NOT_STRING),
        bad(deep.encode(), Reason.NOT_AN_OBJECT),
    )


# Repeated keys


def test_of_repeated_keys_the_last_counts_at_every_level(settings: Settings) -> None:
    inner = '"readings": {"readings": {"a": 1}, "has_failure": true}'
    head = '"machine_id": "m", "timestamp": "2026-01-01T12:00:00"'
    means = message('"m"', values='{"a": 1}', has_failure="true")
    ingest(
        settings,
        good(f'{{"machine_id": 7, "timestamp": [], "readings": null, {head}, {inner}}}'.encode(), means),
        good(f'{{{inner}, "readings": {{"readings": {{"b": 2}}}}, {head}, {inner}}}'.encode(), means),
        good(f'{{"\\u006dachine_id": "x", {head}, {inner}}}'.encode(), means),
        good(message('"m"', values='{"a": "x"}, "readings": {"a": 1}', has_failure='[], "has_failure": 1'), means),
        good(message('"m"', values='{"a": {}, "a": 1e999, "a": "\\u0000", "\\u0061": 1}', has_failure="true"), means),
        good(message('"m"', values='{"a": 1' + ', "a": 1' * 50_000 + "}", has_failure="true"), means),
        good(with_unknown('1, "unknown": NULL'.lower()), message()),
        bad(f'{{{head}, {inner}, "machine_id": 7}}'.encode(), Reason.MACHINE_ID_NOT_STRING),
        bad(f'{{{head}, {inner}, "readings": []}}'.encode(), Reason.READINGS_NOT_OBJECT),
        bad(message('"m"', values='{"a": 1, "a": {}}'), Reason.VALUE_NESTED),
        bad(message('"m"', values='{"a": 1, "\\u0061": "\\ud83d"}'), Reason.STRING_HAS_LONE_SURROGATE),
        bad(message('"m"', has_failure='true, "has_failure": null'), Reason.HAS_FAILURE_NOT_BOOLEAN),
    )


# Numbers


def test_numbers_at_every_limit(settings: Settings) -> None:
    def of(number: str) -> bytes:
        return message(values=f'{{"a": {number}}}')

    fit = ["-0", "-0.0", "0.0e-16382", "1e-400", "-1e-400", "1e-16383", "4.9e-324", "1.7976931348623157e308", "9" * 308]
    fit += ["9" * 400 + "e-92", "0." + "1" * 16_383, "9" * 308 + "." + "9" * 16_383, "1" * 16_000 + "e-15800"]
    out = ["9" * 400, "1e400", "-1e400", "1e999999999", "-1E+999999999", "1.7976931348623159e308"]
    # What numeric itself could hold: 131,072 digits before the point.
    out += ["1" + "0" * 131_071, "9" * 131_072 + "." + "9" * 16_383, "1" + "0" * 131_072]
    beyond = ["1e-16384", "1e-999999999", "0." + "0" * 16_384, "0e-999999999", "1" + "0" * 200_000 + "e-200000"]
    ingest(
        settings,
        *(good(of(number)) for number in fit),
        good(of("0e999999999"), of("0")),
        good(of("-0.00E+99999999999999999999"), of("0")),
        good(of("0." + "0" * 200_000 + "15e200001"), of("1.5")),
        good(message(has_failure="0.00e99999999999999999999"), message(has_failure="false")),
        good(message(has_failure="0.001e3"), message(has_failure="true")),
        *(bad(of(number), Reason.VALUE_OUT_OF_RANGE) for number in out),
        *(bad(of(number), Reason.VALUE_BEYOND_NUMERIC) for number in beyond),
        *(bad(of(number), Reason.NOT_JSON) for number in ("NaN", "Infinity", "-Infinity", "01", "1.", "0x1", "1e")),
        bad(message(has_failure="1e999999999"), Reason.HAS_FAILURE_NOT_BOOLEAN),
        bad(with_unknown("NaN"), Reason.NOT_JSON),
        good(with_unknown("1e999999999"), message()),
    )
    stored = query(
        settings, """SELECT DISTINCT "values" ->> 'a' FROM readings WHERE "values" ->> 'a' ~ '^-?0(\\.0)?$'"""
    )
    assert {row[0] for row in stored} == {"0", "0.0"}


# Times

ANY_YEAR = timedelta(days=3_660_000)


def at(text: str, **fields: str) -> bytes:
    return message(timestamp=json.dumps(text), **fields)


TIMES = [
    ("0001-01-01T00:00:00", datetime(1, 1, 1)),
    ("0001-01-01T23:59:00+23:59", datetime(1, 1, 1)),
    ("0001-01-01T00:00:00-23:59", datetime(1, 1, 1, 23, 59)),
    ("0999-12-31T23:59:59.999999Z", datetime(999, 12, 31, 23, 59, 59, 999_999)),
    ("1582-10-10T00:00:00", datetime(1582, 10, 10)),
    ("1883-11-18T12:03:58-04:56:02", datetime(1883, 11, 18, 17)),
    ("1969-12-31T23:59:59.999999", datetime(1969, 12, 31, 23, 59, 59, 999_999)),
    ("2024-02-29T12:00:00", datetime(2024, 2, 29, 12)),
    ("2000-02-29t12:00:00.123456789z", datetime(2000, 2, 29, 12, 0, 0, 123_456)),
    ("2020-W53-7T01:02:03", datetime(2021, 1, 3, 1, 2, 3)),
    ("2026W01", datetime(2025, 12, 29)),
    ("20260101T120000,5+0530", datetime(2026, 1, 1, 6, 30, 0, 500_000)),
    ("9999-12-31T23:59:59.999999", datetime.max),
    ("9999-12-31T00:00:59.999999-23:59", datetime.max),
    ("9999-12-31T23:59:59.9999999", datetime.max),
]
NO_TIMES = ["2026-12-31T23:59:60", "2016-12-31T23:59:60Z", "2026-01-01T24:00:00", "2025-02-29T12:00:00", "1900-02-29"]
NO_TIMES += [
    "2026-01-01T12:00:00+24:00",
    "2026-01-01T12:00:00+01:60",
    "2025-W53-1",
    "2026-001",
    "0000-01-01",
    "10000-01-01",
]
NO_TIMES += [
    "2026-01-01T12:00:00\u00a0Z",
    "\u0662026-01-01",
    "2026\u221201\u221201",
    "now",
    "infinity",
    "-infinity",
    "epoch",
]
OUT_OF_TIME = ["0001-01-01T00:00:00+00:00:01", "0001-01-01T23:58:00+23:59", "9999-12-31T23:59:59.999999-00:01"]


def test_timestamps_of_every_form_from_year_1_to_9999(settings: Settings) -> None:
    ingest(
        replace(settings, max_future=ANY_YEAR),
        *(good(at(text), at(moment.isoformat())) for text, moment in TIMES),
        *(bad(at(text), Reason.TIMESTAMP_UNREADABLE) for text in NO_TIMES),
        *(bad(at(text), Reason.TIMESTAMP_OUT_OF_RANGE) for text in OUT_OF_TIME),
    )


ZONED = {
    # The hour that does not come is counted from before the change, and of the one that comes twice it is the first.
    "Europe/Berlin": [
        ("2026-03-29T01:59:59.999999", datetime(2026, 3, 29, 0, 59, 59, 999_999)),
        ("2026-03-29T02:30:00", datetime(2026, 3, 29, 1, 30)),
        ("2026-03-29T03:00:00", datetime(2026, 3, 29, 1)),
        ("2026-10-25T01:59:59", datetime(2026, 10, 24, 23, 59, 59)),
        ("2026-10-25T02:30:00", datetime(2026, 10, 25, 0, 30)),
        ("2026-10-25T03:00:00", datetime(2026, 10, 25, 2)),
        ("2026-10-25T02:30:00+01:00", datetime(2026, 10, 25, 1, 30)),
        ("2026-10-25T02:30:00z", datetime(2026, 10, 25, 2, 30)),
    ],
    # Half an hour, and a day that never was.
    "Australia/Lord_Howe": [
        ("2026-04-05T01:45:00", datetime(2026, 4, 4, 14, 45)),
        ("2026-10-04T02:15:00", datetime(2026, 10, 3, 15, 45)),
    ],
    "Pacific/Apia": [("2011-12-30T12:00:00", datetime(2011, 12, 30, 22)), ("2011-12-31", datetime(2011, 12, 30, 10))],
}


@pytest.mark.parametrize("zone", ZONED)
def test_times_without_an_offset_around_a_change_of_the_clocks(settings: Settings, zone: str) -> None:
    """Each starts or ends a failure, so that one in the wrong hour would be in the wrong episode too."""
    cases = [
        good(at(text, has_failure=flag), at(moment.isoformat(), has_failure=flag))
        for (text, moment), flag in zip(ZONED[zone], itertools.cycle(["true", "false"]), strict=False)
    ]
    zoned = replace(settings, naive_timestamp_tz=ZoneInfo(zone), max_future=ANY_YEAR)
    publisher = Publisher(settings)
    for case in cases:
        publisher.published[-1:] = [replace(publisher.send(0, case.value), value=case.means)]
    run_all(zoned)
    check_rows(settings, publisher.published)


def test_a_zone_pushes_the_first_moment_out_of_range(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.send(0, at("0001-01-01T00:00:00"), bad=Reason.TIMESTAMP_OUT_OF_RANGE)
    publisher.send(0, at("0001-01-01T00:00:00Z"))
    run_all(replace(settings, naive_timestamp_tz=ZoneInfo("Asia/Tokyo")))
    check_rows(settings, publisher.published)


def test_a_batch_whose_readings_fall_on_four_hundred_days_makes_the_days_it_needs(settings: Settings) -> None:
    publisher = Publisher(settings)
    ((horizon,),) = query(settings, "SELECT horizon FROM readings_horizon")
    assert isinstance(horizon, date)
    days = [horizon + timedelta(days=number) for number in range(-200, 200)]
    assert not query(settings, "SELECT FROM pg_class WHERE relname LIKE 'readings\\_2%'")
    noon = timedelta(hours=12)
    publisher.send_all(
        (number % 4, at((datetime(day.year, day.month, day.day) + noon).isoformat(), has_failure=flag), None)
        for number, day in enumerate(days)
        for flag in (("true", "false") if number % 3 else ("false",))
    )

    run_all(replace(settings, max_future=timedelta(days=300)))

    check_rows(settings, publisher.published)
    made = query(
        settings, "SELECT relname FROM pg_class WHERE relname LIKE 'readings\\_2%' AND relkind = 'r' ORDER BY 1"
    )
    assert [name for (name,) in made] == [f"readings_{day:%Y%m%d}" for day in days if day >= horizon]


# Clocks


def test_a_clock_is_held_against_the_records_own_timestamp_and_not_against_this_machines(settings: Settings) -> None:
    """A backlog of a year ago is judged as it would have been then, and so is one of a year ahead."""
    topic = f"{settings.kafka_topics[0]}-clocks"
    create_topic(settings, topic, 2, {"message.timestamp.after.max.ms": str(10**12)})
    own = replace(settings, kafka_topics=(topic,))
    publisher = Publisher(own)
    year, minute = timedelta(days=365), timedelta(minutes=1)
    now = datetime.now(UTC).replace(tzinfo=None)

    def send(moment: datetime, record: datetime, *, bad: Reason | None = None) -> None:
        stamp = round(record.replace(tzinfo=UTC).timestamp() * 1000)
        publisher.send(0, at(moment.isoformat()), timestamp_ms=stamp, bad=bad)

    for record in (now, now - year, now + year, datetime(1971, 1, 1)):
        send(record, record)
        send(record - year, record)
        send(record + timedelta(days=1) - minute, record)
        send(record + timedelta(days=1) + minute, record, bad=Reason.TIMESTAMP_IN_FUTURE)
        send(record + year, record, bad=Reason.TIMESTAMP_IN_FUTURE)

    run_all(own)

    check_rows(own, publisher.published)
    assert totals(own) == (12, 8, 0, 0)


def test_where_the_broker_stamps_the_records_its_clock_is_the_measure(settings: Settings) -> None:
    topic = f"{settings.kafka_topics[0]}-stamped"
    create_topic(settings, topic, 1, {"message.timestamp.type": "LogAppendTime"})
    own = replace(settings, kafka_topics=(topic,))
    publisher = Publisher(own)
    now = datetime.now(UTC).replace(tzinfo=None)
    year_ahead = round((datetime.now(UTC) + timedelta(days=365)).timestamp() * 1000)
    publisher.send(0, at((now - timedelta(days=365)).isoformat()))
    publisher.send(
        0, at((now + timedelta(days=365)).isoformat()), bad=Reason.TIMESTAMP_IN_FUTURE, timestamp_ms=year_ahead
    )
    run_all(own)
    check_rows(own, publisher.published)


def test_a_failure_that_a_clock_ahead_of_its_time_would_pin_is_never_opened(settings: Settings) -> None:
    publisher = Publisher(settings)
    publisher.send(0, at("2926-01-01T12:00:00", has_failure="true"), bad=Reason.TIMESTAMP_IN_FUTURE)
    publisher.send(0, at("2026-01-01T12:00:00", has_failure="true"))
    publisher.send(0, at("2026-01-01T12:00:01"))
    run_all(settings)
    check_rows(settings, publisher.published)
    assert query(settings, "SELECT FROM failures WHERE is_active") == []


# Texts


def test_machine_ids_of_up_to_255_characters_of_any_kind(settings: Settings) -> None:
    names = ["m", "m" * 255, "\u00fc" * 255, EMOJI * 255, "\u0301" * 255, "\u202e" + "x" * 254, "\u00a0", "\x7f"]
    escaped = [f'"{chr(92)}ud83d{chr(92)}udd29"', f'"{(chr(92) + "ud83d" + chr(92) + "udd29") * 255}"']
    ingest(
        settings,
        *(good(message(json.dumps(name, ensure_ascii=is_ascii))) for name in names for is_ascii in (True, False)),
        *(good(message(text)) for text in escaped),
        *(bad(message(json.dumps(name * 256)), Reason.MACHINE_ID_TOO_LONG) for name in ("m", "\u00fc", EMOJI)),
        *(
            bad(message(json.dumps(EMOJI * 255 + "m", ensure_ascii=a)), Reason.MACHINE_ID_TOO_LONG)
            for a in (True, False)
        ),
        bad(message('""'), Reason.MACHINE_ID_EMPTY),
    )


HALVES = ["\\ud83d", "\\udd29", "a\\ud83db", "\\udd29\\ud83d", "\\ud83d\\u0041", "\\uDBFF", "\\ud83d\\ud83d\\udd29"]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [(["\\u0000", "a\\u0000", "\\u0000" * 9], Reason.STRING_HAS_NUL), (HALVES, Reason.STRING_HAS_LONE_SURROGATE)],
    ids=["NUL", "half a pair"],
)
def test_what_no_text_in_postgresql_can_hold_is_rejected_where_it_would_be_stored(
    settings: Settings, texts: list[str], reason: Reason
) -> None:
    ingest(
        settings,
        *(bad(message(machine_id=f'"{text}"'), reason) for text in texts),
        *(bad(message(values=f'{{"{text}": 1}}'), reason) for text in texts),
        *(bad(message(values=f'{{"a": "{text}"}}'), reason) for text in texts),
        *(bad(message(values=f'{{"a": 1, "{text}": "{text}"}}'), reason) for text in texts),
        *(bad(at("x").replace(b"x", text.encode()), Reason.TIMESTAMP_UNREADABLE) for text in texts),
        *(good(with_unknown(f'"{text}"'), message()) for text in texts),
        *(good(with_unknown(f'{{"{text}": ["{text}"]}}'), message()) for text in texts),
        *(good(f'{{"{text}": 1, '.encode() + message()[1:], message()) for text in texts),
        # The backslash itself is written here, and no escape.
        *(good(message(values=f'{{"a": "{text}"}}'.replace("\\", "\\\\"))) for text in texts),
    )


# Bytes


def test_what_is_not_one_json_text_in_utf_8_is_rejected(settings: Settings) -> None:
    plain = message(json.dumps(UNICODE, ensure_ascii=False))
    text = plain.decode()
    ingest(
        settings,
        good(plain),
        good(b"\r\n\t " + plain + b" \n"),
        bad(b"\xef\xbb\xbf" + plain, Reason.NOT_JSON),
        bad(text.encode("utf-16"), Reason.NOT_UTF8),
        bad(message().decode().encode("utf-16-le"), Reason.NOT_JSON),
        bad(text.encode("utf-16-be"), Reason.NOT_UTF8),
        bad(text.encode("utf-32"), Reason.NOT_UTF8),
        bad(message('"caf\u00e9"').decode().encode("latin-1"), Reason.NOT_UTF8),
        bad(message().replace(b"m-1", b"m\xed\xa0\xbd"), Reason.NOT_UTF8),
        bad(message().replace(b"m-1", b"m\xc0\x80"), Reason.NOT_UTF8),
        bad(gzip.compress(plain), Reason.NOT_UTF8),
        bad(b"\x00\x00\x00\x00\x07" + plain, Reason.NOT_JSON),
        bad(b"", Reason.NOT_JSON),
        bad(b"\x00", Reason.NOT_JSON),
        bad(b" \t\r\n", Reason.NOT_JSON),
        bad(b"\xc2\xa0" + plain, Reason.NOT_JSON),
        bad(plain + b"x", Reason.NOT_JSON),
        bad(plain + b"\x00", Reason.NOT_JSON),
        bad(plain + plain, Reason.NOT_JSON),
        bad(plain + b"\n" + plain, Reason.NOT_JSON),
        bad(b"[" + plain + b"]", Reason.NOT_AN_OBJECT),
        bad(json.dumps(text).encode(), Reason.NOT_AN_OBJECT),
        bad(plain[: len(plain) // 2], Reason.NOT_JSON),
    )
