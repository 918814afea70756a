"""Whatever the decoder takes, PostgreSQL takes, and gives back the same numbers, texts and times."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.rules import Reading
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import Published, connect, expected, stored
from sensor_pipeline_tests.postgres.tables import ingest_once, want
from sensor_pipeline_tests.test_any_history import Log
from sensor_pipeline_tests.test_messages import DECODER, EMOJI, Scribe, exact, message, pairs

_numbers = itertools.count(1)


def new_log(settings: Settings) -> Log:
    number = next(_numbers)
    return Log(settings, f"topic-{number}", f"id-{number}")


def canonical(reading: Reading) -> bytes:
    """The reading as a message that the oracle can read."""
    flag = json.dumps(reading.has_failure)
    time = json.dumps(reading.timestamp.isoformat())
    return message(json.dumps(reading.machine_id), time, reading.values.decode(), flag)


def values_in(value: bytes) -> Any:
    """What a message holds under `readings.readings`, every type told apart, by no code of the package."""
    document = pairs(value)
    inner = document["readings"][1]
    return inner.get("readings", ("dict", {}))[1]


def read_back(settings: Settings, log: Log) -> dict[int, str]:
    """By offset, the JSON text of each reading's values."""
    with connect(settings).connect() as connection:
        rows = connection.execute(
            sa.text("""
                SELECT kafka_offset, CAST("values" AS text) FROM readings JOIN topics ON topics.id = topic_id
                WHERE kafka_topic_id = :topic
            """),
            {"topic": log.topic_id},
        )
        return dict(map(tuple, rows))


def assert_unchanged(settings: Settings, values: list[str]) -> None:
    """Each text of an object comes back equal: numbers as numbers, everything else as it is."""
    log = new_log(settings)
    for text in values:
        log.publish(0, message(values=text))
    written = ingest_once(settings, log)
    assert (written.inserted, written.rejected) == (len(values), 0)
    back = read_back(settings, log)
    assert len(back) == len(values)
    for offset, text in enumerate(values):
        assert pairs(back[offset]) == pairs(text), text[:100]


NUMBERS = [
    "0", "-0", "-0.0", "1", "-1", "1e2", "1E+2", "1.50", "0.1", "-273.15", "1e-7", "123456789012345678901234567890",
    "9007199254740993", "0.1000000000000000055511151231257827", "1e308", "1.7976931348623157e308", "-1.7e308", "5e-324",
    "2.2250738585072014e-308", "1e-400", "1e-5000", "1e-16383", "0e-16383", "0.1e-16382", "0e99999", "0e99999999999",
    "0.00e+99999", "9" * 300, "-" + "9" * 308, "1" + "0" * 400 + "e-100", "0." + "3" * 400, "0." + "7" * 5_000,
    "0." + "1" * 16_383, "1" * 300 + "." + "1" * 16_083, "0." + "0" * 16_382 + "1", "1" * 5_000 + "e-4900",
]  # fmt: skip


def test_numbers_come_back_numerically_equal(shared_settings: Settings) -> None:
    assert_unchanged(shared_settings, [f'{{"a": {number}}}' for number in NUMBERS])


def test_numbers_in_a_message_that_only_the_full_rules_take_come_back_equal(shared_settings: Settings) -> None:
    # The escape of NUL in an ignored field keeps a message from the fast path.
    log = new_log(shared_settings)
    for number in NUMBERS:
        log.publish(0, b'{"note": "\\u0000", ' + message(values=f'{{"a": {number}}}')[1:])
    assert ingest_once(shared_settings, log).inserted == len(NUMBERS)
    back = read_back(shared_settings, log)
    for offset, number in enumerate(NUMBERS):
        assert json.loads(back[offset], parse_float=Decimal, parse_int=Decimal) == {"a": exact(number)}


def test_minus_zero_reads_zero_and_an_exponent_is_written_out(shared_settings: Settings) -> None:
    log = new_log(shared_settings)
    log.publish(0, message(values='{"a": -0, "b": 1e2, "c": 1.50}'))
    ingest_once(shared_settings, log)
    assert read_back(shared_settings, log) == {0: '{"a": 0, "b": 100, "c": 1.50}'}


