"""Everything that speaks to PostgreSQL; the only place with SQLAlchemy and psycopg2."""
