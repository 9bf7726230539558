"""Tombstones of authors."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "deleted_authors",
        sa.Column("author_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("author_id", name=op.f("pk_deleted_authors")),
        schema="overtone",
        comment="Tombstones: authors of whom no post may be stored.",
    )


def downgrade() -> None:
    op.drop_table("deleted_authors", schema="overtone")
