"""The first tables."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text(), nullable=False, comment="Public name of the row; safe in logs."),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="SHA-256 of the secret."),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=True, comment="The key or sign-in this was made from."),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('key', 'sign_in', 'session')", name=op.f("ck_api_keys_kind")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
        schema="overtone",
        comment="API keys, one-time sign-in tokens and browser sessions; the secrets themselves are never stored.",
    )
    op.create_index(op.f("ix_api_keys_parent_id"), "api_keys", ["parent_id"], unique=False, schema="overtone")
    op.create_table(
        "api_usage",
        sa.Column("day", sa.Date(), nullable=False, comment="UTC day."),
        sa.Column("resource", sa.Text(), nullable=False, comment="What the X API bills: posts, users."),
        sa.Column("count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cost_usd", sa.Numeric(precision=14, scale=6), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("day", "resource", name=op.f("pk_api_usage")),
        schema="overtone",
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False, comment="A key_id, or the part of the system that acted."),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=True),
        sa.Column(
            "detail", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
        schema="overtone",
    )
    op.create_index("ix_audit_log_at", "audit_log", ["at"], unique=False, schema="overtone")
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="SHA-256 of raw."),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("post_id", sa.BigInteger(), nullable=True, comment="Where it is known, so that erasure finds it."),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dead_letters")),
        sa.UniqueConstraint("digest", name=op.f("uq_dead_letters_digest")),
        schema="overtone",
    )
    op.create_index(op.f("ix_dead_letters_post_id"), "dead_letters", ["post_id"], unique=False, schema="overtone")
    op.create_table(
        "deleted_posts",
        sa.Column("post_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("post_id", name=op.f("pk_deleted_posts")),
        schema="overtone",
        comment="Tombstones: posts that must not come back through a replay, a backfill or a late prediction.",
    )
    op.create_table(
        "feedback",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("post_id", sa.BigInteger(), nullable=True, comment="Null for a text that is not a stored post."),
        sa.Column(
            "text",
            sa.Text(),
            nullable=True,
            comment="Only for texts that people submitted; a post's text stays in posts.",
        ),
        sa.Column("label", sa.Text(), nullable=False, comment="What the person says."),
        sa.Column("predicted_label", sa.Text(), nullable=True),
        sa.Column("model_version", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=True, comment="Who gave it."),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("post_id IS NOT NULL OR text IS NOT NULL", name=op.f("ck_feedback_subject")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feedback")),
        schema="overtone",
    )
    op.create_index("ix_feedback_created_at", "feedback", ["created_at"], unique=False, schema="overtone")
    op.create_index(op.f("ix_feedback_post_id"), "feedback", ["post_id"], unique=False, schema="overtone")
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default=sa.text("'queued'"), nullable=False),
        sa.Column(
            "parameters", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column("done", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment="Items done."),
        sa.Column("total", sa.BigInteger(), nullable=True, comment="Items to do; null while unknown."),
        sa.Column("result", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=True, comment="Who asked for it."),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_jobs_state")
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_jobs")),
        schema="overtone",
    )
    op.create_index("ix_jobs_state_created_at", "jobs", ["state", "created_at"], unique=False, schema="overtone")
    op.create_table(
        "posts",
        sa.Column("post_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("author_id", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lang", sa.Text(), nullable=True),
        sa.Column("rule_tags", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False),
        sa.Column(
            "payload", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column("stream", sa.Text(), nullable=False, comment="Where the post came from: the name of its cursor."),
        sa.Column("stored_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("post_id", name=op.f("pk_posts")),
        schema="overtone",
        postgresql_partition_by="RANGE (post_id)",
    )
    op.create_index(op.f("ix_posts_author_id"), "posts", ["author_id"], unique=False, schema="overtone")
    op.create_index(
        "ix_posts_stored_at", "posts", ["stored_at"], unique=False, schema="overtone", postgresql_using="brin"
    )
    op.create_table(
        "predictions",
        sa.Column("post_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("confidence", sa.REAL(), nullable=False),
        sa.Column("scores", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("post_id", "model_version", name=op.f("pk_predictions")),
        schema="overtone",
        postgresql_partition_by="RANGE (post_id)",
    )
    op.create_index(
        "ix_predictions_stored_at",
        "predictions",
        ["stored_at"],
        unique=False,
        schema="overtone",
        postgresql_using="brin",
    )
    op.create_table(
        "stream_cursor",
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column(
            "post_id", sa.BigInteger(), nullable=False, comment="The newest post stored from this stream; 0 for none."
        ),
        sa.Column(
            "epoch",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Fencing number of the leader.",
        ),
        sa.Column("moved_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("stream", name=op.f("pk_stream_cursor")),
        schema="overtone",
    )
    op.create_table(
        "stream_gaps",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("after_post_id", sa.BigInteger(), nullable=True, comment="The last post before the gap."),
        sa.Column("before_post_id", sa.BigInteger(), nullable=True, comment="The first post after the gap."),
        sa.Column("state", sa.Text(), server_default=sa.text("'open'"), nullable=False),
        sa.Column("repaired_posts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint(
            "state IN ('open', 'closed', 'repaired', 'unrepairable')", name=op.f("ck_stream_gaps_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stream_gaps")),
        schema="overtone",
    )
    op.create_index(
        "ix_stream_gaps_stream_started_at", "stream_gaps", ["stream", "started_at"], unique=False, schema="overtone"
    )
    op.create_table(
        "tallies",
        sa.Column("kind", sa.Text(), nullable=False, comment="posts or predictions."),
        sa.Column(
            "minute",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Minute of storing, UTC; -infinity holds the sum over all minutes.",
        ),
        sa.Column("label", sa.Text(), nullable=False, comment="Label of predictions; empty for posts."),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "minute", "label", name=op.f("pk_tallies")),
        schema="overtone",
        postgresql_with={"fillfactor": "50"},
    )


def downgrade() -> None:
    op.drop_table("tallies", schema="overtone")
    op.drop_index("ix_stream_gaps_stream_started_at", table_name="stream_gaps", schema="overtone")
    op.drop_table("stream_gaps", schema="overtone")
    op.drop_table("stream_cursor", schema="overtone")
    op.drop_index("ix_predictions_stored_at", table_name="predictions", schema="overtone", postgresql_using="brin")
    op.drop_table("predictions", schema="overtone")
    op.drop_index("ix_posts_stored_at", table_name="posts", schema="overtone", postgresql_using="brin")
    op.drop_index(op.f("ix_posts_author_id"), table_name="posts", schema="overtone")
    op.drop_table("posts", schema="overtone")
    op.drop_index("ix_jobs_state_created_at", table_name="jobs", schema="overtone")
    op.drop_table("jobs", schema="overtone")
    op.drop_index(op.f("ix_feedback_post_id"), table_name="feedback", schema="overtone")
    op.drop_index("ix_feedback_created_at", table_name="feedback", schema="overtone")
    op.drop_table("feedback", schema="overtone")
    op.drop_table("deleted_posts", schema="overtone")
    op.drop_index(op.f("ix_dead_letters_post_id"), table_name="dead_letters", schema="overtone")
    op.drop_table("dead_letters", schema="overtone")
    op.drop_index("ix_audit_log_at", table_name="audit_log", schema="overtone")
    op.drop_table("audit_log", schema="overtone")
    op.drop_table("api_usage", schema="overtone")
    op.drop_index(op.f("ix_api_keys_parent_id"), table_name="api_keys", schema="overtone")
    op.drop_table("api_keys", schema="overtone")
