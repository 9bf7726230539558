"""Run by Alembic: applies the revisions on the connection that `overtone.db.migrate` opened."""

from alembic import context

from overtone.db.migrate import comparison_options
from overtone.db.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    **comparison_options(),
)
with context.begin_transaction():
    context.run_migrations()
