"""Decisions to retrain, and the runs that came of them."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "retrain_decisions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False, comment="submits: a run was made of it; waits: none was due."),
        sa.Column(
            "detail",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="Each criterion with its figures, and the reasons.",
        ),
        sa.Column("model_version", sa.Text(), nullable=True, comment="Whose predictions were looked at."),
        sa.Column(
            "run", sa.Text(), nullable=True, comment="Name of the run, and id under which its job is submitted to Ray."
        ),
        sa.Column("entrypoint", sa.Text(), nullable=True, comment="The command of the job."),
        sa.Column("state", sa.Text(), nullable=True, comment="Of the run; null without one."),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("outcome IN ('submits', 'waits')", name=op.f("ck_retrain_decisions_outcome")),
        sa.CheckConstraint("state IN ('open', 'succeeded', 'failed')", name=op.f("ck_retrain_decisions_state")),
        sa.CheckConstraint("(run IS NULL) = (state IS NULL)", name=op.f("ck_retrain_decisions_run")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_retrain_decisions")),
        sa.UniqueConstraint("run", name=op.f("uq_retrain_decisions_run")),
        schema="overtone",
    )
    op.create_index("ix_retrain_decisions_decided_at", "retrain_decisions", ["decided_at"], schema="overtone")
    op.create_index(
        "uq_retrain_decisions_open",
        "retrain_decisions",
        ["state"],
        unique=True,
        schema="overtone",
        postgresql_where=sa.text("state = 'open'"),
    )


def downgrade() -> None:
    op.drop_table("retrain_decisions", schema="overtone")
