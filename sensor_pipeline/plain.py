"""Messages as nearly all of them are, decoded all at once.

A message is plain where its bytes alone show that every rule holds, and that PostgreSQL will read the same from them.
Each rule is asked of thousands of messages together, as one pass over their bytes: about 2 microseconds for a message
of 20 values, where one by one takes 9. What is not plain is left to `messages`; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensor_pipeline.rules import MAX_MACHINE_ID_CHARACTERS

# In a message of at most this length a number exceeds `numeric` only by its exponent.
LONGEST = 6_000
# Three objects: the message, `readings` and its `readings`. With no other brace and no bracket nothing is nested.
_BRACES = 3
# A float holds at most 308 digits before the point. A run of 255 digits holds an aligned block of 128.
_DIGITS = 128
_EIGHT_TRUE = 0x0101_0101_0101_0101

# What msgspec raises for a message that is not as it should be, or is none.
_REFUSED = (ValueError, TypeError, RecursionError)

_NO_TIME = np.datetime64("NaT", "us")
_SHORTEST_TIME = len("2026-01-01T12:00:00")
_LONGEST_TIME = len("2026-01-01T12:00:00.000000")
_SEPARATORS = {4: "-", 7: "-", 10: "T", 13: ":", 16: ":", 19: "."}
_PARTS = ((0, 4), (5, 7), (8, 10), (11, 13), (14, 16), (17, 19))


class Values(msgspec.Struct, gc=False):
    """The inner object of a message."""

    readings: msgspec.Raw = msgspec.Raw(b"{}")
    has_failure: bool | Literal[0, 1] = False


class Message(msgspec.Struct, gc=False):
    """A message's shape, by which msgspec checks it; `Raw` is checked to be JSON and kept as it is."""

    machine_id: str
    timestamp: str
    readings: Values


decode_message = msgspec.json.Decoder(Message).decode


@dataclass(frozen=True)
class Plain:
    """Columns of the plain messages; `place` says where each stood among all, ascending.

    `timestamp` is datetime64[us] in UTC, `values` the JSON text of the values' object.
    """

    place: NDArray[np.int64]
    machine_id: list[str]
    timestamp: NDArray[np.datetime64]
    has_failure: NDArray[np.bool_]
    values: list[bytes]


def find_plain(messages: Sequence[bytes | None], *, most_bytes: int, naive_is_utc: bool) -> Plain:
    """Decode those of the messages that are plain.

    Args:
        messages: values of Kafka messages.
        most_bytes: a longer message is not plain, nor is one over `LONGEST`.
        naive_is_utc: whether a timestamp without an offset is in UTC; otherwise it is not plain.
    """
    place, decoded = _decode(messages)
    texts = messages if len(decoded) == len(messages) else [messages[at] for at in place.tolist()]
    machine_id = [message.machine_id for message in decoded]
    timestamp = read_times([message.timestamp for message in decoded], naive_is_utc=naive_is_utc)
    has_failure = np.fromiter((message.readings.has_failure for message in decoded), np.bool_, len(decoded))
    values = [bytes(message.readings.readings) for message in decoded]
    characters = np.fromiter(map(len, machine_id), np.int64, len(machine_id))
    plain = (
        _is_plain_text(_Joined(texts), _Joined(values), min(most_bytes, LONGEST))  # type: ignore[arg-type]
        & (characters > 0)
        & (characters <= MAX_MACHINE_ID_CHARACTERS)
        & ~np.isnat(timestamp)
    )
    if not plain.all():
        kept = np.flatnonzero(plain).tolist()
        machine_id = [machine_id[at] for at in kept]
        values = [values[at] for at in kept]
    return Plain(place[plain], machine_id, timestamp[plain], has_failure[plain], values)


def _decode(messages: Sequence[bytes | None]) -> tuple[NDArray[np.int64], list[Message]]:
    """The messages that msgspec takes, and their places."""
    try:
        return np.arange(len(messages)), list(map(decode_message, messages))  # type: ignore[arg-type]
    except _REFUSED:
        pass
    place: list[int] = []
    decoded: list[Message] = []
    for at, message in enumerate(messages):
        try:
            decoded.append(decode_message(message))  # type: ignore[arg-type]
        except _REFUSED:
            continue
        place.append(at)
    return np.array(place, np.int64), decoded


class _Joined:
    """Texts one after the other, so that one pass asks all of them."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.text = b",".join(texts)
        self.bytes = np.frombuffer(self.text, np.uint8)
        self.length = np.fromiter(map(len, texts), np.int64, len(texts))
        self.start = np.cumsum(self.length + 1) - self.length - 1

    @cached_property
    def is_digit(self) -> NDArray[np.bool_]:
        """For each byte."""
        return self.bytes - ord("0") <= 9  # what stands before "0" wraps around

    def count(self, hits: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the hits, one for each byte, each text has."""
        rows = np.searchsorted(self.start, np.flatnonzero(hits), "right") - 1
        return np.bincount(rows, minlength=len(self.start))

    def has(self, byte: bytes) -> NDArray[np.bool_]:
        """Which texts have this byte."""
        if byte not in self.text:
            return np.zeros(len(self.start), np.bool_)
        return self.count(self.bytes == ord(byte)) > 0


