"""Messages of every kind by the hundred thousand: the decoder against a second opinion, and all it takes against
PostgreSQL.

The second opinion is written from the documentation alone: Python's `json`, whole numbers for numbers and times, and
PostgreSQL's own reader of JSON. It says every rule that a message breaks; the decoder must name one of them, or take
the message where there is none.
"""

from __future__ import annotations

import calendar
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sensor_pipeline.drained import Drained, FrameBuilder, Records
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.offsets import Batch, OffsetRange
from sensor_pipeline.rules import Reason, Rejection
from sensor_pipeline.settings import Settings
from sensor_pipeline_tests.oracle import connect
from sensor_pipeline_tests.postgres.tables import write_once
from sensor_pipeline_tests.soak import amount
from sensor_pipeline_tests.test_any_history import Log
from sensor_pipeline_tests.test_messages import NOON_MS, REJECTED, Scribe, check, exact, message, pairs

LIMIT = 400_000
MAX_FUTURE = timedelta(days=30)
ZONES = ("UTC", "UTC", "Europe/Berlin", "Asia/Kolkata")
DECODERS = {zone: MessageDecoder(MAX_FUTURE, ZoneInfo(zone), LIMIT) for zone in ZONES}
FIRST_MOMENT, AFTER_LAST = 0, (datetime.max - datetime.min) // timedelta(microseconds=1) + 1


_numbers = itertools.count(1)


# The second opinion


class Opinion(NamedTuple):
    """Every rule that a message breaks, and what it says where it breaks none."""

    broken: frozenset[Reason]
    machine_id: str = ""
    moment: datetime = datetime.min
    failing: bool = False
    values: Any = None


@dataclass(frozen=True)
class Numeral:
    """A number as it is written."""

    text: str

    def parts(self) -> tuple[Decimal, int]:
        """Its digits as a whole number without a sign, and the power of ten to multiply that with."""
        mantissa, _, power = self.text.lower().lstrip("-").partition("e")
        whole, _, fraction = mantissa.partition(".")
        digits = power.lstrip("+-0")[:12] or "0"
        return Decimal(whole + fraction), int(f"{'-' if '-' in power else ''}{digits}") - len(fraction)

    def is_beyond_a_float(self) -> bool:
        digits, power = self.parts()
        place = digits.adjusted() + power
        if not digits or place < 308:
            return False
        # Halfway to what would be the next float, which is rounded up.
        return place > 308 or Decimal((0, digits.as_tuple().digits, power)) >= Decimal(2**1024 - 2**970)

    def equals(self, number: int) -> bool:
        digits, power = self.parts()
        if not digits or not number:
            return not digits and not number
        place = digits.adjusted() + power
        return place == 0 and Decimal((0, digits.as_tuple().digits, power)) == number and self.text[0] != "-"


def second_opinion(value: bytes, zone: str) -> Opinion:
    """What the documentation says of a message, all rules at once."""
    if len(value) > LIMIT:
        return Opinion(frozenset({Reason.TOO_LARGE}))
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return Opinion(frozenset({Reason.NOT_UTF8}))
    if depth(text) > 64:
        return Opinion(frozenset({Reason.NESTED_TOO_DEEP}))
    try:
        document = json.loads(text, parse_int=Numeral, parse_float=Numeral, parse_constant=no_json)
    except ValueError:
        return Opinion(frozenset({Reason.NOT_JSON}))
    if not isinstance(document, dict):
        return Opinion(frozenset({Reason.NOT_AN_OBJECT}))
    broken: set[Reason] = set()
    machine_id = machine_opinion(document, broken)
    moment = time_opinion(document, zone, broken)
    failing = inner_opinion(document, broken)
    values = None if broken else {k: typed(v) for k, v in document["readings"].get("readings", {}).items()}
    return Opinion(frozenset(broken), machine_id, moment, failing, values)


def typed(scalar: Any) -> tuple[str, Any]:
    """As `pairs` gives back what PostgreSQL holds."""
    return ("Decimal", exact(scalar.text)) if isinstance(scalar, Numeral) else (type(scalar).__name__, scalar)


def no_json(name: str) -> None:
    raise ValueError(name)


