"""The one transaction of a batch: readings, machines, failures, rejected messages, batch log and ledger.

READ COMMITTED, in this order; locks are always taken in it, so that batches wait and never deadlock:

0. the day from which on readings are kept, held
1. the ledger's rows of the batch's partitions, locked; what they already hold is taken out of the batch
2. machines that are new, inserted in order of name
3. healthy readings, which need no lock on machines and no knowledge of failures
4. the batch's machines, locked in order of id
5. in new statements: failures recomputed, notices of what they did, failing readings copied in with the right failure
6. rejected messages, batch log, ledger
7. the check that everything adds up, then the commit

A replay of rejected messages (`replay`) is such a transaction too, with steps 2 to 5 in common.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pandas as pd
import sqlalchemy as sa

from sensor_pipeline.drained import Drained, RejectedMessage, within
from sensor_pipeline.errors import ConservationError, DataError, TooManyRejectedError
from sensor_pipeline.failures import detect
from sensor_pipeline.offsets import Batch, OffsetRange, intersect, subtract, total
from sensor_pipeline.postgres import ledger, machines
from sensor_pipeline.postgres.copy import copy_readings
from sensor_pipeline.postgres.database import Database
from sensor_pipeline.postgres.days import ensure_days, kept_from
from sensor_pipeline.postgres.episodes import FailureEvent, settle
from sensor_pipeline.postgres.notices import add_changes
from sensor_pipeline.postgres.refused import Refused, RowsRefusedError, insert
from sensor_pipeline.postgres.rejected import add_rejected
from sensor_pipeline.rules import Reason, Rejection, too_old
from sensor_pipeline.settings import ALERT_MAX_AGE

# A process that stands still (suspended, on a frozen host) may keep its locks no longer than a run may take; where the
# server has a limit of its own, that one holds.
SETTINGS = sa.text("""
    SET LOCAL jit = off;
    SELECT set_config('idle_in_transaction_session_timeout', '5min', true)
    WHERE current_setting('idle_in_transaction_session_timeout') = '0'
""")
_ADD_BATCH = sa.text("""
    INSERT INTO batches
        (topic_id, ranges, dagster_run_id, drained, inserted, already_ingested, rejected, no_record,
         failures_started, failures_ended, started_at, committed_at, timings, kind)
    VALUES
        (:topic_id, CAST(:ranges AS jsonb), :dagster_run_id, :drained, :inserted, :already_ingested, :rejected,
         :no_record, :failures_started, :failures_ended, :started_at, clock_timestamp(), CAST(:timings AS jsonb), :kind)
    RETURNING id
""")


@dataclass(frozen=True)
class Origin:
    """Where a batch's run comes from, for the batch log: the run's id, its start and the seconds by stage."""

    started_at: datetime
    dagster_run_id: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What became of a batch's offsets: the four counts add up to the offsets in its ranges.

    `batch_id` is the batch log's row, None where all was ingested before and nothing was written.
    `failures_started` and `failures_ended` name the machine and the time.
    """

    batch_id: int | None
    inserted: int
    already_ingested: int
    rejected: int
    no_record: int
    rejected_by_reason: Mapping[str, int] = field(default_factory=dict)
    failures_started: Sequence[tuple[str, datetime]] = ()
    failures_ended: Sequence[tuple[str, datetime]] = ()


@dataclass(frozen=True)
class Stored:
    """What steps 2 to 5 did: how many readings the database took, and the failures as in `Written`."""

    inserted: int
    failures_started: Sequence[tuple[str, datetime]]
    failures_ended: Sequence[tuple[str, datetime]]


