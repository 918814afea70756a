"""What people are told: which change of a failure, and which state of the pipeline, becomes which notice.

A machine's notices follow from its failures before and after a transaction, and from nothing else:

- `failure_started`: there is a failure that was not there. It may have ended already, and then that is told too.
- `failure_ended`: the first healthy reading after it is known and was not before.
- `failure_corrected`: late data moved a start or an end that was told, or took an end back.
- `failure_withdrawn`: what was stored as a failure is none, or is a part of another one.

Failing readings that only go on with a failure change nothing that was told. A machine's notices of one transaction are
told in this order: what is withdrawn, then failure by failure in order of their start, the end of each last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import pandas as pd

from sensor_pipeline.offsets import Batch
from sensor_pipeline.pace import Pace

# What goes wrong is told in one line, and a webhook does not take any length.
_MOST_CHARACTERS = 1_000
# Over so long the rejected messages are counted.
REJECTED_WITHIN = timedelta(hours=1)


class Kind(StrEnum):
    """What a notice tells; in this order of a machine's notices of one failure."""

    WITHDRAWN = "failure_withdrawn"
    STARTED = "failure_started"
    CORRECTED = "failure_corrected"
    ENDED = "failure_ended"
    BATCH_FAILED = "batch_failed"
    GAP = "gap"
    FALLING_BEHIND = "falling_behind"
    REJECTED = "rejected_over_limit"


_BY_CODE = dict(enumerate(Kind))
_CODE = {kind: code for code, kind in _BY_CODE.items()}


def changes(before: pd.DataFrame, after: pd.DataFrame, vanished: Collection[int]) -> pd.DataFrame:
    """The notices of machines that one transaction gives.

    Args:
        before: the failures as they were stored: `id`, `machine` (int64), `start`, `last`, `end` (datetime64[us, UTC];
            NaT while active).
        after: the failures as they are now, in order of machine and start; the same columns.
        vanished: ids of those of `before` that are none any more.

    Returns:
        A row for each notice, a machine's in the order in which they are to be told: the failure's columns as they are
        now (of a withdrawn one as they were), `kind`, and `at`, the time of what is told: the start of what started,
        otherwise the end or, while it is active, the last failing reading.
    """
    after = after.reset_index(drop=True)
    was = before.set_index("id").reindex(after["id"])
    is_new = ~after["id"].isin(before["id"]).to_numpy()
    had_end = was["end"].notna().to_numpy()
    is_moved = (was["start"].array != after["start"].array) | (had_end & (was["end"].array != after["end"].array))
    after = after.assign(place=after.index)
    told: pd.DataFrame = pd.concat(
        [
            before[before["id"].isin(list(vanished))].assign(code=_CODE[Kind.WITHDRAWN], place=-1),
            after[is_new].assign(code=_CODE[Kind.STARTED]),
            after[~is_new & is_moved].assign(code=_CODE[Kind.CORRECTED]),
            after[after["end"].notna().to_numpy() & ~had_end].assign(code=_CODE[Kind.ENDED]),
        ],
        ignore_index=True,
    ).sort_values(["machine", "place", "code"], kind="stable", ignore_index=True)
    reached = told["end"].fillna(told["last"])
    told["at"] = reached.where(told["code"] != _CODE[Kind.STARTED], told["start"])
    told["kind"] = told["code"].map(_BY_CODE)
    return told.drop(columns=["code", "place"])


@dataclass(frozen=True)
class RunNotice:
    """A notice of the pipeline itself.

    `subject` is what it is about: of one kind and subject, another one is told only after `ALERT_REPEAT`. `at` is when
    it happened, and `details` is plain JSON.
    """

    kind: Kind
    subject: str
    text: str
    at: datetime
    details: Mapping[str, Any] = field(default_factory=dict)


def batch_failed(
    job: str, run_id: str, batch: Batch | None, lane: str | None, error: str, said: str, at: datetime
) -> RunNotice:
    """A run that failed: for its batch's error, or for a reason that Dagster gives.

    A lane that goes on failing for one reason is one subject, as its batch is tried again and again; a gap is its
    partitions', since each is to be accepted by itself.

    Args:
        job: the job's name.
        run_id: Dagster's id of the run.
        batch: what the run owned, where it was a batch.
        lane: the lane, where the sensor launched it.
        error: the class of the error, as it is named in `errors`; empty where there was none.
        said: what it said, in one line.
        at: when the run ended.
    """
    details: dict[str, Any] = {"job": job, "run_id": run_id, "error": error}
    if batch is not None:
        details |= {"topic": batch.topic, "ranges": [str(span) for span in batch.ranges]}
    if error == "GapError" and batch is not None:
        subject = f"{batch.topic} {' '.join(map(str, batch.partitions))}"
        return RunNotice(Kind.GAP, subject, _cut(f"Gap: {said}"), at, details)
    what = f"Batch {batch}" if batch is not None else f"A run of {job}"
    text = _cut(f"{what} failed: {said} (run {run_id})")
    return RunNotice(Kind.BATCH_FAILED, f"{lane or run_id} {error}".strip(), text, at, details)