def depth(text: str) -> int:
    """How many brackets are open at most, outside of strings."""
    if text.count("[") + text.count("{") <= 64:
        return 0
    deepest = level = 0
    quoted = escaped = False
    for character in text:
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character in "[{":
            level += 1
            deepest = max(deepest, level)
        elif character in "]}":
            level -= 1
        else:
            quoted = character == '"'
    return deepest


def text_opinion(text: str, broken: set[Reason]) -> None:
    if "\x00" in text:
        broken.add(Reason.STRING_HAS_NUL)
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        broken.add(Reason.STRING_HAS_LONE_SURROGATE)


def machine_opinion(document: dict[str, Any], broken: set[Reason]) -> str:
    machine_id = document.get("machine_id")
    if "machine_id" not in document:
        broken.add(Reason.MISSING_MACHINE_ID)
    elif not isinstance(machine_id, str):
        broken.add(Reason.MACHINE_ID_NOT_STRING)
    else:
        text_opinion(machine_id, broken)
        if not machine_id:
            broken.add(Reason.MACHINE_ID_EMPTY)
        if len(machine_id) > 255:
            broken.add(Reason.MACHINE_ID_TOO_LONG)
        return machine_id
    return ""


def inner_opinion(document: dict[str, Any], broken: set[Reason]) -> bool:
    inner = document.get("readings")
    if "readings" not in document:
        broken.add(Reason.MISSING_READINGS)
    elif not isinstance(inner, dict):
        broken.add(Reason.READINGS_NOT_OBJECT)
    else:
        values = inner.get("readings", {})
        if not isinstance(values, dict):
            broken.add(Reason.VALUES_NOT_OBJECT)
        else:
            for sensor, scalar in values.items():
                text_opinion(sensor, broken)
                value_opinion(scalar, broken)
        flag = inner.get("has_failure", False)
        if isinstance(flag, bool):
            return flag
        if isinstance(flag, Numeral) and (flag.equals(0) or flag.equals(1)):
            return flag.equals(1)
        broken.add(Reason.HAS_FAILURE_NOT_BOOLEAN)
    return False


def value_opinion(scalar: object, broken: set[Reason]) -> None:
    if isinstance(scalar, dict | list):
        broken.add(Reason.VALUE_NESTED)
    elif isinstance(scalar, str):
        text_opinion(scalar, broken)
    elif isinstance(scalar, Numeral):
        if scalar.is_beyond_a_float():
            broken.add(Reason.VALUE_OUT_OF_RANGE)
        if -scalar.parts()[1] > 16_383:
            broken.add(Reason.VALUE_BEYOND_NUMERIC)


ISO = re.compile(
    r"(?P<y>[0-9]{4})(?:-(?P<m>[0-9]{2})-(?P<d>[0-9]{2})|(?P<m2>[0-9]{2})(?P<d2>[0-9]{2})"
    r"|-W(?P<w>[0-9]{2})(?:-(?P<wd>[0-9]))?|W(?P<w2>[0-9]{2})(?P<wd2>[0-9])?)"
    r"(?:[T ](?P<H>[0-9]{2})(?:(?P<c>:?)(?P<M>[0-9]{2})(?:(?P=c)(?P<S>[0-9]{2})(?:[.,](?P<f>[0-9]+))?)?)?"
    r"(?P<z>Z|(?P<s>[+-])(?P<oH>[0-9]{2})(?:(?P<oc>:?)(?P<oM>[0-9]{2})(?:(?P=oc)(?P<oS>[0-9]{2}))?)?)?)?"
)


def time_opinion(document: dict[str, Any], zone: str, broken: set[Reason]) -> datetime:
    text = document.get("timestamp")
    if "timestamp" not in document:
        broken.add(Reason.MISSING_TIMESTAMP)
    elif not isinstance(text, str):
        broken.add(Reason.TIMESTAMP_NOT_STRING)
    elif (microseconds := counted(text, ZoneInfo(zone))) is None:
        broken.add(Reason.TIMESTAMP_UNREADABLE)
    elif not FIRST_MOMENT <= microseconds < AFTER_LAST:
        broken.add(Reason.TIMESTAMP_OUT_OF_RANGE)
    else:
        return datetime.min + timedelta(microseconds=microseconds)
    return datetime.min


