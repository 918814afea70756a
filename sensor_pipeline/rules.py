"""What a message must be to become a reading: every rule, once, in plain Python."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any, NamedTuple, NoReturn
from zoneinfo import ZoneInfo


class Reason(StrEnum):
    """Why a message was rejected; the code is stored, so none is renamed."""

    TOMBSTONE = "tombstone"
    TOO_LARGE = "too_large"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NESTED_TOO_DEEP = "nested_too_deep"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_MACHINE_ID = "missing_machine_id"
    MACHINE_ID_NOT_STRING = "machine_id_not_string"
    MACHINE_ID_EMPTY = "machine_id_empty"
    MACHINE_ID_TOO_LONG = "machine_id_too_long"
    MISSING_TIMESTAMP = "missing_timestamp"
    TIMESTAMP_NOT_STRING = "timestamp_not_string"
    TIMESTAMP_UNREADABLE = "timestamp_unreadable"
    TIMESTAMP_OUT_OF_RANGE = "timestamp_out_of_range"
    TIMESTAMP_IN_FUTURE = "timestamp_in_future"
    TIMESTAMP_TOO_OLD = "timestamp_too_old"
    MISSING_READINGS = "missing_readings"
    READINGS_NOT_OBJECT = "readings_not_object"
    VALUES_NOT_OBJECT = "values_not_object"
    HAS_FAILURE_NOT_BOOLEAN = "has_failure_not_boolean"
    VALUE_NESTED = "value_nested"
    VALUE_OUT_OF_RANGE = "value_out_of_range"
    VALUE_BEYOND_NUMERIC = "value_beyond_numeric"
    STRING_HAS_NUL = "string_has_nul"
    STRING_HAS_LONE_SURROGATE = "string_has_lone_surrogate"
    # Said by the database, not by the decoder.
    REFUSED_BY_DATABASE = "refused_by_database"


class Rejection(NamedTuple):
    """The code and, for a person, what exactly was wrong."""

    reason: Reason
    detail: str


def too_old(timestamp: object, kept_from: date) -> Rejection:
    """The rejection of a reading from before the day (in UTC) from which on readings are kept."""
    return Rejection(
        Reason.TIMESTAMP_TOO_OLD,
        f"{timestamp} UTC is before {kept_from.isoformat()}: readings from before that day were dropped "
        "(READINGS_KEPT_DAYS), and none are taken any more",
    )


class Reading(NamedTuple):
    """One accepted message."""

    machine_id: str
    timestamp: datetime  # naive, in UTC: what numpy takes without a conversion
    has_failure: bool
    values: bytes  # the JSON text of an object of sensor name to number, string, boolean or null


MAX_MACHINE_ID_CHARACTERS = 255
MAX_DEPTH = 64

# PostgreSQL's numeric holds at most this many digits after the point; a float has at most 309 before it.
_NUMERIC_MAX_SCALE = 16_383
# Possessive: an unterminated string of escapes is decided in one pass.
_JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# datetime.fromisoformat takes more than ISO 8601 (any separator, a fraction of a minute as one of a second, an offset
# of 99 minutes, from Python 3.13 on 24:00), and not the same in every version.
_ISO_8601 = re.compile(
    r"(?:[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{8}|[0-9]{4}-W[0-9]{2}(?:-[0-9])?|[0-9]{4}W[0-9]{2}[0-9]?)"
    r"(?:[T ](?:[01][0-9]|2[0-3])(?::[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?|[0-9]{2}(?:[0-9]{2}(?:[.,][0-9]+)?)?)?"
    r"(?:Z|[+-][0-9]{2}(?::?[0-5][0-9](?::?[0-5][0-9])?)?)?)?"
)

_LONGEST_PLAIN_TIMESTAMP = len("2026-01-01T12:00:00.000000+00:00")


class RejectedError(Exception):
    """A rule is broken."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.rejection = Rejection(reason, detail)


def examine(message: bytes, zone: ZoneInfo | None) -> Reading:
    """Read a message by every rule, in the order in which a person would look.

    Args:
        message: the Kafka message's value.
        zone: of timestamps without an offset; None for UTC.

    Raises:
        RejectedError: with the first rule that is broken.
    """
    document = _parse_json(message)
    if not isinstance(document, dict):
        _reject(Reason.NOT_AN_OBJECT, f"the message is {_kind(document)}")
    machine_id = _machine_id(document)
    timestamp = _timestamp(document, zone)
    if "readings" not in document:
        _reject(Reason.MISSING_READINGS, "there is no 'readings'")
    readings = document["readings"]
    if not isinstance(readings, dict):
        _reject(Reason.READINGS_NOT_OBJECT, f"'readings' is {_kind(readings)}")
    values = readings.get("readings", {})
    if not isinstance(values, dict):
        _reject(Reason.VALUES_NOT_OBJECT, f"'readings.readings' is {_kind(values)}")
    has_failure = _has_failure(readings.get("has_failure", False))
    members = [f"{_string_text('a sensor name', k)}:{_value_text(k, v)}" for k, v in values.items()]
    return Reading(machine_id, timestamp, has_failure, ("{" + ",".join(members) + "}").encode())


