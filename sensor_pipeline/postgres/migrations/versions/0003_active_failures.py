"""Active failures are found without the others: at most one a machine, of perhaps millions."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Index the active failures by machine."""
    op.execute("CREATE INDEX failures_active ON failures (machine_id) WHERE is_active")
