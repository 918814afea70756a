"""Everything that speaks to Dagster; the only place with it."""
