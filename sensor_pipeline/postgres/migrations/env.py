"""Run by Alembic: migrates over the connection that `migrate` opened, in its transaction."""

from alembic import context

from sensor_pipeline.postgres.database import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
