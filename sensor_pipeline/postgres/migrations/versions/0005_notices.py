"""The outbox: what people are to be told, written in the transaction that finds it, delivered by another process."""

from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = """
-- No foreign keys: a notice outlives the failure that it tells of, and a first catch-up writes millions.
CREATE TABLE notices (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL,
    machine_id bigint,
    failure_id bigint,
    start_time timestamptz,
    end_time timestamptz,
    event_time timestamptz NOT NULL,
    found_at timestamptz NOT NULL DEFAULT statement_timestamp(),
    subject text,
    details jsonb,
    attempts integer NOT NULL DEFAULT 0,
    retry_at timestamptz NOT NULL DEFAULT statement_timestamp(),
    refused_since timestamptz,
    outcome text,
    closed_at timestamptz,
    CHECK ((machine_id IS NULL) = (subject IS NOT NULL)),
    CHECK ((outcome IS NULL) = (closed_at IS NULL))
);
-- Partial ones, which cost nothing for notices that are too old to be sent.
CREATE INDEX notices_undelivered ON notices (machine_id, subject, id) WHERE outcome IS NULL;
CREATE INDEX notices_given_up ON notices (id) WHERE outcome = 'given_up';
CREATE INDEX notices_subject ON notices (kind, subject, found_at) WHERE subject IS NOT NULL;
COMMENT ON TABLE notices IS 'What people are told: of a machine''s failures, or of the pipeline itself.';
COMMENT ON COLUMN notices.machine_id IS 'machines.id; null for a notice of the pipeline itself.';
COMMENT ON COLUMN notices.subject IS 'What a notice of the pipeline is about: no second one of its kind for a while.';
COMMENT ON COLUMN notices.event_time IS 'When it happened; what was long ago when it was found is not sent.';
COMMENT ON COLUMN notices.outcome IS 'sent, logged (no webhook is set), old or given_up; null while it is to be sent.';
"""


def upgrade() -> None:
    """Make the outbox."""
    op.execute(TABLES)
