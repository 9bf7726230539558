"""How gaps of a stream ended and why, and when connections to it were made."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

_NAME = "ck_stream_gaps_state"


def upgrade() -> None:
    op.add_column(
        "stream_gaps",
        sa.Column("means", sa.Text(), nullable=True, comment="By what it was repaired: backfill, replay or search."),
        schema="overtone",
    )
    op.add_column(
        "stream_gaps",
        sa.Column("reason", sa.Text(), nullable=True, comment="Why not all of it was repaired."),
        schema="overtone",
    )
    op.drop_constraint(op.f(_NAME), "stream_gaps", schema="overtone")
    op.execute(
        "UPDATE overtone.stream_gaps SET reason = 'search could not reach all of it',"
        " state = CASE WHEN repaired_posts > 0 THEN 'partly_repaired' ELSE 'accepted' END WHERE state = 'unrepairable'"
    )
    op.create_check_constraint(
        op.f(_NAME),
        "stream_gaps",
        "state IN ('open', 'closed', 'repaired', 'partly_repaired', 'accepted')",
        schema="overtone",
    )
    op.create_table(
        "stream_connects",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stream_connects")),
        schema="overtone",
        comment="Requests for a stream in the last quarter of an hour: what X allows is counted over all processes.",
    )
    op.create_index("ix_stream_connects_stream_made_at", "stream_connects", ["stream", "made_at"], schema="overtone")


def downgrade() -> None:
    op.drop_index("ix_stream_connects_stream_made_at", table_name="stream_connects", schema="overtone")
    op.drop_table("stream_connects", schema="overtone")
    op.drop_constraint(op.f(_NAME), "stream_gaps", schema="overtone")
    op.execute("UPDATE overtone.stream_gaps SET state = 'unrepairable' WHERE state IN ('partly_repaired', 'accepted')")
    op.create_check_constraint(
        op.f(_NAME), "stream_gaps", "state IN ('open', 'closed', 'repaired', 'unrepairable')", schema="overtone"
    )
    for column in ("reason", "means"):
        op.drop_column("stream_gaps", column, schema="overtone")