def write(
    database: Database,
    batch: Batch,
    drained: Drained,
    detected: pd.DataFrame,
    origin: Origin,
    max_rejected_share: float | None = None,
    alert_max_age: timedelta = ALERT_MAX_AGE,
) -> Written:
    """Write one batch, all of it or nothing.

    Args:
        database: to write to.
        batch: what the run owns; its topic is in the ledger.
        drained: what Kafka holds of it (what the ledger holds already may be left out).
        detected: `drained.readings` as `failures.detect` returns them.
        origin: for the batch log.
        max_rejected_share: from 0 to 1; a batch of whose messages a larger share would be rejected is not written.
        alert_max_age: what a failure did longer ago is recorded as a notice and not sent.

    Raises:
        TooManyRejectedError: that is so.
        ConservationError: the batch does not add up; nothing was written.
        RowsRefusedError: the database refuses some readings for their content, or they became too old to be kept;
            nothing was written.
    """
    ensure_days(database, days_of(detected))
    with database.begin() as connection:
        return Transaction(connection, batch, drained, detected, origin, max_rejected_share, alert_max_age).run()


class Transaction:
    """The steps, for readings and where they come from as `write` takes them; the transaction has begun."""

    def __init__(
        self,
        connection: sa.Connection,
        batch: Batch,
        drained: Drained,
        detected: pd.DataFrame,
        origin: Origin,
        max_rejected_share: float | None = None,
        alert_max_age: timedelta = ALERT_MAX_AGE,
    ) -> None:
        self._connection = connection
        self._batch = batch
        self._drained = drained
        self._readings = detected
        self._origin = origin
        self._max_rejected_share = max_rejected_share
        self._alert_max_age = alert_max_age
        self._new_machines: set[int] = set()
        self._began = time.perf_counter()
        self._copying = 0.0

    def run(self) -> Written:
        """All of them."""
        self._connection.execute(SETTINGS)
        # 0
        oldest = kept_from(self._connection)
        topic = ledger.find_topic(self._connection, self._batch.kafka_topic_id)
        if topic is None:
            raise DataError(
                f"topic {self._batch.topic} ({self._batch.kafka_topic_id}) is not in the ledger any more: was the "
                "database restored meanwhile? Run the batch again"
            )
        # 1
        ledger.lock(self._connection, topic.id, self._batch.partitions)
        todo = self._take_out_ingested(topic.id)
        if not todo:
            return Written(None, inserted=0, already_ingested=len(self._batch), rejected=0, no_record=0)
        self._check_age(oldest)
        self._check_share()
        return self._account(topic, todo, self.store(topic))

    def store(self, topic: ledger.StoredTopic) -> Stored:
        """Steps 2 to 5: the readings, their machines and their failures."""
        readings = self._readings
        names = list(readings["machine"].cat.categories)
        # 2
        ids = self._machine_ids(names)
        readings["machine"] = ids[readings["machine"].cat.codes.to_numpy()]
        # 3
        failing = readings["has_failure"].to_numpy()
        inserted = self._copy(topic.id, readings[~failing])
        # 4
        machines.lock(self._connection, ids.tolist())
        # 5
        last_seen = machines.last_seen(self._connection, ids.tolist(), made=self._new_machines)
        # Only now: another topic may have become known since, and have readings of these machines.
        ranks = {t.id: t.rank for t in ledger.topics(self._connection)}
        settled = settle(self._connection, readings.assign(topic_rank=ranks[topic.id]), last_seen, ranks)
        add_changes(self._connection, settled.told, self._alert_max_age)
        inserted += self._copy(topic.id, readings[failing], settled.failure_id)
        machines.see(self._connection, machines.spans(readings))
        by_id = dict(zip(ids.tolist(), names, strict=True))
        return Stored(inserted, _named(settled.started, by_id), _named(settled.ended, by_id))

    def _account(self, topic: ledger.StoredTopic, todo: Sequence[OffsetRange], stored: Stored) -> Written:
        # 6
        rejected = add_rejected(self._connection, topic.id, self._drained.rejected)
        no_record = intersect(self._drained.no_record, todo)
        self._check_places(no_record)
        written = Written(
            batch_id=None,
            inserted=stored.inserted,
            already_ingested=len(self._batch) - total(todo),
            rejected=rejected,
            no_record=total(no_record),
            rejected_by_reason=self._drained.rejected_by_reason,
            failures_started=stored.failures_started,
            failures_ended=stored.failures_ended,
        )
        batch_id = self.log(topic.id, written, self._batch.ranges)
        ledger.add(
            self._connection,
            topic.id,
            todo,
            readings=Counter(self._readings["partition"].tolist()),
            rejected=Counter(message.partition for message in self._drained.rejected),
            no_record=no_record,
        )
        # 7
        self._check(written)
        return Written(**{**vars(written), "batch_id": batch_id})

    def _take_out_ingested(self, topic_id: int) -> list[OffsetRange]:
        """Leave in the frame only what the ledger does not hold; returns these ranges."""
        done = ledger.ingested(self._connection, topic_id)
        held = [span for partition in self._batch.partitions for span in done.get(partition, [])]
        todo = subtract(self._batch.ranges, held)
        inside = within(self._readings, todo)
        left = self._readings.copy(deep=False) if inside.all() else self._readings[inside].reset_index(drop=True)
        left["machine"] = left["machine"].cat.remove_unused_categories()
        self._readings = left if inside.all() else detect(left)
        self._drained = Drained(
            self._readings,
            tuple(m for m in self._drained.rejected if _is_in(m, todo)),
            self._drained.no_record,
        )
        return todo

    def _check_age(self, oldest: date | None) -> None:
        """The drain has rejected what is too old, unless that became so meanwhile."""
        if oldest is None:
            return
        old = self._readings[self._readings["timestamp"].to_numpy("datetime64[us]") < np.datetime64(oldest)]
        if not old.empty:
            moments = old["timestamp"].to_numpy("datetime64[us]")
            raise _refused(old, [too_old(moment, oldest) for moment in moments])

    def _machine_ids(self, names: list[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        found = machines.known(self._connection, names)
        missing = sorted(set(names) - found.keys())
        if missing:
            spans = machines.spans(self._readings[self._readings["machine"].isin(missing)])

            def add(names: Sequence[str]) -> int:
                self._new_machines = machines.add(self._connection, spans.loc[list(names)])
                return len(self._new_machines)

            _, refused = insert(self._connection, missing, add)
            if refused:
                rows = self._readings[self._readings["machine"].isin(list(refused))]
                raise _refused(rows, [_by_database(refused[name]) for name in rows["machine"]])
            # Another batch may have made some of them meanwhile; only a new statement sees those.
            found |= machines.known(self._connection, missing)
        if lost := [name for name in names if name not in found]:
            raise DataError(
                f"batch {self._batch}: PostgreSQL did not keep {len(lost)} of its machines (such as {lost[0]!r}): a "
                "trigger or a policy of table machines is in the way; nothing was written. Mend it, then try again"
            )
        return np.array([found[name] for name in names], np.int64)

    def _copy(self, topic_id: int, rows: pd.DataFrame, failure_id: pd.Series[int] | None = None) -> int:
        ids = None if failure_id is None else np.asarray(failure_id.loc[rows.index], np.int64)

        def copy(places: Sequence[int]) -> int:
            part = slice(places[0], places[-1] + 1) if places else slice(0)
            of = rows.iloc[part]
            return copy_readings(
                self._connection,
                topic_id=topic_id,
                machine_id=of["machine"].to_numpy(),
                timestamp=of["timestamp"].to_numpy("datetime64[us]"),
                partition=of["partition"].to_numpy(),
                offset=of["offset"].to_numpy(),
                values=of["values"].tolist(),
                failure_id=None if ids is None else ids[part],
            )

        began = time.perf_counter()
        copied, refused = insert(self._connection, range(len(rows)), copy)
        self._copying += time.perf_counter() - began
        if refused:
            raise _refused(rows.iloc[list(refused)], list(map(_by_database, refused.values())))
        return copied

    def log(self, topic_id: int, written: Written, ranges: Sequence[OffsetRange], kind: str = "ingest") -> int:
        """Add the batch log's row; returns its id."""
        batch_id: int = self._connection.scalars(
            _ADD_BATCH,
            {
                "topic_id": topic_id,
                "ranges": json.dumps([vars(span) for span in ranges]),
                "dagster_run_id": self._origin.dagster_run_id,
                "drained": self._drained.messages,
                "inserted": written.inserted,
                "already_ingested": written.already_ingested,
                "rejected": written.rejected,
                "no_record": written.no_record,
                "failures_started": len(written.failures_started),
                "failures_ended": len(written.failures_ended),
                "started_at": self._origin.started_at,
                "timings": json.dumps(dict(self._origin.timings) | self._seconds()),
                "kind": kind,
            },
        ).one()
        return batch_id

    def _seconds(self) -> dict[str, float]:
        """Of the whole transaction so far, and of COPY in it."""
        return {"write": round(time.perf_counter() - self._began, 3), "copy": round(self._copying, 3)}

    def _check_share(self) -> None:
        """A producer gone wrong stops the line, where that is asked for, instead of filling the table."""
        limit, rejected = self._max_rejected_share, self._drained.rejected
        if limit is None or not rejected or len(rejected) / self._drained.messages <= limit:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._drained.rejected_by_reason.items())
        first = rejected[0]
        raise TooManyRejectedError(
            f"batch {self._batch}: {len(rejected)} of {self._drained.messages} messages would be rejected ({reasons}; "
            f"the first is partition {first.partition} offset {first.offset}: {first.detail}), more than "
            f"MAX_REJECTED_SHARE={limit:g} allows; nothing was written. Mend the producer, then raise "
            "MAX_REJECTED_SHARE, or unset it, to have these messages kept in rejected_messages"
        )

    def _check_places(self, no_record: Sequence[OffsetRange]) -> None:
        """Each offset came once, so that a sum that adds up leaves none out."""
        rejected = self._drained.rejected
        places = pd.DataFrame(
            {
                "partition": np.append(
                    self._readings["partition"], np.array([m.partition for m in rejected], np.int32)
                ),
                "offset": np.append(self._readings["offset"], np.array([m.offset for m in rejected], np.int64)),
            }
        )
        twice = places[places.duplicated() | within(places, no_record)]
        if not twice.empty:
            raise ConservationError(
                f"batch {self._batch} does not add up: offset {twice['offset'].iloc[0]} of partition "
                f"{twice['partition'].iloc[0]} came twice; nothing was written, run it again, and report it if it "
                "stays so"
            )

    def _check(self, written: Written) -> None:
        """No term is what the others leave over: each was counted where it happened."""
        accounted = written.inserted + written.already_ingested + written.rejected + written.no_record
        if accounted != len(self._batch):
            raise ConservationError(
                f"batch {self._batch} does not add up: {len(self._batch)} offsets, but {written.inserted} inserted + "
                f"{written.already_ingested} already ingested + {written.rejected} rejected + {written.no_record} "
                "without a record; nothing was written, run it again, and report it if it stays so"
            )


def _refused(rows: pd.DataFrame, rejections: Sequence[Rejection]) -> RowsRefusedError:
    columns = zip(rows["partition"].tolist(), rows["offset"].tolist(), rejections, strict=True)
    return RowsRefusedError([Refused(partition, offset, rejection) for partition, offset, rejection in columns])


def _by_database(words: str) -> Rejection:
    return Rejection(Reason.REFUSED_BY_DATABASE, words)


def days_of(readings: pd.DataFrame) -> list[date]:
    """The days, in UTC, on which readings fall."""
    days: list[date] = np.unique(readings["timestamp"].to_numpy("datetime64[us]").astype("datetime64[D]")).tolist()
    return days


def _is_in(message: RejectedMessage, ranges: Sequence[OffsetRange]) -> bool:
    return any(r.partition == message.partition and r.start <= message.offset < r.end for r in ranges)


def _named(events: Sequence[FailureEvent], names: Mapping[int, str]) -> list[tuple[str, datetime]]:
    return [(names[event.machine_id], event.at.astimezone(UTC)) for event in events]