def counted(text: str, zone: ZoneInfo) -> int | None:
    """Microseconds from year 1 to a timestamp, in UTC; none where it is no ISO 8601."""
    found = ISO.fullmatch(re.sub("[a-z]", lambda letter: letter[0].upper(), text))
    if found is None:
        return None
    part = {name: int(digits) for name, digits in found.groupdict("0").items() if name not in "czsf" and name != "oc"}
    day = the_day(found, part)
    if day is None or part["H"] > 23 or part["M"] > 59 or part["S"] > 59:
        return None
    seconds = (day.toordinal() - 1) * 86_400 + part["H"] * 3_600 + part["M"] * 60 + part["S"]
    whole = seconds * 1_000_000 + int(((found["f"] or "") + "000000")[:6])
    if found["z"] is None:
        offset = zone.utcoffset(datetime.min + timedelta(microseconds=whole))
        assert offset is not None
        return whole - offset // timedelta(microseconds=1)
    if part["oH"] > 23 or part["oM"] > 59 or part["oS"] > 59:
        return None
    shift = part["oH"] * 3_600 + part["oM"] * 60 + part["oS"]
    return whole - (-shift if found["s"] == "-" else shift) * 1_000_000


def the_day(found: re.Match[str], part: dict[str, int]) -> date | None:
    year = part["y"]
    if found["w"] is None and found["w2"] is None:
        month, day = part["m"] or part["m2"], part["d"] or part["d2"]
        is_day = year >= 1 and 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1]
        return date(year, month, day) if is_day else None
    week = part["w"] or part["w2"]
    weekday = part["wd"] or part["wd2"] or (1 if found["wd"] is None and found["wd2"] is None else 0)
    if not (year >= 1 and 1 <= week <= 53 and 1 <= weekday <= 7):
        return None
    # The week with the year's first Thursday is the first.
    fourth = date(year, 1, 4).toordinal()
    ordinal = fourth - (fourth - 1) % 7 + (week - 1) * 7 + weekday - 1
    if not 1 <= ordinal <= date.max.toordinal():
        return None
    thursday = ordinal - (ordinal - 1) % 7 + 3
    is_of_the_year = week < 53 or (thursday <= date.max.toordinal() and date.fromordinal(thursday).year == year)
    return date.fromordinal(ordinal) if is_of_the_year else None


# Where messages come from


def scribbled(random: Random) -> bytes:
    """As of a producer gone a little wrong."""
    return Scribe(random, random.random() * 0.3).message().encode("utf-8", "surrogatepass")


FLEETS = [
    message('"a1b2c3d4"', '"2026-01-01T12:00:00.123456"', '{"Sensor 1": 0.45, "Sensor 2": -0.12}'),
    message('"m-2"', '"2026-01-01T13:00:00+01:00"', '{"p": 1e2, "unit": "\\u00b0C", "on": true, "n": null}', "true"),
    message('"caf\u00e9"', '"20260101T1200Z"', '{"a": "\\ud83d\\udd29", "b": "\U0001f529", "c": -1.5e-7}', "1"),
    b'{"machine_id":"m-1","timestamp":"2026-W01-4T12","note":{"by":["x",1,null]},"readings":{}}',
]
ODD = [value for _, value in REJECTED if value is not None and len(value) < 2_000]


def mutated(random: Random) -> bytes:
    """A good message in which bits are flipped and bytes cut off, cut out, doubled, exchanged and spliced in."""
    if random.random() < 0.1:
        return raw(random)
    value = bytearray(random.choice(FLEETS) if random.random() < 0.5 else Scribe(random, 0.03).message().encode())
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        at = random.randrange(len(value) + 1)
        size = random.choice([0, 1, 1, 2, random.randrange(40)])
        other = random.choice(random.choice([FLEETS, ODD]))
        start = random.randrange(len(other) + 1)
        match random.randrange(8):
            case 0 if at < len(value):
                value[at] ^= 1 << random.randrange(8)
            case 1 if random.random() < 0.3:
                del value[at:]
            case 2:
                del value[at : at + size]
            case 3:
                value[at:at] = value[at : at + size] * random.choice([1, 1, 3])
            case 4:
                value[at : at + size] = other[start : start + random.randrange(40)]
            case 5:
                value[at : at + size] = random.randbytes(size)
            case 6:
                value[at : at + 1] = random.choice(b'0123456789eE+-.,:"\\ {}[]ntfuTZW/').to_bytes()
            case _:
                value = value.replace(
                    random.choice([b" ", b'"', b":", b"0", b"e"]), random.choice([b"", b"  ", b"\t"]), 1
                )
    return bytes(value)