STRINGS = [
    '""', '" "', '"plain"', '"caf\u00e9"', f'"{EMOJI}"', '"\\ud83d\\udd29"', '"\\u00e9\\u0001\\u001f\\u007f"',
    '"tab\\t newline\\n return\\r"', '"\\b\\f\\/"', '"quote \\" backslash \\\\"', '"\\\\u0000"', '"\\\\\\\\"',
    '"\\\\N"', '"\\\\."', '"NULL"', '"NaN"', '"Infinity"', '"1e400"', '"{}"', "\"it's $1 %s %(a)s :b\"",
    '"\u2028\u2029\ufeff"',
    '"\ufdd0\uffff\U0010ffff"', '"' + "x" * 40_000 + '"', '"' + EMOJI * 10_000 + '"', "true", "false", "null",
]  # fmt: skip


def test_strings_come_back_as_they_are_as_values_and_as_sensor_names(shared_settings: Settings) -> None:
    strings = [text for text in STRINGS if text.startswith('"')]
    assert_unchanged(
        shared_settings,
        [
            *(f'{{"a": {text}}}' for text in STRINGS),
            *(f"{{{text}: 1}}" for text in strings),
            "{" + ", ".join(f"{text}: {text}" for text in strings) + "}",
            "{}",
            "{ \n\t\r}",
            '\t\r\n{\t"a"\r:\n1\t,\n"b":\t2\r}\n',
            '{"a": 1, "a": 2, "\\u0061": 3}',
            '{"a": [], "a": 1}',
            '{"a": 1e-20000, "a": 1}',
        ],
    )


