"""Rejected messages can be replayed: by the rule on times ahead too, and told apart in the batch log."""

from alembic import op

revision = "0004"
down_revision = "0003"

COLUMNS = """
ALTER TABLE batches ADD COLUMN kind text NOT NULL DEFAULT 'ingest';
COMMENT ON COLUMN batches.kind IS
    'ingest: offsets read from Kafka; replay: rejected messages that became readings, in ranges that were done before.';

ALTER TABLE rejected_messages ADD COLUMN kafka_timestamp_ms bigint;
COMMENT ON COLUMN rejected_messages.kafka_timestamp_ms IS
    'The Kafka record''s own timestamp in ms since 1970; -1: it has none; null: rejected before this was kept.';
"""


def upgrade() -> None:
    """Add the columns; neither rewrites its table."""
    op.execute(COLUMNS)