def parse_timestamp(text: str, zone: ZoneInfo | None) -> datetime:
    """ISO 8601 → naive UTC; digits beyond microseconds are cut.

    Raises:
        ValueError: it is not ISO 8601.
        OverflowError: in UTC it is before year 1 or after year 9999.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        # RFC 3339 allows "t" and "z".
        moment = datetime.fromisoformat(text.upper())
    # What Python writes is read without the pattern, unless it is longer than any with an offset of whole minutes.
    is_written_so = moment.isoformat() == text and len(text) <= _LONGEST_PLAIN_TIMESTAMP
    if not is_written_so and not _ISO_8601.fullmatch(text.upper()):
        raise ValueError(text)
    if moment.tzinfo is None:
        if zone is None:
            return moment
        moment = moment.replace(tzinfo=zone)
    return moment.astimezone(UTC).replace(tzinfo=None)


def _timestamp(document: dict[str, Any], zone: ZoneInfo | None) -> datetime:
    if "timestamp" not in document:
        _reject(Reason.MISSING_TIMESTAMP, "there is no 'timestamp'")
    text = document["timestamp"]
    if not isinstance(text, str):
        _reject(Reason.TIMESTAMP_NOT_STRING, f"'timestamp' is {_kind(text)}")
    try:
        return parse_timestamp(text, zone)
    except OverflowError:
        _reject(Reason.TIMESTAMP_OUT_OF_RANGE, f"{_quoted(text)} is outside the years 1 to 9999 in UTC")
    except ValueError:
        _reject(Reason.TIMESTAMP_UNREADABLE, f"{_quoted(text)} is not an ISO 8601 date and time")


class _Number:
    """A JSON number as it was written: a float would change its value."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def _parse_json(message: bytes) -> object:
    try:
        text = message.decode()
    except UnicodeDecodeError as error:
        _reject(Reason.NOT_UTF8, f"byte {error.start} is not UTF-8")
    # Known beforehand, so that the answer does not depend on how deep the caller's own stack is.
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        _reject(Reason.NESTED_TOO_DEEP, f"nested deeper than {MAX_DEPTH}")
    try:
        return json.loads(text, parse_int=_Number, parse_float=_Number, parse_constant=_no_constant)
    except ValueError as error:
        _reject(Reason.NOT_JSON, _printable(str(error)))


def _depth(text: str) -> int:
    deepest = depth = 0
    for bracket in re.findall(r"[\[\]{}]", _JSON_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _machine_id(document: dict[str, Any]) -> str:
    if "machine_id" not in document:
        _reject(Reason.MISSING_MACHINE_ID, "there is no 'machine_id'")
    machine_id = document["machine_id"]
    if not isinstance(machine_id, str):
        _reject(Reason.MACHINE_ID_NOT_STRING, f"'machine_id' is {_kind(machine_id)}")
    if not machine_id:
        _reject(Reason.MACHINE_ID_EMPTY, "'machine_id' is empty")
    if len(machine_id) > MAX_MACHINE_ID_CHARACTERS:
        detail = f"'machine_id' has {len(machine_id)} characters, at most {MAX_MACHINE_ID_CHARACTERS} are taken"
        _reject(Reason.MACHINE_ID_TOO_LONG, detail)
    _string_text("'machine_id'", machine_id)
    return machine_id


def _has_failure(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, _Number):
        try:
            number = Decimal(value.text)
        except InvalidOperation:  # its exponent is beyond any number's, but zero it may be all the same
            mantissa = Decimal(value.text.lower().partition("e")[0])
            number = mantissa if mantissa == 0 else Decimal("nan")
        if number in (0, 1):
            return bool(number)
    _reject(Reason.HAS_FAILURE_NOT_BOOLEAN, f"'has_failure' is {_kind(value)}, not a boolean, 0 or 1")


def _value_text(sensor: str, value: object) -> str:
    if isinstance(value, _Number):
        return _number_text(sensor, value.text)
    if isinstance(value, str):
        return _string_text(f"the value of {_quoted(sensor)}", value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    _reject(Reason.VALUE_NESTED, f"the value of {_quoted(sensor)} is {_kind(value)}")


def _number_text(sensor: str, text: str) -> str:
    if math.isinf(float(text)):
        _reject(Reason.VALUE_OUT_OF_RANGE, f"the value of {_quoted(sensor)} is out of a float's range")
    mantissa, _, exponent = text.lower().partition("e")
    digits_after_point = len(mantissa.partition(".")[2])
    power = exponent.lstrip("+-0") or "0"
    # Seven digits are beyond any numeric; a longer exponent would be slow to read and int() refuses 4,300.
    shift = int(power[:7]) * (-1 if exponent.startswith("-") else 1)
    if digits_after_point - shift > _NUMERIC_MAX_SCALE:
        detail = f"the value of {_quoted(sensor)} has more than {_NUMERIC_MAX_SCALE} digits after the point"
        _reject(Reason.VALUE_BEYOND_NUMERIC, detail)
    return "0" if float(text) == 0 and shift > 0 else text


def _string_text(what: str, text: str) -> str:
    """The JSON text of a string that PostgreSQL can hold."""
    if "\x00" in text:
        _reject(Reason.STRING_HAS_NUL, f"{what} has a NUL character")
    if _LONE_SURROGATE.search(text):
        _reject(Reason.STRING_HAS_LONE_SURROGATE, f"{what} has a lone surrogate")
    return json.dumps(text, ensure_ascii=False)


def _reject(reason: Reason, detail: str) -> NoReturn:
    raise RejectedError(reason, detail)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", _Number: "a number"}
    return names.get(type(value), "null")


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:80] + "…")


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode().replace("\x00", "\\x00")
