"""Bytes of a Kafka message → a reading, or the reason why it can never become one.

The rules stand once, in `_examine`, in plain Python. Nearly every message of a healthy fleet is accepted
before that by a typed decoder (`_accept`, about ten times as fast), which takes only what `_examine` would
take with the same result and leaves everything else to it; a property test holds the two together.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any, NamedTuple, NoReturn
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
from numpy.typing import NDArray


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


class Reading(NamedTuple):
    """One accepted message."""

    machine_id: str
    timestamp: datetime  # naive, in UTC: what numpy takes without a conversion
    has_failure: bool
    values: bytes  # the JSON text of an object of sensor name to number, string, boolean or null


@dataclass(frozen=True)
class Decoded:
    """Columns of the accepted messages, in order, and the rejected ones.

    `index` says at which place of the input each reading stood; `rejected` pairs that place with the reason.
    `timestamp` is datetime64[us] in UTC.
    """

    index: NDArray[np.int64]
    machine_id: list[str]
    timestamp: NDArray[np.datetime64]
    has_failure: NDArray[np.bool_]
    values: list[bytes]
    rejected: list[tuple[int, Rejection]]


MAX_MACHINE_ID_CHARACTERS = 255
MAX_DEPTH = 64

# PostgreSQL's numeric holds at most this many digits after the point; a float has at most 309 before it.
_NUMERIC_MAX_SCALE = 16_383
# In a message of at most this length a number exceeds that only by an exponent of five digits or more.
_PLAIN_MESSAGE_BYTES = 6_000
_DEEP_EXPONENT = re.compile(rb"[eE][+-]?[0-9]{5}")
# Possessive: an unterminated string of escapes is decided in one pass.
_JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# datetime.fromisoformat takes more than ISO 8601 (any separator, a fraction of a minute as one of a second, from
# Python 3.13 on 24:00), and not the same in every version.
_ISO_8601 = re.compile(
    r"(?:[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{8}|[0-9]{4}-W[0-9]{2}(?:-[0-9])?|[0-9]{4}W[0-9]{2}[0-9]?)"
    r"(?:[T ](?:[01][0-9]|2[0-3])(?::[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?|[0-9]{2}(?:[0-9]{2}(?:[.,][0-9]+)?)?)?"
    r"(?:Z|[+-][0-9]{2}(?::?[0-9]{2}(?::?[0-9]{2}(?:[.,][0-9]+)?)?)?)?)?"
)
# A record's timestamp may be anything; no reading lies beyond year 9999, so neither need these.
_LAST_RECORD_MS = 253_402_300_800_000
_LONGEST_FUTURE = timedelta(days=3_660_000)


class _Values(msgspec.Struct):
    readings: msgspec.Raw = msgspec.Raw(b"{}")
    has_failure: bool = False


class _Message(msgspec.Struct):
    machine_id: str
    timestamp: str
    readings: _Values


_decode_message = msgspec.json.Decoder(_Message).decode
_check_values = msgspec.json.Decoder(dict[str, float | str | bool | None]).decode


class _RejectedError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        self.rejection = Rejection(reason, detail)


class _NotPlainError(Exception):
    """The fast path does not take this message; `_examine` decides."""


class MessageDecoder:
    """Decodes messages by the rules that settings may change.

    Args:
        max_future: how far a timestamp may lie ahead of its Kafka record's.
        naive_timestamp_tz: the zone of timestamps without an offset.
        max_message_bytes: a longer message is rejected unread.
    """

    def __init__(self, max_future: timedelta, naive_timestamp_tz: ZoneInfo, max_message_bytes: int) -> None:
        self._max_future = np.timedelta64(min(max_future, _LONGEST_FUTURE))
        self._zone = None if naive_timestamp_tz.key == "UTC" else naive_timestamp_tz
        self._max_message_bytes = max_message_bytes

    def decode(self, messages: Iterable[bytes | None], record_ms: NDArray[np.int64]) -> Decoded:
        """Decode messages, each with its Kafka record's timestamp in milliseconds (-1: it has none)."""
        accepted: list[Reading] = []
        index: list[int] = []
        rejected: list[tuple[int, Rejection]] = []
        for place, message in enumerate(messages):
            result = self.decode_one(message)
            if isinstance(result, Reading):
                accepted.append(result)
                index.append(place)
            else:
                rejected.append((place, result))
        places = np.array(index, np.int64)
        timestamp = np.array([reading.timestamp for reading in accepted], "datetime64[us]")
        keep = self._not_in_future(places, timestamp, record_ms, rejected)
        if not keep.all():
            accepted = [reading for reading, kept in zip(accepted, keep, strict=True) if kept]
        return Decoded(
            index=places[keep],
            machine_id=[reading.machine_id for reading in accepted],
            timestamp=timestamp[keep],
            has_failure=np.array([reading.has_failure for reading in accepted], np.bool_),
            values=[reading.values for reading in accepted],
            rejected=rejected,
        )

    def decode_one(self, message: bytes | None) -> Reading | Rejection:
        """Decode one message by all rules but `timestamp_in_future`, which needs the record's timestamp."""
        if message is None:
            return Rejection(Reason.TOMBSTONE, "the message has no value")
        if len(message) > self._max_message_bytes:
            limit = self._max_message_bytes
            return Rejection(Reason.TOO_LARGE, f"{len(message)} bytes, at most {limit} are taken")
        try:
            return self._accept(message)
        except (_NotPlainError, ValueError, RecursionError, OverflowError):
            # ValueError is the root of msgspec's errors, of UnicodeDecodeError and of an unreadable timestamp.
            pass
        try:
            return self._examine(message)
        except _RejectedError as error:
            return error.rejection

    def _accept(self, message: bytes) -> Reading:
        """The fast path."""
        if (
            len(message) > _PLAIN_MESSAGE_BYTES
            or (b"\\" in message and b"\\u0000" in message)
            or message.count(b"{") + message.count(b"[") > MAX_DEPTH
        ):
            raise _NotPlainError
        if not message.isascii():
            message.decode()
        decoded = _decode_message(message)
        values = bytes(decoded.readings.readings)
        _check_values(values)
        # Without a sign it is out of a float's range, or the mantissa is 0.
        if (b"e-" in values or b"e+" in values or b"0e" in values or b"E" in values) and _DEEP_EXPONENT.search(values):
            raise _NotPlainError
        machine_id = decoded.machine_id
        if not 0 < len(machine_id) <= MAX_MACHINE_ID_CHARACTERS:
            raise _NotPlainError
        return Reading(machine_id, self._parse_timestamp(decoded.timestamp), decoded.readings.has_failure, values)

    def _examine(self, message: bytes) -> Reading:
        """Every rule, in the order in which a person would look; raises the first one broken."""
        document = _parse_json(message)
        if not isinstance(document, dict):
            _reject(Reason.NOT_AN_OBJECT, f"the message is {_kind(document)}")
        machine_id = _machine_id(document)
        timestamp = self._timestamp(document)
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

    def _timestamp(self, document: dict[str, Any]) -> datetime:
        if "timestamp" not in document:
            _reject(Reason.MISSING_TIMESTAMP, "there is no 'timestamp'")
        text = document["timestamp"]
        if not isinstance(text, str):
            _reject(Reason.TIMESTAMP_NOT_STRING, f"'timestamp' is {_kind(text)}")
        try:
            return self._parse_timestamp(text)
        except OverflowError:
            _reject(Reason.TIMESTAMP_OUT_OF_RANGE, f"{_quoted(text)} is outside the years 1 to 9999 in UTC")
        except ValueError:
            _reject(Reason.TIMESTAMP_UNREADABLE, f"{_quoted(text)} is not an ISO 8601 date and time")

    def _parse_timestamp(self, text: str) -> datetime:
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
        if moment.isoformat() != text and not _ISO_8601.fullmatch(text.upper()):
            raise ValueError(text)
        if moment.tzinfo is None:
            if self._zone is None:
                return moment
            moment = moment.replace(tzinfo=self._zone)
        return moment.astimezone(UTC).replace(tzinfo=None)

    def _not_in_future(
        self,
        places: NDArray[np.int64],
        timestamp: NDArray[np.datetime64],
        record_ms: NDArray[np.int64],
        rejected: list[tuple[int, Rejection]],
    ) -> NDArray[np.bool_]:
        """Which readings to keep; the others are added to `rejected`."""
        recorded = record_ms[places]
        moments = np.clip(recorded, 0, _LAST_RECORD_MS).astype("datetime64[ms]").astype("datetime64[us]")
        future = (recorded >= 0) & (timestamp - moments > self._max_future)
        for at in np.flatnonzero(future):
            detail = f"{timestamp[at]} UTC is more than MAX_FUTURE ahead of the record's {moments[at]} UTC"
            rejected.append((int(places[at]), Rejection(Reason.TIMESTAMP_IN_FUTURE, detail)))
        keep: NDArray[np.bool_] = ~future
        return keep


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
        except InvalidOperation:  # its exponent is beyond any number's
            number = Decimal("nan")
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
    raise _RejectedError(reason, detail)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", _Number: "a number"}
    return names.get(type(value), "null")


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:80] + "…")


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode().replace("\x00", "\\x00")
