"""What a run's page shows of its batch."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd
from dagster import MetadataValue, TableColumn, TableRecord, TableSchema

from sensor_pipeline.drained import Drained
from sensor_pipeline.offsets import Batch
from sensor_pipeline.postgres.transaction import Written

# A run's page is read by people, and its metadata is kept in Dagster's database.
_MOST_ROWS = 50


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


def written(result: Written, seconds: float, stages: Mapping[str, float]) -> Mapping[str, Any]:
    """Metadata of `write`; `seconds` from the run's start to the commit of the database."""
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
        "readings a second": round(result.inserted / seconds) if seconds else 0,
        "seconds by stage": MetadataValue.json(dict(stages)),
    }


def _failures(started: Sequence[tuple[str, datetime]], ended: Sequence[tuple[str, datetime]]) -> MetadataValue:
    events = [(at, machine, "started") for machine, at in started] + [(at, machine, "ended") for machine, at in ended]
    records = [
        TableRecord({"machine": machine, "event": event, "time": at.isoformat()})
        for at, machine, event in sorted(events)[:_MOST_ROWS]
    ]
    columns = [TableColumn("machine"), TableColumn("event"), TableColumn("time")]
    return MetadataValue.table(records, TableSchema(columns))
