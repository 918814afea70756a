"""Active failures are found without the others: at most one a machine, of perhaps millions."""

from sensor_pipeline.postgres.migrations import add_index

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Index the active failures by machine."""
    add_index("failures_active", "failures (machine_id) WHERE is_active")