def raw(random: Random) -> bytes:
    """Bytes of no kind, or the tokens of JSON in any order."""
    if random.random() < 0.3:
        return random.randbytes(random.randrange(200))
    tokens = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        '"',
        "\\",
        "1",
        "-",
        "e5",
        ".",
        "true",
        "null",
        "NaN",
        '"readings"',
        '"x"',
        " ",
    ]
    return "".join(random.choices(tokens, k=random.randrange(30))).encode()


def numbers(random: Random) -> bytes:
    """Numbers of any length at the limits of a float and of numeric, as values and as flags."""
    members = ",".join(f'"{name}": {numeral(random)}' for name in "abc"[: random.randrange(1, 4)])
    flag = (
        numeral(random) if random.random() < 0.05 else random.choice(["true", "false", "1", "0", "0.0", "10e-1", "-0"])
    )
    return message(values=f"{{{members}}}", has_failure=flag)


def numeral(random: Random) -> str:
    """A JSON number."""
    digits = random.choice(["0", "1", "9", "17976931348623158", str(random.getrandbits(random.randrange(1, 400)))])
    digits = random.choice([digits, digits, digits + "0" * length(random), digits * random.randrange(1, 40)])
    fraction = random.choice(["", "", str(random.getrandbits(60)), "0" * length(random) + digits[:20]])
    # Often such that digits and exponent come to something that a float holds, or just not.
    near = random.choice([0, 308, 309, -16_383, -16_384, -400]) - len(digits) + random.randrange(-1, 3)
    power = random.choice([None, None, near, random.randrange(-400, 400), length(random), -length(random), 10**20])
    text = random.choice(["", "", "-"]) + (digits.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    zeros = random.choice(["", "", "000000"])
    return (
        text
        if power is None
        else f"{text}{random.choice('eE')}{'-' if power < 0 else random.choice(['', '+'])}{zeros}{abs(power)}"
    )


def length(random: Random) -> int:
    """Short as often as long, up to beyond what numeric holds."""
    return int(10 ** (random.random() * random.choice([2, 4, 4.5])))


def times(random: Random) -> bytes:
    """Timestamps of all kinds, about half of them just wrong."""

    def one(good: Sequence[str], bad: Sequence[str]) -> str:
        return random.choice(bad if random.random() < 0.06 else good)

    year = one(["0001", "0004", "1900", "2000", "2026", "9999"], ["0000", "226"])
    month, day = one(["01", "02", "12"], ["00", "13"]), one(["01", "28", "29", "30", "31"], ["00", "32"])
    week, weekday = one(["01", "26", "52", "53"], ["00", "54"]), one("1234567", "089")
    days = [f"{year}-{month}-{day}"] * 5 + [f"{year}{month}{day}", f"{year}-W{week}", f"{year}-W{week}-{weekday}"]
    text = one([*days, f"{year}W{week}", f"{year}W{week}{weekday}"], [f"{year}-{month}", f"{year}-001"])
    colon = one([":", ":", ""], [";", "::"])
    clock = [one(["00", "02", "12", "23"], ["24", "25"]), *(one(["00", "30", "59"], ["60", "5"]) for _ in "MS")]
    if (parts := random.choice([0, 1, 2, 3, 3, 3, 3, 3])) > 0:
        text += one("TTTt ", "_x") + colon.join(clock[:parts])
        if random.random() < (0.5 if parts == 3 else 0.03):
            text += random.choice(".,") + "".join(random.choices("0123456789", k=random.randrange(1, 12)))
        text += one(
            ["", "", "Z", "z", "+00:00", "-00:00", "+23:59", "-23:59", "+01", "-0530", "+12:00:59"], ODD_OFFSETS
        )
    if random.random() < 0.1:
        at = random.randrange(len(text))
        odd = random.choice(["", "0", "-", "T", " ", ":", "\u0660", "\u2212", "W"])
        text = text[:at] + odd + text[at + random.randrange(2) :]
    return message(timestamp=json.dumps(text), has_failure=random.choice(["true", "false"]))


ODD_OFFSETS = ["+24:00", "+01:60", "-00:99", "+01:00:60", "+1", "+01:", " Z", "UTC", "+00:00:00.5"]
PIECES = [
    "a",
    "\u00e9",
    "\U0001f529",
    "\\u0000",
    "\\ud83d",
    "\\udd29",
    "\\ud83d\\udd29",
    "\\uD83D",
    "\\u0041",
    "\\n",
    '\\"',
    "\\\\",
]
PIECES += [
    "\\/",
    "\u2028",
    "\ufeff",
    "\uffff",
    "'",
    "[[",
    "}",
    " ",
    "\x7f",
    "\\u001f",
    "e-99999",
    "\\\\u0000",
    "\\x",
    "\\u12",
    "\t",
    "\x00",
]


def texts(random: Random) -> bytes:
    """Strings with escapes, halves of pairs, NUL and what looks like them, at every place that has a string."""
    good, bad = PIECES[:3] + PIECES[6:7] + PIECES[8:24], PIECES

    def text() -> str:
        pieces = random.choices(bad if random.random() < 0.08 else good, k=random.randrange(1, 9))
        return '"' + "".join(pieces) * random.choice([1, 1, 1, 30, 64, 255]) + '"'

    name = text() if random.random() < 0.5 else json.dumps("\u00fc" * random.choice([1, 254, 255, 256]))
    members = ",".join(f"{text()}: {text()}" for _ in range(random.randrange(3)))
    return f'{{"note": {text()}, '.encode() + message(name, '"2026-01-01T12:00:00"', f"{{{members}}}")[1:]


def shapes(random: Random) -> bytes:
    """Every field as it should be, missing, or anything else, at every level."""

    def perhaps(name: str, good: Callable[[], Any]) -> dict[str, Any]:
        chance = random.random()
        return {} if chance < 0.06 else {name: anything(random) if chance < 0.12 else good()}

    def inner() -> dict[str, Any]:
        return (
            perhaps("readings", lambda: {name: anything(random, 3) for name in "ab"[: random.randrange(3)]})
            | perhaps("has_failure", lambda: random.choice([True, False, 0, 1]))
            | perhaps("more", lambda: anything(random))
        )

    document = (
        perhaps("machine_id", lambda: f"m-{random.randrange(9)}")
        | perhaps("timestamp", lambda: (datetime.min + timedelta(seconds=random.randrange(63_000_000_000))).isoformat())
        | perhaps("readings", inner)
        | perhaps("more", lambda: anything(random))
    )
    members = list(document.items())
    random.shuffle(members)
    shape = dict(members) if random.random() < 0.97 else anything(random)
    indent, ascii_only = random.choice([None, 1]), random.random() < 0.5
    return json.dumps(shape, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def anything(random: Random, depth: int = 0) -> Any:
    """A JSON value; of those that are deeper than `depth` says, only scalars."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: random.random() < 0.5,
        lambda: random.randrange(-2, 3),
        lambda: random.choice([random.gauss(0, 1e6), random.gauss(0, 1e-300), 1e308, 10**400, float("nan"), -0.0]),
        lambda: random.choice(["", "m-1", "2026-01-01T12:00:00", "\x00", "\ud83d", "\U0001f529", "x" * 256, "1"]),
    ]
    if depth < 2 or random.random() < 0.05:
        kinds.append(lambda: [anything(random, depth + 1) for _ in range(random.randrange(4))])
        kinds.append(
            lambda: {name: anything(random, depth + 1) for name in ("readings", "a", "")[: random.randrange(4)]}
        )
    return random.choice(kinds)()


SOURCES: dict[str, Callable[[Random], bytes]] = {
    source.__name__: source for source in (scribbled, mutated, shapes, numbers, times, texts)
}


# What is tried


@dataclass
class Bench:
    """Decodes messages, holds them against the second opinion, writes what was accepted, and reads it back."""

    settings: Settings
    tally: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        number = next(_numbers)
        self._log = Log(self.settings, f"topic-{number}", f"id-{number}")
        self._start = 0

    def try_out(self, values: Sequence[bytes], zone: str, record_ms: Sequence[int]) -> None:
        """All of it for these messages, one batch."""
        opinions = [second_opinion(value, zone) for value in values]
        recorded = np.array(record_ms, np.int64)
        decoder = DECODERS[zone]
        decoded = decoder.decode(list(values), recorded)
        rejected = dict(decoded.rejected)
        assert sorted([*decoded.index.tolist(), *rejected]) == list(range(len(values)))
        for at, (value, opinion) in enumerate(zip(values, opinions, strict=True)):
            check(value, decoder)
            self._compare(value, late(opinion, record_ms[at]), rejected.get(at))
        self._ask_for_json(values, opinions)
        builder = FrameBuilder()
        builder.add(self._records(values, recorded), decoded)
        self._write(Drained(builder.frame(), tuple(builder.rejected), ()), len(values), len(rejected))
        stored = self._stored()
        assert stored.keys() == set(decoded.index.tolist())
        for at, row in stored.items():
            want = opinions[at]
            assert row == (want.machine_id, want.moment, want.failing, want.values), values[at]
        self._start += len(values)

    def _compare(self, value: bytes, broken: frozenset[Reason], rejection: Rejection | None) -> None:
        self.tally["tried"] += 1
        self.tally[str(rejection.reason) if rejection else "accepted"] += 1
        if rejection is None:
            assert not broken, f"accepted, although {set(broken)}: {value[:2_000]!r}"
        else:
            assert broken, f"rejected ({rejection}), although no rule is broken: {value[:2_000]!r}"
            assert rejection.reason in broken, f"{rejection}, and not {set(broken)}: {value[:2_000]!r}"

    def _ask_for_json(self, values: Sequence[bytes], opinions: Sequence[Opinion]) -> None:
        """PostgreSQL's own reader of JSON takes the same texts."""
        unknown = {Reason.NOT_UTF8, Reason.TOO_LARGE, Reason.NESTED_TOO_DEEP}
        asked = [(v.decode(), o) for v, o in zip(values, opinions, strict=True) if not o.broken & unknown]
        asked = [(text, opinion) for text, opinion in asked if "\x00" not in text]
        query = """SELECT pg_input_is_valid(text, 'json') FROM unnest(CAST(:texts AS text[])) WITH ORDINALITY
                   AS asked (text, place) ORDER BY place"""
        with connect(self.settings).connect() as connection:
            answers = connection.scalars(sa.text(query), {"texts": [text for text, _ in asked]}).all()
        for (text, opinion), is_json in zip(asked, answers, strict=True):
            assert is_json == (Reason.NOT_JSON not in opinion.broken), text[:2_000]

    def _records(self, values: Sequence[bytes], recorded: Any) -> Records:
        return Records(
            partition=np.zeros(len(values), np.int32),
            offset=np.arange(self._start, self._start + len(values)),
            timestamp_ms=recorded,
            value=list(values),
            key_and_headers=lambda at: (None, []),
        )

    def _write(self, drained: Drained, offsets: int, rejected: int) -> None:
        """A single row that the database refused would be an error here."""
        with connect(self.settings).begin() as connection:
            # The machines of an earlier batch would only make this one slow.
            connection.execute(sa.text("TRUNCATE machines, failures, readings, rejected_messages, batches"))
        batch = Batch(self._log.topic, self._log.topic_id, (OffsetRange(0, self._start, self._start + offsets),))
        written = write_once(self.settings, batch, drained)
        assert (written.inserted, written.rejected) == (offsets - rejected, rejected)

    def _stored(self) -> dict[int, tuple[str, datetime, bool, Any]]:
        query = """SELECT kafka_offset, m.machine_id, "timestamp", has_failure, CAST("values" AS text)
                   FROM readings r JOIN machines m ON m.id = r.machine_id"""
        with connect(self.settings).connect() as connection:
            rows = connection.execute(sa.text(query)).all()
        return {
            offset - self._start: (machine, moment.astimezone(UTC).replace(tzinfo=None), failing, pairs(values))
            for offset, machine, moment, failing, values in rows
        }

    def report(self, source: str) -> None:
        """How many were tried, and what became of them; a fuzzer that rejects or takes everything tries nothing."""
        tried, accepted = self.tally.pop("tried"), self.tally.pop("accepted")
        print(f"\n{source}: {tried:,} messages fuzzed, {accepted:,} accepted, {tried - accepted:,} rejected:", end=" ")
        print(", ".join(f"{count:,} {reason}" for reason, count in self.tally.most_common()))
        assert min(accepted, tried - accepted) > tried / 10


def record_time(random: Random) -> int:
    """A record's own timestamp: none, about now, long ago, or far ahead."""
    return random.choice(
        [-1, NOON_MS, NOON_MS - random.randrange(10**10), random.randrange(10 ** random.randrange(1, 16))]
    )


def late(opinion: Opinion, record_ms: int) -> frozenset[Reason]:
    """The rules that a message breaks, with the one about its record's timestamp."""
    is_late = record_ms >= 0 and opinion.moment - datetime(1970, 1, 1) > timedelta(milliseconds=record_ms) + MAX_FUTURE
    return frozenset({Reason.TIMESTAMP_IN_FUTURE}) if not opinion.broken and is_late else opinion.broken


@pytest.fixture(scope="module")
def bench_settings(postgres: Settings, administer: Callable[[str], None]) -> Iterator[Settings]:
    """A database whose horizon lies so late that no time needs a day of its own: days have tests of their own."""
    administer(f"CREATE DATABASE fuzz TEMPLATE {postgres.postgres_db}")
    fuzz = replace(postgres, postgres_db="fuzz")
    with connect(fuzz).begin() as connection:
        for statement in (
            "ALTER TABLE readings DETACH PARTITION readings_before_horizon",
            """ALTER TABLE readings ATTACH PARTITION readings_before_horizon
               FOR VALUES FROM (MINVALUE) TO ('9999-12-31')""",
            "UPDATE readings_horizon SET horizon = '9999-12-31'",
        ):
            connection.execute(sa.text(statement))
    yield fuzz
    administer("DROP DATABASE fuzz WITH (FORCE)")


@pytest.mark.soak
@pytest.mark.parametrize("source", SOURCES)
def test_the_decoder_agrees_with_a_second_opinion_and_postgresql_gives_back_all_that_it_takes(
    bench_settings: Settings, source: str
) -> None:
    bench = Bench(bench_settings)

    # A seed cannot be made smaller: what fails names its message.
    @hypothesis_settings(
        max_examples=amount(12, 240),
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(seed=st.integers(0, 2**64))
    def fuzz(seed: int) -> None:
        random = Random(seed)
        values = [SOURCES[source](random) for _ in range(1_000)]
        bench.try_out(values, random.choice(ZONES), [record_time(random) for _ in values])

    fuzz()
    bench.report(source)


@pytest.mark.soak
def test_a_number_is_beyond_numeric_exactly_where_postgresql_says_so(bench_settings: Settings) -> None:
    random = Random(5)
    asked = [text for _ in range(amount(3_000, 30_000)) if not Numeral(text := numeral(random)).is_beyond_a_float()]
    asked = [text for text in asked if not Numeral(text).equals(0)]
    with connect(bench_settings).connect() as connection:
        query = sa.text("SELECT pg_input_is_valid(text, 'numeric') FROM unnest(CAST(:texts AS text[])) AS asked (text)")
        answers = connection.scalars(query, {"texts": asked}).all()
    for text, is_numeric in zip(asked, answers, strict=True):
        result = DECODERS["UTC"].decode_one(message(values=f'{{"a": {text}}}'))
        beyond = isinstance(result, Rejection)
        assert beyond != is_numeric, text[:500]
        if isinstance(result, Rejection):
            assert result.reason is Reason.VALUE_BEYOND_NUMERIC
    assert min(answers.count(True), answers.count(False)) > len(answers) / 20
