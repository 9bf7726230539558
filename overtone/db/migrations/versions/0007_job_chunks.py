"""What of a job is done, chunk by chunk."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "failed",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Of those done: with an error.",
        ),
        schema="overtone",
    )
    op.add_column(
        "jobs",
        sa.Column(
            "request_key",
            sa.Text(),
            nullable=True,
            comment="Names the request that made it, so that the same again makes no other.",
        ),
        schema="overtone",
    )
    op.create_index("uq_jobs_key_id", "jobs", ["key_id", "request_key"], unique=True, schema="overtone")
    op.create_table(
        "job_chunks",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, comment="From 1, in the order of the upload."),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("holder", sa.Uuid(), nullable=True, comment="The attempt that works on it."),
        sa.Column(
            "held_until",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When its holder counts as dead unless it says more.",
        ),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["overtone.jobs.job_id"], name="fk_job_chunks_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_job_chunks")),
        schema="overtone",
        comment="What of a job is done. The broker only says who works next: what it loses is queued again from here.",
    )
    op.create_index(
        "ix_job_chunks_open",
        "job_chunks",
        ["job_id", "number"],
        unique=False,
        schema="overtone",
        postgresql_where=sa.text("done_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_job_chunks_open", table_name="job_chunks", schema="overtone")
    op.drop_table("job_chunks", schema="overtone")
    op.drop_index("uq_jobs_key_id", table_name="jobs", schema="overtone")
    for column in ("request_key", "failed"):
        op.drop_column("jobs", column, schema="overtone")
