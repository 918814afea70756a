"""Machine-sensor readings from Kafka to PostgreSQL, effectively once, in Dagster micro-batches."""
