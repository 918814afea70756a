"""Whether a live database holds what the pipeline guarantees: each check one question, answered from the rows.

Nothing is believed that can be counted again. Each question is one statement, or one snapshot, so that it can be asked
while batches come in. The failures of each machine are `look`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from sensor_pipeline.errors import ConfigurationError
from sensor_pipeline.postgres.history import (
    SEEN_BY_READINGS,
    Difference,
    compare,
    find_episodes,
    stored_failures,
    widen,
)

# All statements of a transaction that begins so see one state. The lock comes before the snapshot: partitions that are
# dropped after it was taken would be gone from it, and what is kept of them not there yet.
SNAPSHOT = sa.text("""
    SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL jit = off;
    LOCK TABLE ONLY readings IN ACCESS SHARE MODE
""")

# Of what is wrong, so many examples are shown.
EXAMPLES = 5

_RESTORE = (
    "these rows were changed by something other than the pipeline; restore the database from a backup: the ledger goes "
    "back with it, and the pipeline ingests again what Kafka still has"
)
_PLACE = "'topic ' || {0}.topic_id || ' partition ' || {0}.kafka_partition"
_READING = f"{_PLACE.format('r')} || ' offset ' || r.kafka_offset"

# Each a statement that selects what is wrong, a line of text for each thing.
_BATCHES = """
    SELECT 'batch ' || b.id || ': ' || owned.offsets || ' offsets in its ranges, but ' || inserted || ' inserted + '
        || already_ingested || ' already ingested + ' || rejected || ' rejected + ' || no_record
        || ' without a record, of ' || drained || ' drained' AS said
    FROM batches b, LATERAL (
        SELECT coalesce(sum((r ->> 'end')::bigint - (r ->> 'start')::bigint), 0) AS offsets
        FROM jsonb_array_elements(b.ranges) AS r
    ) AS owned
    WHERE owned.offsets <> inserted + already_ingested + rejected + no_record OR drained <> inserted + rejected
"""
_LOGGED = """
    SELECT 'batch ' || b.id || ': offsets [' || (r ->> 'start') || ', ' || (r ->> 'end') || ') of topic ' || b.topic_id
        || ' partition ' || (r ->> 'partition') || ' are not all in the ledger' AS said
    FROM batches b CROSS JOIN LATERAL jsonb_array_elements(b.ranges) AS r
    LEFT JOIN ingested_offsets i ON i.topic_id = b.topic_id AND i.kafka_partition = (r ->> 'partition')::integer
    WHERE (int8range((r ->> 'start')::bigint, (r ->> 'end')::bigint) <@ i.offsets) IS NOT TRUE
"""
_TOTALS = f"""
    SELECT {_PLACE.format("i")} || ': ' || held.offsets || ' offsets are done, but ' || readings || ' readings + '
        || rejected || ' rejected + ' || no_record || ' without a record + ' || lost || ' lost' AS said
    FROM ingested_offsets i, LATERAL (
        SELECT coalesce(sum(upper(span) - lower(span)), 0) AS offsets FROM unnest(i.offsets) AS span
    ) AS held
    WHERE held.offsets <> readings + rejected + no_record + lost OR least(readings, rejected, no_record, lost) < 0
"""
_GAPS = f"""
    SELECT {_PLACE.format("i")} || ': ' || lost || ' offsets are lost by the ledger, ' || coalesce(held.offsets, 0)
        || ' by the accepted gaps' || CASE WHEN held.spans <@ i.offsets THEN '' ELSE ', not all in the ledger' END
        AS said
    FROM ingested_offsets i LEFT JOIN (
        SELECT topic_id, kafka_partition, sum(upper(offsets) - lower(offsets)) AS offsets, range_agg(offsets) AS spans
        FROM accepted_gaps GROUP BY topic_id, kafka_partition
    ) AS held USING (topic_id, kafka_partition)
    WHERE coalesce(held.offsets, 0) <> lost OR NOT coalesce(held.spans <@ i.offsets, true)
    UNION ALL
    SELECT {_PLACE.format("g")} || ': an accepted gap of a partition that is not in the ledger'
    FROM accepted_gaps g LEFT JOIN ingested_offsets i USING (topic_id, kafka_partition) WHERE i.topic_id IS NULL
