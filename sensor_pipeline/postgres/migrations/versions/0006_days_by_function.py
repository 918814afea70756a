"""Partitions are made by a function of the owner's, so that who writes need not own `readings`."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

FUNCTION = """
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

REVOKE ALL ON FUNCTION make_readings_day FROM PUBLIC;
"""


def upgrade() -> None:
    """Make the function."""
    # Not the caller's search_path: what it finds there would run with the owner's rights.
    schema = op.get_bind().scalar(sa.text("SELECT quote_ident(current_schema())"))
    op.execute(FUNCTION.format(schema=schema))
