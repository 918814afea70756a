"""What a drain brings back: the frame of a batch's readings, its rejected messages, and its empty offsets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sensor_pipeline.messages import Decoded
from sensor_pipeline.offsets import OffsetRange
from sensor_pipeline.rules import Reason, Rejection

Headers = Sequence[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Records:
    """Records as Kafka delivered them, column by column, all of one topic.

    `timestamp_ms` is the record's own timestamp in milliseconds since 1970, -1 where it has none.
    `key_and_headers` looks up, by row, what only a rejected message needs.
    """

    partition: NDArray[np.int32]
    offset: NDArray[np.int64]
    timestamp_ms: NDArray[np.int64]
    value: list[bytes | None]
    key_and_headers: Callable[[int], tuple[bytes | None, Headers]]


@dataclass(frozen=True)
class RejectedMessage:
    """A message that can never become a reading, whole, with the reason.

    `timestamp_ms` is the record's own, as in `Records`.
    """

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    payload: bytes | None
    headers: Headers
    reason: str
    detail: str


@dataclass(frozen=True)
class Drained:
    """A batch as Kafka holds it.

    `readings` has a row for each accepted message: `partition` (int32), `offset` (int64), `machine`
    (categorical of machine ids as published), `timestamp` (datetime64[us, UTC]), `topic_rank` (0: a batch has
    one topic), `has_failure` (bool) and `values` (bytes, the JSON text). `no_record` are the offsets in range that
    hold no record.
    """

    readings: pd.DataFrame
    rejected: tuple[RejectedMessage, ...]
    no_record: tuple[OffsetRange, ...]

    @property
    def messages(self) -> int:
        """How many messages Kafka delivered."""
        return len(self.readings) + len(self.rejected)

    @property
    def rejected_by_reason(self) -> dict[str, int]:
        """How many messages were rejected, by reason code."""
        return dict(sorted(Counter(message.reason for message in self.rejected).items()))


class FrameBuilder:
    """Collects decoded chunks; `frame` puts them together once, so that no chunk is copied twice."""

    def __init__(self) -> None:
        self._partition: list[NDArray[np.int32]] = []
        self._offset: list[NDArray[np.int64]] = []
        self._timestamp: list[NDArray[np.datetime64]] = []
        self._has_failure: list[NDArray[np.bool_]] = []
        self._machine: list[str] = []
        self._values: list[bytes] = []
        self.rejected: list[RejectedMessage] = []

    def add(self, records: Records, decoded: Decoded) -> None:
        """Add a chunk."""
        self._partition.append(records.partition[decoded.index])
        self._offset.append(records.offset[decoded.index])
        self._timestamp.append(decoded.timestamp)
        self._has_failure.append(decoded.has_failure)
        self._machine += decoded.machine_id
        self._values += decoded.values
        for at, (reason, detail) in decoded.rejected:
            self.rejected.append(_rejected(records, at, reason, detail))

    def reject(self, records: Records, rejections: Mapping[tuple[int, int], Rejection]) -> None:
        """Add those of a chunk's records that are named, by partition and offset, as rejected messages."""
        places = zip(records.partition.tolist(), records.offset.tolist(), strict=True)
        self.rejected += [
            _rejected(records, at, *rejections[place]) for at, place in enumerate(places) if place in rejections
        ]

    def frame(self) -> pd.DataFrame:
        """The readings collected so far, as `Drained` describes them."""
        timestamp = np.concatenate([np.empty(0, "datetime64[us]"), *self._timestamp])
        values = np.empty(len(self._values), object)
        values[:] = self._values
        return pd.DataFrame(
            {
                "partition": np.concatenate([np.empty(0, np.int32), *self._partition]),
                "offset": np.concatenate([np.empty(0, np.int64), *self._offset]),
                "machine": pd.Categorical(np.array(self._machine, object)),
                "timestamp": pd.DatetimeIndex(timestamp).tz_localize("UTC"),
                "topic_rank": np.zeros(len(timestamp), np.int16),
                "has_failure": np.concatenate([np.empty(0, np.bool_), *self._has_failure]),
                "values": values,
            }
        )


def _rejected(records: Records, at: int, reason: Reason, detail: str) -> RejectedMessage:
    key, headers = records.key_and_headers(at)
    return RejectedMessage(
        partition=int(records.partition[at]),
        offset=int(records.offset[at]),
        timestamp_ms=int(records.timestamp_ms[at]),
        key=key,
        payload=records.value[at],
        headers=headers,
        reason=str(reason),
        detail=detail,
    )


def within(readings: pd.DataFrame, ranges: Sequence[OffsetRange]) -> NDArray[np.bool_]:
    """Which rows have a partition and offset that lie in one of the ranges."""
    partition = readings["partition"].to_numpy()
    offset = readings["offset"].to_numpy()
    inside = np.zeros(len(readings), np.bool_)
    for span in ranges:
        inside |= (partition == span.partition) & (offset >= span.start) & (offset < span.end)
    return inside