"""
_HELD = """
    SELECT 'topic ' || topic_id || ' partition ' || kafka_partition || ': the ledger says ' || coalesce({total}, 0)
        || ', there are ' || coalesce(held.rows, 0) AS said
    FROM ingested_offsets FULL JOIN (
        SELECT topic_id, kafka_partition, sum(rows) AS rows FROM ({rows}) AS counted GROUP BY topic_id, kafka_partition
    ) AS held USING (topic_id, kafka_partition)
    WHERE coalesce({total}, 0) <> coalesce(held.rows, 0)
"""
_REJECTED_ROWS = "SELECT topic_id, kafka_partition, 1 AS rows FROM rejected_messages"
_READINGS_ROWS = """
    SELECT topic_id, kafka_partition, count(*) AS rows FROM readings GROUP BY topic_id, kafka_partition
    UNION ALL SELECT topic_id, kafka_partition, readings FROM dropped_readings
"""
_OUTSIDE = f"""
    SELECT {_READING} || ': is not in the ledger, or was accepted as lost' AS said
    FROM {{table}} r LEFT JOIN ingested_offsets i USING (topic_id, kafka_partition)
    WHERE (r.kafka_offset <@ i.offsets) IS NOT TRUE OR EXISTS (
        SELECT FROM accepted_gaps g
        WHERE (g.topic_id, g.kafka_partition) = (r.topic_id, r.kafka_partition) AND r.kafka_offset <@ g.offsets
    )
"""
_TWICE = f"""
    SELECT {_READING} || ': stored ' || count(*) || ' times' AS said
    FROM (
        SELECT topic_id, kafka_partition, kafka_offset FROM readings
        UNION ALL SELECT topic_id, kafka_partition, kafka_offset FROM rejected_messages
    ) AS r
    GROUP BY topic_id, kafka_partition, kafka_offset HAVING count(*) > 1
