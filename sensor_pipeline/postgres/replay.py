"""The one transaction of a replay: rejected messages that are readings by today's rules move to where they belong.

Its order of locks is a batch's (`transaction`), so that the two wait for each other and never deadlock:

0. the day from which on readings are kept, held
1. the ledger's rows of the messages' partitions, locked; then the rejected rows, locked and decoded
2. to 5. as in a batch: machines, healthy readings, failures recomputed, failing readings
6. the rejected rows removed, batch log (kind `replay`), the ledger's totals moved; its offsets are done and stay so
7. the check that everything adds up, then the commit

Two replays of one message wait for each other at the locks, and the second one no longer finds it. A message that is
bad again is not touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import pandas as pd
import sqlalchemy as sa

from sensor_pipeline.drained import Drained, FrameBuilder, Records, RejectedMessage
from sensor_pipeline.errors import ConservationError
from sensor_pipeline.failures import detect
from sensor_pipeline.messages import MessageDecoder
from sensor_pipeline.offsets import Batch, OffsetRange, hull, ranges_of, subtract
from sensor_pipeline.postgres import ledger, rejected
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.days import ensure_days, kept_from
from sensor_pipeline.postgres.transaction import SETTINGS, Origin, Transaction, Written, days_of

KIND = "replay"


@dataclass(frozen=True)
class Replayed:
    """What became of rejected messages: `written` of those that are readings now, `bad_again`, how many were `gone`.

    The keys and headers of those that are bad again are not looked up.
    """

    written: Written
    bad_again: tuple[RejectedMessage, ...]
    gone: int


def decode(decoder: MessageDecoder, messages: Records, kept_from: date | None) -> Drained:
    """Rejected messages by today's rules."""
    builder = FrameBuilder()
    builder.add(messages, decoder.decode(messages.value, messages.timestamp_ms, kept_from))
    return Drained(builder.frame(), tuple(builder.rejected), ())


def replay(
    database: Database,
    topic: ledger.StoredTopic,
    looked_at: pd.DataFrame,
    decoder: MessageDecoder,
    origin: Origin,
    alert_max_age: timedelta,
) -> Replayed:
    """Let rejected messages become readings, all of them or none.

    Args:
        database: to write to.
        topic: of all the messages.
        looked_at: the readings that they are, as `decode` has found without a lock, at least one.
        decoder: with today's rules.
        origin: for the batch log.
        alert_max_age: what a failure did longer ago is recorded as a notice and not sent.

    Raises:
        ConservationError: it does not add up; nothing was written.
        RowsRefusedError: the database refuses some readings for their content; nothing was written.
    """
    ensure_days(database, days_of(looked_at))
    with database.begin() as connection:
        connection.execute(SETTINGS)
        # 0
        oldest = kept_from(connection)
        # 1
        ledger.lock(connection, topic.id, sorted(set(looked_at["partition"].tolist())))
        held = rejected.lock(connection, topic.id, places_of(looked_at))
        gone = len(looked_at) - len(held.value)
        if gone == len(looked_at):
            return Replayed(_NOTHING, (), gone)
        # Anew: somebody may have changed a row between the look and the lock.
        decoded = decode(decoder, held, oldest)
        if decoded.readings.empty:
            return Replayed(_NOTHING, decoded.rejected, gone)
        written = _move(connection, topic, decoded, origin, alert_max_age)
        # 7
        if len(held.value) != written.inserted + len(decoded.rejected):
            raise _does_not_add_up(
                topic, f"{len(held.value)} locked, but {written.inserted} inserted + {len(decoded.rejected)} bad again"
            )
        return Replayed(written, decoded.rejected, gone)


_NOTHING = Written(None, inserted=0, already_ingested=0, rejected=0, no_record=0)


def places_of(readings: pd.DataFrame) -> list[tuple[int, int]]:
    """Partition and offset of each."""
    return list(zip(readings["partition"].tolist(), readings["offset"].tolist(), strict=True))


def _move(
    connection: sa.Connection, topic: ledger.StoredTopic, decoded: Drained, origin: Origin, alert_max_age: timedelta
) -> Written:
    places = places_of(decoded.readings)
    ranges = ranges_of(places)
    _check_ledger(connection, topic, ranges)
    batch = Batch(topic.name, topic.kafka_topic_id, tuple(hull(ranges)))
    drained = Drained(decoded.readings, (), ())
    # 2 to 5
    steps = Transaction(connection, batch, drained, detect(decoded.readings), origin, alert_max_age=alert_max_age)
    stored = steps.store(topic)
    # 6
    removed = rejected.remove(connection, topic.id, places)
    written = Written(
        batch_id=None,
        inserted=stored.inserted,
        already_ingested=0,
        rejected=0,
        no_record=0,
        failures_started=stored.failures_started,
        failures_ended=stored.failures_ended,
    )
    batch_id = steps.log(topic.id, written, ranges, KIND)
    moved = ledger.move_to_readings(connection, topic.id, removed)
    # 7
    if removed != Counter(decoded.readings["partition"].tolist()) or removed.total() != stored.inserted:
        raise _does_not_add_up(topic, f"{stored.inserted} inserted, but {removed.total()} removed")
    if moved != len(removed):
        raise _does_not_add_up(topic, "the ledger counts fewer rejected messages than there are")
    return Written(**{**vars(written), "batch_id": batch_id})


def _check_ledger(connection: sa.Connection, topic: ledger.StoredTopic, ranges: Sequence[OffsetRange]) -> None:
    done = ledger.ingested(connection, topic.id)
    if unknown := subtract(ranges, [span for spans in done.values() for span in spans]):
        raise _does_not_add_up(topic, f"partition {unknown[0]} is rejected, but not in the ledger")


def _does_not_add_up(topic: ledger.StoredTopic, what: str) -> ConservationError:
    return ConservationError(
        f"a replay of topic {topic.name} does not add up: {what}; nothing of this part was written. Run "
        "`sensor-pipeline verify`, which says what is wrong with the database, and mend that first"
    )