def _is_plain_text(messages: _Joined, values: _Joined, most_bytes: int) -> NDArray[np.bool_]:
    """Which messages, with `values` as their innermost object, are plain by their bytes."""
    plain: NDArray[np.bool_] = (messages.length <= most_bytes) & _is_flat(messages, values) & _is_utf8(messages)
    return plain & ~_has_exponent(values) & ~_has_long_number(values)


def _is_flat(messages: _Joined, values: _Joined) -> NDArray[np.bool_]:
    """No escapes, and nothing nested in the values or beside them."""
    flat: NDArray[np.bool_] = ~messages.has(b"\\") & ~messages.has(b"[")
    is_object = values.bytes[values.start] == ord("{")
    flat &= is_object
    braces = messages.bytes == ord("{")
    # Only where each message has three at least does their sum say that none has more: one without values, or with
    # values that are no object, has two.
    has_three = is_object.all() and values.length.min(initial=_BRACES) > len("{}")
    if not has_three or np.count_nonzero(braces) != _BRACES * len(flat):
        flat &= messages.count(braces) == _BRACES
    return flat


def _is_utf8(messages: _Joined) -> NDArray[np.bool_]:
    valid = np.ones(len(messages.start), np.bool_)
    if not messages.text.isascii():
        for at in np.flatnonzero(messages.count(messages.bytes >= 0x80)).tolist():
            start = messages.start[at]
            try:
                messages.text[start : start + messages.length[at]].decode()
            except UnicodeDecodeError:
                valid[at] = False
    return valid


def _has_exponent(values: _Joined) -> NDArray[np.bool_]:
    """A digit before an "e", as in 1e5; also in a name such as "Sensor 1e", which is then read by the rules."""
    exponent = (values.bytes | 0x20) == ord("e")
    exponent[1:] &= values.is_digit[:-1]
    return values.count(exponent) > 0


def _has_long_number(values: _Joined) -> NDArray[np.bool_]:
    """More digits than a float can hold; only their middle is looked for."""
    digit = values.is_digit
    eights = digit[: len(digit) // _DIGITS * _DIGITS].view(np.uint64) == _EIGHT_TRUE
    blocks = eights.reshape(-1, _DIGITS // 8).all(axis=1)
    if not blocks.any():
        return np.zeros(len(values.start), np.bool_)
    return values.count(np.append(np.repeat(blocks, _DIGITS), np.zeros(len(digit) % _DIGITS, np.bool_))) > 0


def read_times(texts: Sequence[str], *, naive_is_utc: bool) -> NDArray[np.datetime64]:
    """Times as datetime64[us] in UTC, NaT where one is not written as `YYYY-MM-DDThh:mm:ss[.ffffff][Z|+00:00]`."""
    times = np.full(len(texts), _NO_TIME)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    for length in np.unique(lengths).tolist():
        if length < _SHORTEST_TIME:
            continue
        rows = np.flatnonzero(lengths == length)
        same = texts if len(rows) == len(texts) else [texts[row] for row in rows.tolist()]
        # A character beyond ASCII becomes one question mark.
        letters = np.frombuffer("".join(same).encode("ascii", "replace"), np.uint8).reshape(-1, length)
        for zone in ("Z", "+00:00", ""):
            width = length - len(zone)
            if (zone or naive_is_utc) and _SHORTEST_TIME <= width <= _LONGEST_TIME:
                in_zone = (letters[:, width:] == np.frombuffer(zone.encode(), np.uint8)).all(axis=1)
                in_zone &= np.isnat(times[rows])
                if in_zone.any():
                    times[rows[in_zone]] = _read_same_length(letters[in_zone, :width])
    return times


def _read_same_length(letters: NDArray[np.uint8]) -> NDArray[np.datetime64]:
    """Times whose texts, a row each, have no zone and are equally long."""
    width = letters.shape[1]
    columns = np.ascontiguousarray(letters.T)
    digits = columns - ord("0")  # what stands before "0" wraps around
    fits = np.full(len(letters), width != len("2026-01-01T12:00:00."))
    for at, (column, digit) in enumerate(zip(columns, digits, strict=True)):
        fits &= column == ord(_SEPARATORS[at]) if at in _SEPARATORS else digit <= 9
    digits = np.where(fits, digits, 0)

    def number(start: int, end: int) -> NDArray[np.int64]:
        value = np.zeros(len(letters), np.int64)
        for digit in digits[start:end]:
            value = value * 10 + digit
        return value

    year, month, day, hour, minute, second = (number(*part) for part in _PARTS)
    microsecond = number(20, width) * 10 ** (26 - max(width, 20))
    first = (year * 12 + month - 1 - 1970 * 12).astype("datetime64[M]")
    days = ((first + 1).astype("datetime64[D]") - first.astype("datetime64[D]")).astype(np.int64)
    fits &= (year > 0) & (month > 0) & (month <= 12) & (day > 0) & (day <= days)
    fits &= (hour < 24) & (minute < 60) & (second < 60)
    seconds = hour * 3600 + minute * 60 + second
    times = first.astype("datetime64[D]") + (day - 1)
    result = times.astype("datetime64[us]") + (seconds * 1_000_000 + microsecond)
    return np.where(fits, result, _NO_TIME)
