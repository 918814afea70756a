"""Old readings can be dropped, and partitions are made, by functions: whoever calls them need not own the tables."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

TABLES = """
ALTER TABLE readings_horizon ADD COLUMN kept_from date, ADD COLUMN dropped_before date;
COMMENT ON COLUMN readings_horizon.horizon IS 'From this day (UTC) on each day has a partition of its own.';
COMMENT ON COLUMN readings_horizon.kept_from IS
    'Readings before this day (UTC) are rejected; null: none ever were.';
COMMENT ON COLUMN readings_horizon.dropped_before IS
    'Readings before this day (UTC) were dropped but for the first and the last failing one of each failure that '
    'reaches into it; null: none ever were. It follows kept_from.';

CREATE TABLE dropped_readings (
    topic_id smallint NOT NULL REFERENCES topics (id),
    kafka_partition integer NOT NULL,
    kept_from date NOT NULL,
    readings bigint NOT NULL,
    dropped_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic_id, kafka_partition, kept_from)
);
COMMENT ON TABLE dropped_readings IS
    'How many readings each drop took; with those that are there, the ledger''s total.';
"""

# One makes or drops partitions at a time (7360712916). A batch holds 7360712917 shared, so that after it was had alone
# nobody still writes by an older kept_from. A queue of its own, unlike a lock of the row: a batch that comes after the
# drop waits behind it, where it would else be let in beside other batches for ever.
FUNCTIONS = """
CREATE FUNCTION make_readings_day(day date) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp SET datestyle = 'ISO' AS $$
DECLARE
    partition text := 'readings_' || to_char(day, 'YYYYMMDD');
    -- The last day that Python can name has no next one.
    next text := CASE WHEN day = '9999-12-31' THEN 'MAXVALUE'
                 ELSE quote_literal((day + 1)::timestamp AT TIME ZONE 'UTC') END;
BEGIN
    PERFORM pg_advisory_xact_lock(7360712916);
    IF day < (SELECT horizon FROM readings_horizon) OR EXISTS (
        SELECT FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
        WHERE inhparent = 'readings'::regclass AND child.relname = partition
    ) THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE readings INCLUDING ALL)', partition);
    EXECUTE format(
        'ALTER TABLE readings ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%s)',
        partition, day::timestamp AT TIME ZONE 'UTC', next
    );
    RETURN true;
END $$;

CREATE FUNCTION keep_readings_from(day date) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7360712917);
    UPDATE readings_horizon SET kept_from = day
    WHERE day >= horizon AND (kept_from IS NULL OR (day > kept_from AND kept_from = dropped_before));
    RETURN FOUND;
END $$;
COMMENT ON FUNCTION keep_readings_from IS
    'Rejects readings before a day from now on; not before the horizon, nor while an earlier day is to be dropped.';

CREATE FUNCTION drop_readings() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp SET datestyle = 'ISO' AS $$
DECLARE
    day date;
    moment timestamptz;
    partition regclass;
    dropped bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(7360712918);
    SELECT kept_from INTO day FROM readings_horizon WHERE kept_from IS DISTINCT FROM dropped_before;
    IF day IS NULL THEN
        RETURN 0;
    END IF;
    moment := day::timestamp AT TIME ZONE 'UTC';

    -- What takes long first: nothing is written there any more, and no lock is held that anybody waits for.
    INSERT INTO dropped_readings (topic_id, kafka_partition, kept_from, readings)
    SELECT topic_id, kafka_partition, day, count(*) FROM readings WHERE "timestamp" < moment GROUP BY 1, 2;

    PERFORM pg_advisory_xact_lock(7360712916);
    LOCK TABLE readings IN ACCESS EXCLUSIVE MODE;
    -- A failure that reaches into what is kept stays what it is, and may go on, end or be split there: its own first
    -- and last reading from before are all that this needs.
    CREATE TABLE readings_kept (LIKE readings INCLUDING ALL);
    INSERT INTO readings_kept
    SELECT r.* FROM failures f
    CROSS JOIN LATERAL (
        SELECT max(old."timestamp") AS last FROM readings old
        WHERE old.machine_id = f.machine_id AND old.failure_id = f.id AND old."timestamp" < moment
            AND old."timestamp" >= f.start_time
    ) AS before
    JOIN readings r ON r.machine_id = f.machine_id AND r.failure_id = f.id AND r."timestamp" < moment
        AND r."timestamp" IN (f.start_time, before.last)
    WHERE f.start_time < moment AND (f.is_active OR f.end_time >= moment);

    FOR partition IN
        SELECT child.oid::regclass FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
        WHERE inhparent = 'readings'::regclass AND (
            child.relname = 'readings_before_horizon' OR child.relname < 'readings_' || to_char(day, 'YYYYMMDD')
        )
    LOOP
        EXECUTE format('DROP TABLE %s', partition);
    END LOOP;
    ALTER TABLE readings_kept RENAME TO readings_before_horizon;
    EXECUTE format(
        'ALTER TABLE readings ATTACH PARTITION readings_before_horizon FOR VALUES FROM (MINVALUE) TO (%L)', moment
    );

    UPDATE dropped_readings d SET readings = d.readings - kept.rows
    FROM (SELECT topic_id, kafka_partition, count(*) AS rows FROM readings_before_horizon GROUP BY 1, 2) AS kept
    WHERE (d.topic_id, d.kafka_partition, d.kept_from) = (kept.topic_id, kept.kafka_partition, day);
    DELETE FROM dropped_readings WHERE kept_from = day AND readings = 0;
    SELECT coalesce(sum(readings), 0) INTO dropped FROM dropped_readings WHERE kept_from = day;
    UPDATE readings_horizon SET horizon = day, dropped_before = day;
    RETURN dropped;
END $$;
COMMENT ON FUNCTION drop_readings IS
    'Drops the partitions before kept_from, all readings in them but the edges of failures that reach into it.';

REVOKE ALL ON FUNCTION make_readings_day, keep_readings_from, drop_readings FROM PUBLIC;
"""


def upgrade() -> None:
    """Add what is kept from when, and the functions."""
    op.execute(TABLES)
    # Not the caller's search_path: what it finds there would run with the owner's rights.
    schema = op.get_bind().scalar(sa.text("SELECT quote_ident(current_schema())"))
    op.execute(FUNCTIONS.format(schema=schema))
