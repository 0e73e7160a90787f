"""Changes of the tables, applied in order by alembic when the database is opened."""
