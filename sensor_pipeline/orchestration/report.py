"""What a run's page and the assets' pages show of its batch."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
from dagster import AssetKey, MetadataValue, TableColumn, TableRecord, TableSchema

from sensor_pipeline.drained import Drained, RejectedMessage
from sensor_pipeline.offsets import Batch
from sensor_pipeline.orchestration.assets import FAILURES, MACHINES, READINGS, REJECTED
from sensor_pipeline.postgres.figures import Rows
from sensor_pipeline.postgres.transaction import Written

# A run's page is read by people, and its metadata is kept in Dagster's database.
_MOST_ROWS = 50
_SAMPLES = 3
_SAMPLE_CHARACTERS = 80


@dataclass(frozen=True)
class Left:
    """What is left of a topic after a batch: offsets not ingested, and when the oldest was published (None: none)."""

    lag: int
    oldest: datetime | None


def drained(batch: Batch, result: Drained) -> Mapping[str, Any]:
    """Metadata of `drain`."""
    ranges = [
        TableRecord({"partition": r.partition, "start": r.start, "end": r.end, "offsets": len(r)}) for r in batch.ranges
    ]
    columns = [TableColumn(name, "int") for name in ("partition", "start", "end", "offsets")]
    return {
        "topic": batch.topic,
        "ranges": MetadataValue.table(ranges, TableSchema(columns)),
        "offsets": len(batch),
        "drained": result.messages,
        "rejected": len(result.rejected),
        "rejected by reason": MetadataValue.json(result.rejected_by_reason),
        "rejected samples": _samples(result.rejected),
        "without a record": sum(map(len, result.no_record)),
    }


def detected(readings: pd.DataFrame) -> Mapping[str, Any]:
    """Metadata of `detect`: of the batch alone, before it meets what is stored."""
    return {
        "readings": len(readings),
        "failing readings": int(readings["has_failure"].sum()),
        "machines": int(readings["machine"].nunique()),
        "failing runs in the batch": int(readings["starts"].sum()),
    }


def written(result: Written, took: timedelta, stages: Mapping[str, float]) -> dict[str, Any]:
    """Metadata of `write`; `took` is from the run's start to the commit of the database."""
    nothing = result.batch_id is None
    return {
        "outcome": "already ingested, nothing written" if nothing else "written",
        "inserted": result.inserted,
        "already ingested": result.already_ingested,
        "rejected": result.rejected,
        "failures started": len(result.failures_started),
        "failures ended": len(result.failures_ended),
        "failures": _failures(result.failures_started, result.failures_ended),
        "rejected by reason": MetadataValue.json(dict(result.rejected_by_reason)),
        "without a record": result.no_record,
        "batch": "none" if nothing else result.batch_id,
        "readings a second": _rate(result.inserted, took),
        "seconds by stage": MetadataValue.json(dict(stages)),
    }


def of_assets(
    result: Written,
    detected: pd.DataFrame,
    rows: Rows,
    what_is_left: Left | None,
    at: datetime,
    took: timedelta,
    stages: Mapping[str, float],
) -> dict[AssetKey, dict[str, Any]]:
    """What a batch did to each table, in numbers that plot.

    Args:
        result: what was written.
        detected: the batch's readings.
        rows: of the tables, after it.
        what_is_left: of its topic; None where that is not known.
        at: when the database had committed it.
        took: from the run's start until then.
        stages: seconds by stage.
    """
    return {
        READINGS: {
            "readings": result.inserted,
            "readings a second": _rate(result.inserted, took),
            **left(what_is_left, at),
            **_delays(detected, at),
            **{f"seconds in {stage}": spent for stage, spent in stages.items()},
        },
        REJECTED: {"rejected": result.rejected, **{f"rejected: {r}": n for r, n in result.rejected_by_reason.items()}},
        MACHINES: {"machines in the batch": int(detected["machine"].nunique())},
        FAILURES: {
            "failures started": len(result.failures_started),
            "failures ended": len(result.failures_ended),
            "active failures": rows.active_failures,
        },
    }


def left(what_is_left: Left | None, at: datetime) -> dict[str, Any]:
    """What is left of the topic at some time; nothing where that is not known."""
    if what_is_left is None:
        return {}
    oldest = what_is_left.oldest
    age = 0.0 if oldest is None else round((at - oldest).total_seconds(), 1)
    return {"lag left": what_is_left.lag, "oldest unread age in seconds": age}


def _rate(count: int, took: timedelta) -> int:
    return round(count / max(took.total_seconds(), 0.001))


def _delays(detected: pd.DataFrame, at: datetime) -> dict[str, float]:
    """From the readings' event times until the commit."""
    if detected.empty:
        return {}
    seconds = (at - detected["timestamp"]).dt.total_seconds()
    return {f"event to commit in seconds, p{p}": round(float(np.percentile(seconds, p)), 2) for p in (50, 95)}


def _samples(rejected: Sequence[RejectedMessage]) -> MetadataValue:
    """Some messages of each reason, cut: a person sees what is wrong with the producer, and no log keeps a payload."""
    of_reason: dict[str, list[RejectedMessage]] = defaultdict(list)
    for message in rejected:
        if len(of_reason[message.reason]) < _SAMPLES:
            of_reason[message.reason].append(message)
    records = [
        TableRecord(
            {
                "reason": message.reason,
                "partition": message.partition,
                "offset": message.offset,
                "detail": _cut(message.detail),
                "message": _cut("".join(_printable(message.payload))),
            }
        )
        for _, messages in sorted(of_reason.items())
        for message in messages
    ]
    kinds = {"partition": "int", "offset": "int"}
    columns = [TableColumn(n, kinds.get(n, "string")) for n in ("reason", "partition", "offset", "detail", "message")]
    return MetadataValue.table(records, TableSchema(columns))


def _printable(payload: bytes | None) -> Iterator[str]:
    if payload is None:
        yield "(none)"
    for character in (payload or b"")[: 4 * _SAMPLE_CHARACTERS].decode(errors="backslashreplace"):
        yield character if character.isprintable() else repr(character)[1:-1]


def _cut(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARACTERS else text[: _SAMPLE_CHARACTERS - 1] + "…"


def _failures(started: Sequence[tuple[str, datetime]], ended: Sequence[tuple[str, datetime]]) -> MetadataValue:
    events = [(at, machine, "started") for machine, at in started] + [(at, machine, "ended") for machine, at in ended]
    records = [
        TableRecord({"machine": machine, "event": event, "time": at.isoformat()})
        for at, machine, event in sorted(events)[:_MOST_ROWS]
    ]
    columns = [TableColumn("machine"), TableColumn("event"), TableColumn("time")]
    return MetadataValue.table(records, TableSchema(columns))