@pytest.mark.parametrize("setting", ["of the database", "of the environment"])
def test_texts_come_back_as_they_are_whatever_encoding_the_session_was_given(
    database_settings: Settings, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = new_log(database_settings)
    for text in ("caf\u00e9", EMOJI):
        log.publish(0, message(machine_id=f'"{text}"', values=f'{{"{text}": "{text}"}}'))
    with connect(database_settings).begin() as connection, monkeypatch.context() as environment:
        if setting == "of the environment":
            environment.setenv("PGCLIENTENCODING", "LATIN1")
        else:
            connection.execute(sa.text(f"ALTER DATABASE {database_settings.postgres_db} SET client_encoding = LATIN1"))
            connection.commit()
        ingest_once(database_settings, log)
    with connect(database_settings).begin() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {database_settings.postgres_db} RESET client_encoding"))
    assert stored(database_settings) == want(log)


def test_a_reading_may_have_ten_thousand_sensors(shared_settings: Settings) -> None:
    values = {f"Sensor {number}": number / 7 if number % 3 else str(number) for number in range(10_000)}
    assert_unchanged(shared_settings, [json.dumps(values)])


@pytest.mark.parametrize(
    "values",
    [
        f'{{"a": "{"x" * 900_000}"}}',
        f'{{"a": "{EMOJI * 225_000}"}}',
        f'{{"a": 1{" " * 900_000}}}',
        "{" + ",".join(f'"{number}":{number}' for number in range(70_000)) + "}",
        f'{{"{"n" * 900_000}": 1}}',
        f'{{"a": "{chr(92) * 900_000}"}}',
    ],
    ids=["text", "emoji", "space", "sensors", "name", "backslashes"],
)
def test_a_message_of_900_kilobytes_comes_back_whole(shared_settings: Settings, values: str) -> None:
    assert_unchanged(shared_settings, ['{"before": 1}', values, '{"after": 1}'])


def test_more_rows_than_one_piece_of_the_copy_are_all_there_in_their_places(shared_settings: Settings) -> None:
    assert_unchanged(shared_settings, [f'{{"a": {number}, "b": "{"x" * (number % 50)}"}}' for number in range(4_500)])


NAMES = [
    "m", "M", " ", "m" * 255, "\u00fc" * 255, EMOJI * 255, "nan", "NaN", "None", "null", "NULL", "", "{a,b}", '"', "'",
    "a\\b", "\\N", "a\tb\nc", "%s", ":x", "$1", "\u0001", "\u00e9", "e\u0301", "\u2028", "1", "1.0", "-inf", "<NA>",
]  # fmt: skip


def test_machine_ids_are_names_of_machines_of_their_own_as_they_are(database_settings: Settings) -> None:
    names = [name for name in NAMES if name]
    log = new_log(database_settings)
    for name in names:
        for failing in ("true", "false"):
            log.publish(0, message(machine_id=json.dumps(name), has_failure=failing))
    assert ingest_once(database_settings, log).inserted == 2 * len(names)
    rows = stored(database_settings)
    assert sorted(rows.machines) == sorted(names)
    assert sorted(machine for machine, _, _ in rows.failures) == sorted(names)
    held = [rows.readings[log.topic_id, 0, offset][0] for offset in range(2 * len(names))]
    assert held == [name for name in names for _ in range(2)]


def test_timestamps_from_year_1_to_9999_come_back_to_the_microsecond(database_settings: Settings) -> None:
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    moments = [
        *(datetime(year, 2, 28, 23, 59, 59, 999_999, UTC) for year in (1, 4, 99, 999, 1000, 1582, 1899, 1969, 1970)),
        *(datetime(year, 1, 1, tzinfo=UTC) for year in (1, 2, 1901, 1970, 2000, 2038, 2100, 9998, 9999)),
        *(datetime(year, 12, 31, 23, 59, 59, 999_999, UTC) for year in (1, 1999, 2262, 4713, 9999)),
        first, first + timedelta(microseconds=1), last - timedelta(days=1), last - timedelta(microseconds=1), last,
    ]  # fmt: skip
    log = new_log(database_settings)
    for number, moment in enumerate(moments):
        text = json.dumps(moment.isoformat())
        log.publish(0, message(machine_id=f'"m{number}"', timestamp=text, has_failure="true"))
        log.publish(0, message(machine_id=f'"m{number}"', timestamp=text))
    offsets = [
        ("0001-01-01T14:00:00+14:00", first),
        ("9999-12-31T11:59:59.999999-12:00", last),
        ("2026-01-01T00:30:00.000001+05:45", datetime(2025, 12, 31, 18, 45, 0, 1, UTC)),
        ("1970-01-01T00:00:00-23:59", datetime(1970, 1, 1, 23, 59, tzinfo=UTC)),
    ]
    for number, (text, _) in enumerate(offsets):
        log.publish(1, message(machine_id=f'"o{number}"', timestamp=f'"{text}"'))
    ingest_once(database_settings, log)
    rows = stored(database_settings)
    for number, moment in enumerate(moments):
        assert rows.readings[log.topic_id, 0, 2 * number][1] == moment
        assert rows.machines[f"m{number}"] == (moment, moment)
    ends = {start: end for (_, start, _), (end, _) in rows.failures.items()}
    assert ends == {moment: moment for moment in moments}
    for number, (_, moment) in enumerate(offsets):
        assert rows.readings[log.topic_id, 1, number][1] == moment


def test_late_readings_at_the_ends_of_time_find_their_failures(database_settings: Settings) -> None:
    """What is compared and looked up is exact there too."""
    log = new_log(database_settings)
    first, last = datetime.min, datetime.max
    step = timedelta(microseconds=1)
    history = [(first + step, True), (last, False), (last - step, True), (first, False), (first + 2 * step, False)]
    for moment, failing in history:
        log.publish(0, message(timestamp=json.dumps(moment.isoformat()), has_failure=json.dumps(failing)))
    for offset in range(len(history)):
        ingest_once(database_settings, log, OffsetRange(0, offset, offset + 1))
    rows = stored(database_settings)
    spans = sorted((start, end) for (_, start, _), (end, _) in rows.failures.items())
    assert [(start.replace(tzinfo=None), end.replace(tzinfo=None)) for start, end in spans if end] == [
        (first + step, first + 2 * step),
        (last - step, last),
    ]


@hypothesis_settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**64), odd=st.floats(0, 0.3))
def test_generated_messages_become_rows_unless_the_decoder_rejects_them(
    shared_settings: Settings, seed: int, odd: float
) -> None:
    """A single row that the database refused would be an error here."""
    log = new_log(shared_settings)
    random = Random(seed)
    scribe = Scribe(random, odd)
    machines = [f"{log.topic_id} {name}" for name in ("a", EMOJI, "\"'\\")]
    accepted: dict[int, bytes] = {}
    published = []
    for offset in range(80):
        value = scribe.message(random.choice(machines)).encode("utf-8", "surrogatepass")
        log.publish(0, value)
        result = DECODER.decode_one(value)
        if isinstance(result, Reading) and result.machine_id in machines:
            accepted[offset] = value
            published.append(Published(log.topic, log.topic_id, 0, offset, canonical(result)))
    written = ingest_once(shared_settings, log)
    assert written.inserted + written.rejected == 80
    want, got = expected(published), stored(shared_settings, machines)
    assert got.readings.keys() == want.readings.keys()
    assert (got.machines, got.failures) == (want.machines, want.failures)
    back = read_back(shared_settings, log)
    for offset, value in accepted.items():
        assert pairs(back[offset]) == values_in(value), value
