"""Run by Alembic: migrates over the connection that `migrate` opened, each version in a transaction of its own."""

from alembic import context

from sensor_pipeline.postgres.database import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], version_table=VERSION_TABLE, transaction_per_migration=True
)
with context.begin_transaction():
    context.run_migrations()