def falling_behind(topic: str, pace: Pace, now: datetime) -> RunNotice:
    """A topic of which more waits than is ingested, by the rule of `Pace.falls_behind`."""
    text = (
        f"Topic {topic} is falling behind: over {_span(pace.within)} {pace}; lag {pace.lag:,}, of which "
        f"{pace.waiting:,} have waited for longer. sensor-pipeline doctor and the ticks of backlog_sensor say why"
    )
    details = {
        "topic": topic,
        "lag": pace.lag,
        "waiting": pace.waiting,
        "arrived": pace.arrived,
        "ingested": pace.ingested,
    }
    return RunNotice(Kind.FALLING_BEHIND, topic, text, now, details)


def rejected_over_limit(topic: str, rejected: int, limit: int, now: datetime) -> RunNotice:
    """More of a topic's messages than `limit` were rejected within `REJECTED_WITHIN`."""
    text = (
        f"Topic {topic}: {rejected:,} messages were rejected within {_span(REJECTED_WITHIN)}, more than "
        f"ALERT_REJECTED={limit}. The reasons stand in rejected_messages (sensor-pipeline status counts them); mend "
        "the producer"
    )
    details = {"topic": topic, "rejected": rejected, "limit": limit}
    return RunNotice(Kind.REJECTED, topic, text, now, details)


@dataclass(frozen=True)
class MachineChange:
    """What a notice tells of a machine: the rows of `machines` and `failures`, as they were when it was found."""

    machine: int
    machine_id: str
    failure_id: int
    start: datetime
    end: datetime | None


@dataclass(frozen=True)
class Notice:
    """A stored notice: of a machine's failure (`change`), or of the pipeline (`subject`, `text` and `details`)."""

    id: int
    kind: Kind
    found_at: datetime
    change: MachineChange | None = None
    subject: str = ""
    text: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """By which a receiver knows a notice that comes twice; another database's has another."""
        return f"{self.found_at.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}-{self.id}"

    def body(self) -> dict[str, Any]:
        """The notice as JSON, as docs/notices.md describes it."""
        common = {"id": self.key, "kind": self.kind.value, "found_at": _iso(self.found_at)}
        change = self.change
        if change is None:
            title = f"sensor_pipeline: {self.kind.value.replace('_', ' ')}"
            uid = f"{self.kind.value} {self.subject}"
            return {"text": self.text, "title": title, "state": "alerting", "alert_uid": uid, **common, **self.details}
        is_over = change.end is not None or self.kind == Kind.WITHDRAWN
        return {
            "text": _sentence(self.kind, change),
            "title": f"Machine {change.machine_id}: {self.kind.value.replace('_', ' ')}",
            "state": "ok" if is_over and self.kind != Kind.STARTED else "alerting",
            "alert_uid": f"failure {change.failure_id}",
            **common,
            "machine": {"id": change.machine, "machine_id": change.machine_id},
            "failure": {
                "id": change.failure_id,
                "start_time": _iso(change.start),
                "end_time": change.end and _iso(change.end),
                "is_active": not is_over,
            },
        }


def _sentence(kind: Kind, change: MachineChange) -> str:
    name, start = change.machine_id, _said(change.start)
    if kind == Kind.STARTED:
        return f"Machine {name} started to fail at {start}"
    span = f"from {start}"
    if change.end is not None:
        span += f" to {_said(change.end)}, for {_span(change.end - change.start)}"
    if kind == Kind.ENDED:
        return f"Machine {name} failed {span}"
    if kind == Kind.WITHDRAWN:
        return f"Withdrawn: machine {name} did not fail {span}, by what is known now"
    still = "" if change.end is not None else ", and still fails"
    return f"Corrected: machine {name} failed {span}{still}"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _span(duration: timedelta) -> str:
    """Such as `3 s`, `5 min`, `2 h 5 min` or `3 days 2 h`."""
    seconds = duration.total_seconds()
    if seconds < 60:
        return f"{seconds:g} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    parts = [(days, "days" if days > 1 else "day"), (hours, "h"), (minutes % 60, "min")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def _said(moment: datetime) -> str:
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(' ', 'seconds')} UTC"


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()