"""
_OVERLAPS = """
    SELECT 'machine ' || m.machine_id || ': failure ' || f.id || ' starts at ' || f.start_time
        || ', before an earlier one ended' AS said
    FROM (
        SELECT id, machine_id, start_time, max(coalesce(end_time, 'infinity')) OVER (
            PARTITION BY machine_id ORDER BY start_time, end_time NULLS LAST, id
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS others_end
        FROM failures
    ) AS f JOIN machines m ON m.id = f.machine_id
    WHERE f.start_time < f.others_end
"""
_REFERENCES = f"""
    SELECT {_READING} || ': ' || concat_ws(', ',
        CASE WHEN m.id IS NULL THEN 'there is no machine ' || r.machine_id END,
        CASE WHEN t.id IS NULL THEN 'there is no topic ' || r.topic_id END,
        CASE WHEN r.failure_id IS NOT NULL AND f.id IS NULL THEN 'there is no failure ' || r.failure_id END,
        CASE WHEN f.machine_id <> r.machine_id THEN 'failure ' || f.id || ' is of machine ' || f.machine_id END
    ) AS said
    FROM readings r
    LEFT JOIN machines m ON m.id = r.machine_id
    LEFT JOIN topics t ON t.id = r.topic_id
    LEFT JOIN failures f ON f.id = r.failure_id
    WHERE m.id IS NULL OR t.id IS NULL OR (r.failure_id IS NOT NULL AND f.machine_id IS DISTINCT FROM r.machine_id)
"""

_MACHINES = sa.text("""
    SELECT id, machine_id AS name FROM machines
    WHERE CAST(:names AS text[]) IS NULL OR machine_id = ANY (CAST(:names AS text[])) ORDER BY id
""")
_SEEN = sa.text(f"SELECT first_seen, last_seen, held.first, held.last FROM {SEEN_BY_READINGS} WHERE id = :machine")


@dataclass(frozen=True)
class Check:
    """One question: what must hold, whether every reading is read for it, and what to do where it does not."""

    title: str
    statement: str
    reads_readings: bool
    remedy: str = _RESTORE


CONSERVATION = (
    Check("every logged batch adds up", _BATCHES, reads_readings=False),
    Check("every logged batch is in the ledger", _LOGGED, reads_readings=False),
)
LEDGER_TOTALS = (
    Check("the ledger's totals add up to its offsets", _TOTALS, reads_readings=False),
    Check("the accepted gaps are the ledger's lost offsets", _GAPS, reads_readings=False),
)
REJECTED = (
    Check(
        "there are as many rejected messages as the ledger says",
        _HELD.format(total="rejected", rows=_REJECTED_ROWS),
        reads_readings=False,
    ),
    Check("every rejected message is in the ledger", _OUTSIDE.format(table="rejected_messages"), reads_readings=False),
)
OVERLAPS = (
    Check(
        "no two failures of a machine overlap",
        _OVERLAPS,
        reads_readings=False,
        remedy="run `sensor-pipeline recompute`, which makes them from the readings again",
    ),
)
CHECKS = (
    *CONSERVATION,
    *LEDGER_TOTALS,
    *REJECTED,
    *OVERLAPS,
    Check(
        "there are as many readings, with those dropped, as the ledger says",
        _HELD.format(total="readings", rows=_READINGS_ROWS),
        reads_readings=True,
    ),
    Check("every reading is in the ledger", _OUTSIDE.format(table="readings"), reads_readings=True),
    Check("no offset is stored twice", _TWICE, reads_readings=True),
    Check(
        "every reading's machine, topic and failure are there",
        _REFERENCES,
        reads_readings=True,
        remedy="where only failures are missing, `sensor-pipeline recompute` mends it; otherwise " + _RESTORE,
    ),
)


@dataclass(frozen=True)
class Answer:
    """How many things are wrong, and the first of them in words."""

    wrong: int
    examples: list[str]


def ask(connection: sa.Connection, check: Check) -> Answer:
    """Ask one question."""
    statement = sa.text(f"SELECT count(*) OVER (), said FROM ({check.statement}) AS wrong LIMIT :examples")
    rows = connection.execute(statement, {"examples": EXAMPLES}).all()
    return Answer(rows[0][0] if rows else 0, [row.said for row in rows])


@dataclass(frozen=True)
class Machine:
    """`id` as in `machines`, `name` as it publishes."""

    id: int
    name: str


def find_machines(connection: sa.Connection, names: Sequence[str] = ()) -> list[Machine]:
    """The machines of these names, or all, in order of id.

    Raises:
        ConfigurationError: a name is no machine's.
    """
    machines = [Machine(row.id, row.name) for row in connection.execute(_MACHINES, {"names": list(names) or None})]
    unknown = sorted(set(names) - {machine.name for machine in machines})
    if unknown:
        raise ConfigurationError(f"there is no machine {', '.join(unknown)} in the database; correct the name")
    return machines


def look(
    connection: sa.Connection, machine: Machine, since: datetime | None = None, until: datetime | None = None
) -> tuple[list[Difference], str | None]:
    """What is wrong with a machine's failures that touch some time, and with when it was seen."""
    window = widen(connection, machine.id, since, until)
    differences = compare(find_episodes(connection, window), stored_failures(connection, window))
    held = connection.execute(_SEEN, {"machine": machine.id}).one()
    if held.last is None:
        return differences, "it has no reading (which recompute leaves alone): restore them, or delete its row"
    if (held.first, held.last) != (held.first_seen, held.last_seen):
        return differences, (
            f"first_seen and last_seen are {held.first_seen.isoformat()} and {held.last_seen.isoformat()}, and by its "
            f"readings {held.first.isoformat()} and {held.last.isoformat()}"
        )
    return differences, None
