"""Bytes of a Kafka message → a reading, or the reason why it can never become one.

The rules stand in `rules`. Nearly every message of a healthy fleet is accepted before them by a typed decoder
(`_accept`, about ten times as fast), which takes only what the rules would take with the same result and leaves
everything else to them; a property test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensor_pipeline.rules import (
    MAX_DEPTH,
    MAX_MACHINE_ID_CHARACTERS,
    Reading,
    Reason,
    RejectedError,
    Rejection,
    examine,
    parse_timestamp,
)

# In a message of at most this length a number exceeds that only by an exponent of five digits or more.
_PLAIN_MESSAGE_BYTES = 6_000
_DEEP_EXPONENT = re.compile(rb"[eE][+-]?[0-9]{5}")
# A record's timestamp may be anything; no reading lies beyond year 9999, so neither need these.
_LAST_RECORD_MS = 253_402_300_800_000
_LONGEST_FUTURE = timedelta(days=3_660_000)


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


class _Values(msgspec.Struct):
    readings: msgspec.Raw = msgspec.Raw(b"{}")
    has_failure: bool = False


class _Message(msgspec.Struct):
    machine_id: str
    timestamp: str
    readings: _Values


_decode_message = msgspec.json.Decoder(_Message).decode
_check_values = msgspec.json.Decoder(dict[str, float | str | bool | None]).decode


class _NotPlainError(Exception):
    """The fast path does not take this message; the rules decide."""


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
            return examine(message, self._zone)
        except RejectedError as error:
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
        return Reading(machine_id, parse_timestamp(decoded.timestamp, self._zone), decoded.readings.has_failure, values)

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
