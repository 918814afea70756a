"""A past for Dagster's database: copies of real runs with all that was written of them, at a run every 5 s."""

from __future__ import annotations

from collections.abc import Callable

from sensor_pipeline.bench.running import Up

EVERY_SECONDS = 5
_RUNS_A_PIECE = 1_440
_DAY = 86_400

_TEMPLATES = """
    CREATE TABLE past_runs AS
        SELECT row_number() OVER (ORDER BY id) - 1 AS k, runs.*
        FROM runs WHERE pipeline_name = 'ingest_batch' AND status = 'SUCCESS' ORDER BY id LIMIT 12;
    CREATE TABLE past_events AS
        SELECT k, e.*, regexp_replace(event, '"timestamp": [0-9.]+, "user_message".*', '"timestamp": ') AS head,
            regexp_replace(event, '.*"timestamp": [0-9.]+(, "user_message".*)$', '\\1') AS tail
        FROM event_logs AS e JOIN past_runs USING (run_id);
    CREATE TABLE past_ticks AS
        SELECT DISTINCT ON (selector_id, status) * FROM job_ticks
        WHERE type = 'SENSOR' AND status IN ('SUCCESS', 'SKIPPED') ORDER BY selector_id, status, id;
    CREATE TABLE past_piece (n integer, k bigint, run_id text, at timestamp, later double precision)
"""
_PIECE = """
    TRUNCATE past_piece;
    INSERT INTO past_piece
        SELECT n, k, gen_random_uuid()::text, made.at, extract(epoch FROM made.at - create_timestamp)
        FROM generate_series(0, %(runs)s - 1) AS n
        JOIN past_runs ON k = n %% (SELECT count(*) FROM past_runs)
        CROSS JOIN LATERAL (SELECT to_timestamp(%(start)s + n * %(every)s) AT TIME ZONE 'UTC' AS at) AS made;
    ANALYZE past_piece;
    INSERT INTO runs (run_id, snapshot_id, pipeline_name, status, run_body, create_timestamp, update_timestamp,
            start_time, end_time)
        SELECT p.run_id, r.snapshot_id, r.pipeline_name, r.status, replace(r.run_body, r.run_id, p.run_id), p.at,
            p.at + (r.update_timestamp - r.create_timestamp), r.start_time + later, r.end_time + later
        FROM past_piece AS p JOIN past_runs AS r USING (k) ORDER BY n;
    INSERT INTO run_tags (run_id, key, value)
        SELECT p.run_id, key, value
        FROM past_piece AS p JOIN past_runs AS r USING (k) JOIN run_tags AS t ON t.run_id = r.run_id ORDER BY n, t.id;
    INSERT INTO event_logs (run_id, event, dagster_event_type, timestamp, step_key, asset_key)
        SELECT p.run_id,
            replace(head, e.run_id, p.run_id) || round((extract(epoch FROM e.timestamp) + later)::numeric, 6)
                || replace(tail, e.run_id, p.run_id),
            dagster_event_type, e.timestamp + make_interval(secs => later), step_key, asset_key
        FROM past_piece AS p JOIN past_events AS e USING (k) ORDER BY n, e.id
"""
_TICKS = """
    INSERT INTO job_ticks (job_origin_id, selector_id, status, type, timestamp, tick_body, create_timestamp,
            update_timestamp)
        SELECT job_origin_id, selector_id, status, type, p.at, regexp_replace(regexp_replace(tick_body,
                '"timestamp": [0-9.]+', '"timestamp": ' || extract(epoch FROM p.at)),
                '"end_timestamp": [0-9.]+', '"end_timestamp": ' || extract(epoch FROM p.at) + 0.3), p.at, p.at
        FROM past_piece AS p CROSS JOIN past_ticks AS t ORDER BY n
"""


def prepare(up: Up) -> None:
    """Keep the first runs as what copies are made of; a dozen must have succeeded."""
    up.ask(_TEMPLATES)


def add_runs(up: Up, days: float, until: float, say: Callable[[str], None], *, ticks: bool = False) -> None:
    """Add the runs of so many days before `until` (seconds since 1970), oldest first, as their ids must be.

    Args:
        ticks: add the sensors' ticks of these days too; keep_house keeps no more than a day of them.
    """
    start = until - days * _DAY
    total = round(days * _DAY / EVERY_SECONDS)
    for first in range(0, total, _RUNS_A_PIECE):
        runs = min(_RUNS_A_PIECE, total - first)
        up.ask(_PIECE, {"start": start + first * EVERY_SECONDS, "every": EVERY_SECONDS, "runs": runs})
        if ticks:
            up.ask(_TICKS)
        say(f"month: {first + runs:,} of {total:,} runs of the past")
    up.ask("VACUUM ANALYZE")
