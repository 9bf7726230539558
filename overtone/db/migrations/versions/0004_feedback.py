"""Who gave feedback and how, and one label a person and subject."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    for column in (
        sa.Column("source", sa.Text(), server_default=sa.text("'human'"), nullable=False),
        sa.Column(
            "annotator",
            sa.Text(),
            server_default=sa.text("''"),
            nullable=False,
            comment="Where one key speaks for several.",
        ),
        sa.Column(
            "subject",
            sa.LargeBinary(),
            nullable=True,
            comment="SHA-256 of what the label is for; null in rows from before there was one.",
        ),
    ):
        op.add_column("feedback", column, schema="overtone")
    op.create_check_constraint(
        op.f("ck_feedback_source"), "feedback", "source IN ('human', 'import')", schema="overtone"
    )
    op.create_index(
        "uq_feedback_key_id", "feedback", ["key_id", "annotator", "subject"], unique=True, schema="overtone"
    )


def downgrade() -> None:
    op.drop_index("uq_feedback_key_id", table_name="feedback", schema="overtone")
    op.drop_constraint(op.f("ck_feedback_source"), "feedback", schema="overtone")
    for column in ("subject", "annotator", "source"):
        op.drop_column("feedback", column, schema="overtone")
