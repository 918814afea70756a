"""Bytes of a Kafka message → a reading, or the reason why it can never become one.

The rules stand in `rules`. Nearly every message of a healthy fleet is accepted before them: by `plain`, many at once,
or by itself by a typed decoder (`_accept`). Both take only what the rules would take with the same result, and leave
everything else to them; property tests hold the three together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import compress
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensor_pipeline.plain import LONGEST, Plain, decode_message, find_plain
from sensor_pipeline.rules import (
    MAX_DEPTH,
    MAX_MACHINE_ID_CHARACTERS,
    Reading,
    Reason,
    RejectedError,
    Rejection,
    examine,
    parse_timestamp,
    too_old,
)

# In a message that is not too long a number exceeds `numeric` only by an exponent of five digits or more.
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

    def decode(
        self, messages: Sequence[bytes | None], record_ms: NDArray[np.int64], kept_from: date | None = None
    ) -> Decoded:
        """Decode messages, each with its Kafka record's timestamp in milliseconds (-1: it has none).

        Readings from before the day (in UTC) `kept_from` are rejected.
        """
        plain = find_plain(messages, most_bytes=self._max_message_bytes, naive_is_utc=self._zone is None)
        others: list[tuple[int, Reading]] = []
        rejected: list[tuple[int, Rejection]] = []
        for place in np.setdiff1d(np.arange(len(messages)), plain.place, assume_unique=True).tolist():
            result = self.decode_one(messages[place])
            if isinstance(result, Reading):
                others.append((place, result))
            else:
                rejected.append((place, result))
        accepted = _in_order(plain, others)
        keep = self._not_in_future(accepted.place, accepted.timestamp, record_ms, rejected)
        if kept_from is not None:
            keep &= _not_too_old(accepted.place, accepted.timestamp, kept_from, rejected)
        return Decoded(
            index=accepted.place[keep],
            machine_id=list(compress(accepted.machine_id, keep)),
            timestamp=accepted.timestamp[keep],
            has_failure=accepted.has_failure[keep],
            values=list(compress(accepted.values, keep)),
            rejected=rejected,
        )

    def decode_one(self, message: bytes | None) -> Reading | Rejection:
        """Decode one message by all rules but those on when it may be, which need more than the message."""
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
            len(message) > LONGEST
            or (b"\\" in message and b"\\u0000" in message)
            or message.count(b"{") + message.count(b"[") > MAX_DEPTH
        ):
            raise _NotPlainError
        if not message.isascii():
            message.decode()
        decoded = decode_message(message)
        values = bytes(decoded.readings.readings)
        _check_values(values)
        # Without a sign it is out of a float's range, or the mantissa is 0.
        if (b"e-" in values or b"e+" in values or b"0e" in values or b"E" in values) and _DEEP_EXPONENT.search(values):
            raise _NotPlainError
        machine_id = decoded.machine_id
        if not 0 < len(machine_id) <= MAX_MACHINE_ID_CHARACTERS:
            raise _NotPlainError
        moment = parse_timestamp(decoded.timestamp, self._zone)
        return Reading(machine_id, moment, bool(decoded.readings.has_failure), values)

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


def _not_too_old(
    places: NDArray[np.int64],
    timestamp: NDArray[np.datetime64],
    kept_from: date,
    rejected: list[tuple[int, Rejection]],
) -> NDArray[np.bool_]:
    """As `_not_in_future`."""
    old = timestamp < np.datetime64(kept_from)
    rejected += [(int(places[at]), too_old(timestamp[at], kept_from)) for at in np.flatnonzero(old)]
    keep: NDArray[np.bool_] = ~old
    return keep


def _in_order(plain: Plain, others: Sequence[tuple[int, Reading]]) -> Plain:
    """All of them, by their places."""
    if not others:
        return plain
    readings = [reading for _, reading in others]
    place = np.append(plain.place, np.array([place for place, _ in others], np.int64))
    timestamp = np.append(plain.timestamp, np.array([r.timestamp for r in readings], "datetime64[us]"))
    has_failure = np.append(plain.has_failure, np.array([r.has_failure for r in readings], np.bool_))
    machine_id = plain.machine_id + [r.machine_id for r in readings]
    values = plain.values + [r.values for r in readings]
    order = np.argsort(place)
    return Plain(
        place=place[order],
        machine_id=[machine_id[at] for at in order.tolist()],
        timestamp=timestamp[order],
        has_failure=has_failure[order],
        values=[values[at] for at in order.tolist()],
    )
