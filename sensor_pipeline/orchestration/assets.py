"""The pipeline's data as assets: the topics, the tables that come of them, and what each batch says of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dagster import AssetKey, AssetMaterialization, AssetSpec, MetadataValue, TableColumn, TableSchema

from sensor_pipeline.postgres.figures import Rows
from sensor_pipeline.settings import Settings

MACHINES = AssetKey("machines")
FAILURES = AssetKey("failures")
READINGS = AssetKey("readings")
REJECTED = AssetKey("rejected_messages")
HEALTH = AssetKey("health")

_OWNER = "team:sensor-pipeline"
_GROUP = "sensor_pipeline"

_PLACE = [
    TableColumn("topic_id", "smallint", "topics.id"),
    TableColumn("kafka_partition", "integer"),
    TableColumn("kafka_offset", "bigint"),
]
COLUMNS: Mapping[AssetKey, list[TableColumn]] = {
    MACHINES: [
        TableColumn("id", "bigint", "primary key"),
        TableColumn("machine_id", "text", "the name under which the machine publishes"),
        TableColumn("first_seen", "timestamp with time zone", "event time of its first reading"),
        TableColumn("last_seen", "timestamp with time zone", "event time of its latest reading"),
    ],
    FAILURES: [
        TableColumn("id", "bigint", "primary key, stable while late readings come in"),
        TableColumn("machine_id", "bigint", "machines.id"),
        TableColumn("start_time", "timestamp with time zone", "the first failing reading"),
        TableColumn("last_failing_time", "timestamp with time zone", "the last failing reading"),
        TableColumn("end_time", "timestamp with time zone", "the first healthy reading after it; null while active"),
        TableColumn("is_active", "boolean"),
    ],
    READINGS: [
        TableColumn("id", "bigint"),
        TableColumn("machine_id", "bigint", "machines.id"),
        TableColumn("timestamp", "timestamp with time zone", "event time; the table has a partition for each day"),
        TableColumn("failure_id", "bigint", "failures.id; null where the reading is healthy"),
        *_PLACE,
        TableColumn("has_failure", "boolean"),
        TableColumn("values", "jsonb", "sensor name to number, string, boolean or null"),
    ],
    REJECTED: [
        *_PLACE,
        TableColumn("key", "bytea"),
        TableColumn("payload", "bytea", "the message as it was; null for a tombstone"),
        TableColumn("headers", "jsonb"),
        TableColumn("reason", "text", "the reason's code"),
        TableColumn("detail", "text", "what was wrong, in words"),
        TableColumn("first_seen", "timestamp with time zone", "when it was rejected"),
        TableColumn(
            "kafka_timestamp_ms", "bigint", "the record's own timestamp, in ms since 1970; -1 where it has none"
        ),
    ],
}


def topic_key(name: str) -> AssetKey:
    """The asset of a topic."""
    return AssetKey(["kafka", name])


def build_assets(settings: Settings) -> list[AssetSpec]:
    """All assets, in order of lineage. None can be materialized by hand: batches do that."""
    topics = [topic_key(name) for name in settings.kafka_topics]
    return [
        *(
            AssetSpec(
                key,
                description="Readings as the machines publish them. The ledger in PostgreSQL says how far it is read.",
                kinds={"kafka"},
                owners=[_OWNER],
                group_name=_GROUP,
                metadata={"topic": key.path[-1], "brokers": settings.kafka_bootstrap_servers},
            )
            for key in topics
        ),
        _table(settings, READINGS, "Every reading, once, by machine and event time.", topics),
        _table(settings, REJECTED, "Messages that can never become a reading: whole, with the reason.", topics),
        _table(settings, MACHINES, "Each machine that has published, and when it was first and last seen.", [READINGS]),
        _table(
            settings,
            FAILURES,
            "When each machine failed, from its first failing reading to the first healthy one after it.",
            [READINGS],
        ),
        # Dagster takes a check for not evaluated as soon as its asset is materialized again, which each batch does.
        AssetSpec(
            HEALTH,
            deps=[MACHINES, FAILURES, READINGS, REJECTED],
            description="Whether all is as it must be: the checks of the tables and topics, every 15 minutes.",
            owners=[_OWNER],
            group_name=_GROUP,
        ),
    ]


def _table(settings: Settings, key: AssetKey, description: str, comes_of: list[AssetKey]) -> AssetSpec:
    return AssetSpec(
        key,
        deps=comes_of,
        description=description,
        kinds={"postgresql"},
        owners=[_OWNER],
        group_name=_GROUP,
        metadata={
            "dagster/column_schema": MetadataValue.table_schema(TableSchema(COLUMNS[key])),
            "dagster/table_name": f"{settings.postgres_db}.public.{key.path[-1]}",
        },
    )


def materializations(rows: Rows, said: Mapping[AssetKey, Mapping[str, Any]]) -> Iterator[AssetMaterialization]:
    """One event for each table: how many rows it has now, and what a batch did to it."""
    for key in (READINGS, REJECTED, MACHINES, FAILURES):
        yield AssetMaterialization(
            key, metadata={"dagster/row_count": getattr(rows, key.path[-1]), **said.get(key, {})}
        )
