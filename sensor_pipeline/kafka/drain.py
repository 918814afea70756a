"""The drain: reads offset ranges of a topic, bounded by the consumer's position, and sees which offsets are empty."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import compress
from operator import itemgetter, methodcaller
from typing import TYPE_CHECKING

import numpy as np
from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, Message, TopicPartition
from numpy.typing import NDArray

from sensor_pipeline.drained import Headers, Records
from sensor_pipeline.errors import ConfigurationError, UnavailableError
from sensor_pipeline.kafka.errors import OUT_OF_RANGE, gap_error
from sensor_pipeline.offsets import Batch, OffsetRange, hull, intersect, total

if TYPE_CHECKING:
    from sensor_pipeline.kafka.cluster import Kafka, Topic

# Large enough that the work in Python for each chunk is lost among that for each message, small enough that what is
# made of a chunk's bytes stays in the processor's cache: decoding takes 1.8 us a message, and 2.4 in chunks of 5,000.
_CHUNK_MESSAGES = 2_000
# How long the drain waits for a full chunk: a batch's last messages wait that long where offsets hold no record.
_POLL_SECONDS = 0.1

# Kafka takes any bytes for a header's name. On one that is not UTF-8 the client's C code (as of 2.16) sets an error and
# nevertheless returns a list, with a hole in place of the name. CPython notices where it checks what a call returned,
# as it does here, and raises SystemError. A call written as usual is not checked once the interpreter has specialized
# it: then the list gets through, and to look at its hole ends the process.
_ask_for_headers = methodcaller("headers")
_UNREADABLE = "headers with a name that is not UTF-8"


class Drain:
    """One reading of a batch's offsets.

    Args:
        kafka: where to read.
        batch: says which topic it must be, before, during and after.
        wanted: the offsets to read; what lies between two ranges of a partition is read too.
        stall_timeout: seconds without any progress after which it gives up.
    """

    def __init__(self, kafka: Kafka, batch: Batch, wanted: Sequence[OffsetRange], stall_timeout: float) -> None:
        self._kafka = kafka
        self._batch = batch
        self._wanted = wanted
        self._stall_timeout = stall_timeout
        self._progress = _Progress(hull(wanted))

    def run(self) -> Iterator[Records | list[OffsetRange]]:
        """Yield chunks of records as they come, and at last the list of offsets that hold no record."""
        topic = self._kafka.check_topic(self._batch)
        self._check_ranges(topic)
        with self._kafka.consumer() as consumer:
            consumer.assign([TopicPartition(topic.name, r.partition, r.start) for r in self._progress.open])
            stalled_at = time.monotonic() + self._stall_timeout
            while left := self._progress.open:
                most = min(_CHUNK_MESSAGES, total(left))
                before = self._progress.position()
                messages = self._kafka.call(partial(consumer.consume, most, _POLL_SECONDS), topic.name)
                if records := self._take(messages):
                    yield records
                if len(messages) < most:
                    self._advance_by_position(consumer)
                if done := {r.partition for r in left} - {r.partition for r in self._progress.open}:
                    # Otherwise it would fetch on, and fail where retention takes what comes after the range.
                    consumer.pause([TopicPartition(topic.name, p) for p in sorted(done)])
                if self._progress.position() != before:
                    stalled_at = time.monotonic() + self._stall_timeout
                elif time.monotonic() > stalled_at:
                    self._kafka.check_topic(self._batch)
                    raise UnavailableError(
                        f"no progress for {self._stall_timeout:.0f} s while reading {topic.name} "
                        f"{' '.join(map(str, left))} from {self._kafka.servers}{self._kafka.said()}; check it, then "
                        "try again"
                    )
        self._kafka.check_topic(self._batch)
        yield self._progress.no_record

    def _check_ranges(self, topic: Topic) -> None:
        unknown = sorted({r.partition for r in self._wanted} - set(topic.partitions))
        if unknown:
            raise ConfigurationError(f"topic {topic.name} has no partition {', '.join(map(str, unknown))}")
        self._check_gap(topic)
        end = self._kafka.end_offsets(topic)
        early = [f"{r} (its end is {end[r.partition]})" for r in self._wanted if r.end > end[r.partition]]
        if early:
            raise UnavailableError(
                f"topic {topic.name} does not reach as far as the batch yet, or an open transaction holds it back: "
                f"{', '.join(early)}; correct the ranges, or try again later"
            )

    def _check_gap(self, topic: Topic) -> None:
        gone = [OffsetRange(p, 0, first) for p, first in self._kafka.first_offsets(topic).items()]
        if lost := intersect(self._wanted, gone):
            raise gap_error(topic.name, lost)

    def _take(self, messages: Sequence[Message]) -> Records | None:
        errors = list(map(Message.error, messages))
        delivered = [message for message, error in zip(messages, errors, strict=True) if error is None]
        partition = np.fromiter(map(Message.partition, delivered), np.int32, len(delivered))
        offset = np.fromiter(map(Message.offset, delivered), np.int64, len(delivered))
        keep = self._progress.delivered(partition, offset)
        # Only now: an end of partition that stands in this chunk comes after the records that stand in it.
        for message, error in zip(messages, errors, strict=True):
            if error is not None:
                self._heed(message, error)
        kept = list(compress(delivered, keep))
        if not kept:
            return None
        return Records(
            partition=partition[keep],
            offset=offset[keep],
            timestamp_ms=np.fromiter(map(itemgetter(1), map(Message.timestamp, kept)), np.int64, len(kept)),
            value=list(map(Message.value, kept)),
            key_and_headers=lambda at: (_bytes(kept[at].key()), _headers(kept[at])),
        )

    def _heed(self, message: Message, error: KafkaError) -> None:
        """An end of partition, or something wrong."""
        partition, offset = message.partition(), message.offset()
        if self._progress.is_read(partition):
            return
        if error.code() == KafkaError._PARTITION_EOF and partition is not None and offset is not None:
            if not self._progress.reached(partition, offset):
                # The range lay before the end when it was checked: the log was cut, or is another topic's.
                self._kafka.check_topic(self._batch)
            return
        topic = self._kafka.check_topic(self._batch)
        if error.code() in OUT_OF_RANGE:
            self._check_gap(topic)
        raise self._kafka.error(error, topic.name)

    def _advance_by_position(self, consumer: Consumer) -> None:
        """Transaction markers move the position and deliver nothing."""
        wanted = [TopicPartition(self._batch.topic, r.partition) for r in self._progress.open]
        for entry in self._kafka.call(lambda: consumer.position(wanted), self._batch.topic):
            if entry.offset != OFFSET_INVALID:
                self._progress.reached(entry.partition, entry.offset)


class _Progress:
    """How far each partition's range was read, and which of its offsets held no record."""

    def __init__(self, ranges: Sequence[OffsetRange]) -> None:
        self._next = {r.partition: r.start for r in ranges}
        self._end = {r.partition: r.end for r in ranges}
        self.no_record: list[OffsetRange] = []

    @property
    def open(self) -> list[OffsetRange]:
        """What is still to be read."""
        return [OffsetRange(p, at, self._end[p]) for p, at in self._next.items() if at < self._end[p]]

    def is_read(self, partition: int | None) -> bool:
        """Whether it is one of the partitions, and read to its range's end."""
        return partition in self._next and self._next[partition] >= self._end[partition]

    def position(self) -> int:
        """The sum of the positions, which grows with any progress."""
        return sum(self._next.values())

    def reached(self, partition: int, position: int) -> bool:
        """The consumer's position: whatever lies before it and was not delivered holds no record.

        Returns:
            Whether that is the end of the partition's range.
        """
        position = min(position, self._end[partition])
        if position > self._next[partition]:
            self.no_record.append(OffsetRange(partition, self._next[partition], position))
            self._next[partition] = position
        return self._next[partition] >= self._end[partition]

    def delivered(self, partition: NDArray[np.int32], offset: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the delivered records belong to the ranges; the holes between them are noted."""
        keep = np.zeros(len(offset), np.bool_)
        for p in np.unique(partition).tolist():
            mine = partition == p
            in_range = mine & (offset >= self._next[p]) & (offset < self._end[p])
            offsets = offset[in_range]
            expected = np.concatenate([[self._next[p]], offsets[:-1] + 1]) if len(offsets) else offsets
            for hole in np.flatnonzero(offsets > expected):
                self.no_record.append(OffsetRange(p, int(expected[hole]), int(offsets[hole])))
            if len(offsets):
                self._next[p] = int(offsets[-1]) + 1
            # A record at or after the end shows that nothing more lies before it.
            self.reached(p, int(offset[mine].max()))
            keep |= in_range
        return keep


def _bytes(value: object) -> bytes | None:
    return value.encode() if isinstance(value, str) else value  # type: ignore[return-value]


def _headers(message: Message) -> Headers:
    """Of a rejected message, which alone is kept with them; where a name is not UTF-8 there is no safe way to any."""
    try:
        pairs: list[tuple[str, object]] = _ask_for_headers(message) or []
    except (UnicodeDecodeError, SystemError):
        # Otherwise whoever asks next is given the list with the hole.
        message.set_headers([(_UNREADABLE, None)])
        return [(_UNREADABLE, None)]
    return [(name, _bytes(value)) for name, value in pairs]
