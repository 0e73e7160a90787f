"""Called by alembic: applies the migrations over the connection that `open_database` passes."""

from __future__ import annotations

from alembic import context

from emb_model_provider.batch_jobs.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
