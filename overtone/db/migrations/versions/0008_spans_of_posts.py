"""Chunks of jobs that are spans of stored posts."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

COLUMNS = {
    "first_post_id": "Where the chunk is a span of stored posts: the first of them.",
    "last_post_id": "The last of them.",
}


def upgrade() -> None:
    for name, comment in COLUMNS.items():
        column = sa.Column(name, sa.BigInteger(), nullable=True, comment=comment)
        op.add_column("job_chunks", column, schema="overtone")


def downgrade() -> None:
    for name in COLUMNS:
        op.drop_column("job_chunks", name, schema="overtone")
