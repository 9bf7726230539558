"""Every table, as SQLAlchemy describes it: the truth that migrations are generated from and checked against.

`posts` and `predictions` are range-partitioned by post id. Ids are snowflakes, so bounds of ids are bounds of time,
and the primary key can stay the post id alone: a duplicate is found whichever partition it would fall into. There is
no DEFAULT partition, because one that exists forbids detaching others without blocking. Nothing references a
partitioned table by foreign key, for the same reason.

The partitions themselves are made by `overtone.db.partitions` and are not described here.
"""

import re

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, REAL

SCHEMA = "overtone"

PARTITIONED = ("posts", "predictions")
"""Tables split by post id, into partitions of the same bounds."""

PARTITION_NAME = re.compile(rf"^(?:{'|'.join(PARTITIONED)})_\d{{4}}_\d{{2}}$")

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    },
)

_NOW = text("now()")


def _instant(name: str, *, default_now: bool = False, nullable: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=_NOW if default_now else None)


def _id() -> Column[int]:
    return Column("id", BigInteger, Identity(always=True), primary_key=True)


posts = Table(
    "posts",
    metadata,
    Column("post_id", BigInteger, primary_key=True, autoincrement=False),
    Column("author_id", BigInteger, nullable=False, index=True),
    Column("text", Text, nullable=False),
    _instant("created_at"),
    Column("lang", Text),
    Column("rule_tags", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),
    Column("payload", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("stream", Text, nullable=False, comment="Where the post came from: the name of its cursor."),
    _instant("stored_at", default_now=True),
    Index("ix_posts_stored_at", "stored_at", postgresql_using="brin"),
    postgresql_partition_by="RANGE (post_id)",
)

predictions = Table(
    "predictions",
    metadata,
    Column("post_id", BigInteger, primary_key=True, autoincrement=False),
    Column("model_version", Text, primary_key=True),
    Column("label", Text, nullable=False),
    Column("confidence", REAL, nullable=False),
    Column("scores", JSONB, nullable=False),
    _instant("stored_at", default_now=True),
    Index("ix_predictions_stored_at", "stored_at", postgresql_using="brin"),
    postgresql_partition_by="RANGE (post_id)",
)

tallies = Table(
    "tallies",
    metadata,
    Column("kind", Text, primary_key=True, comment="posts or predictions."),
    Column(
        "minute",
        DateTime(timezone=True),
        primary_key=True,
        comment="Minute of storing, UTC; -infinity holds the sum over all minutes.",
    ),
    Column("label", Text, primary_key=True, comment="Label of predictions; empty for posts."),
    Column("count", BigInteger, nullable=False),
    # The rows of the running minute change with every batch: room on the page keeps those updates off the index.
    postgresql_with={"fillfactor": "50"},
)

deleted_posts = Table(
    "deleted_posts",
    metadata,
    Column("post_id", BigInteger, primary_key=True, autoincrement=False),
    Column("reason", Text, nullable=False),
    _instant("deleted_at", default_now=True),
    comment="Tombstones: posts that must not come back through a replay, a backfill or a late prediction.",
)

deleted_authors = Table(
    "deleted_authors",
    metadata,
    Column("author_id", BigInteger, primary_key=True, autoincrement=False),
    Column("reason", Text, nullable=False),
    _instant("deleted_at", default_now=True),
    comment="Tombstones: authors of whom no post may be stored.",
)

stream_cursor = Table(
    "stream_cursor",
    metadata,
    Column("stream", Text, primary_key=True),
    Column("post_id", BigInteger, nullable=False, comment="The newest post stored from this stream; 0 for none."),
    Column("epoch", BigInteger, nullable=False, server_default=text("0"), comment="Fencing number of the leader."),
    _instant("moved_at", default_now=True),
)

stream_gaps = Table(
    "stream_gaps",
    metadata,
    _id(),
    Column("stream", Text, nullable=False),
    Column("cause", Text, nullable=False),
    _instant("started_at"),
    _instant("ended_at", nullable=True),
    Column("after_post_id", BigInteger, comment="The last post before the gap."),
    Column("before_post_id", BigInteger, comment="The first post after the gap."),
    Column("state", Text, nullable=False, server_default=text("'open'")),
    Column("repaired_posts", Integer, nullable=False, server_default=text("0")),
    Column("means", Text, comment="By what it was repaired: backfill, replay or search."),
    Column("reason", Text, comment="Why not all of it was repaired."),
    CheckConstraint("state IN ('open', 'closed', 'repaired', 'partly_repaired', 'accepted')", name="state"),
    Index("ix_stream_gaps_stream_started_at", "stream", "started_at"),
)

stream_connects = Table(
    "stream_connects",
    metadata,
    _id(),
    Column("stream", Text, nullable=False),
    _instant("made_at"),
    Index("ix_stream_connects_stream_made_at", "stream", "made_at"),
    comment="Requests for a stream in the last quarter of an hour: what X allows is counted over all processes.",
)

dead_letters = Table(
    "dead_letters",
    metadata,
    _id(),
    Column("digest", LargeBinary, nullable=False, unique=True, comment="SHA-256 of raw."),
    Column("raw", LargeBinary, nullable=False),
    Column("reason", Text, nullable=False),
    Column("post_id", BigInteger, index=True, comment="Where it is known, so that erasure finds it."),
    Column("attempts", Integer, nullable=False, server_default=text("1")),
    _instant("first_seen_at", default_now=True),
    _instant("last_seen_at", default_now=True),
)

feedback = Table(
    "feedback",
    metadata,
    _id(),
    Column("post_id", BigInteger, index=True, comment="Null for a text that is not a stored post."),
    Column("text", Text, comment="Only for texts that people submitted; a post's text stays in posts."),
    Column("label", Text, nullable=False, comment="What the person says."),
    Column("predicted_label", Text),
    Column("model_version", Text),
    Column("key_id", Text, comment="Who gave it."),
    _instant("created_at", default_now=True),
    Column("source", Text, nullable=False, server_default=text("'human'")),
    Column("annotator", Text, nullable=False, server_default=text("''"), comment="Where one key speaks for several."),
    Column("subject", LargeBinary, comment="SHA-256 of what the label is for; null in rows from before there was one."),
    CheckConstraint("post_id IS NOT NULL OR text IS NOT NULL", name="subject"),
    CheckConstraint("source IN ('human', 'import')", name="source"),
    Index("ix_feedback_created_at", "created_at"),
    Index("uq_feedback_key_id", "key_id", "annotator", "subject", unique=True),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'queued'")),
    Column("parameters", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("done", BigInteger, nullable=False, server_default=text("0"), comment="Items done."),
    Column("failed", BigInteger, nullable=False, server_default=text("0"), comment="Of those done: with an error."),
    Column("total", BigInteger, comment="Items to do; null while unknown."),
    Column("result", JSONB),
    Column("error", Text),
    Column("key_id", Text, comment="Who asked for it."),
    Column("request_key", Text, comment="Names the request that made it, so that the same again makes no other."),
    _instant("created_at", default_now=True),
    _instant("started_at", nullable=True),
    _instant("finished_at", nullable=True),
    CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
    Index("ix_jobs_state_created_at", "state", "created_at"),
    Index("uq_jobs_key_id", "key_id", "request_key", unique=True),
)

job_chunks = Table(
    "job_chunks",
    metadata,
    Column(
        "job_id",
        Uuid,
        ForeignKey("overtone.jobs.job_id", name="fk_job_chunks_job_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("number", Integer, primary_key=True, comment="From 1, in the order of the upload."),
    Column("items", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    _instant("queued_at", nullable=True),
    Column("holder", Uuid, comment="The attempt that works on it."),
    Column("held_until", DateTime(timezone=True), comment="When its holder counts as dead unless it says more."),
    _instant("done_at", nullable=True),
    Column("first_post_id", BigInteger, comment="Where the chunk is a span of stored posts: the first of them."),
    Column("last_post_id", BigInteger, comment="The last of them."),
    Index("ix_job_chunks_open", "job_id", "number", postgresql_where=text("done_at IS NULL")),
    comment="What of a job is done. The broker only says who works next: what it loses is queued again from here.",
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True, comment="Public name of the row; safe in logs."),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True, comment="SHA-256 of the secret."),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("parent_id", Text, index=True, comment="The key or sign-in this was made from."),
    _instant("created_at", default_now=True),
    _instant("expires_at", nullable=True),
    _instant("revoked_at", nullable=True),
    *(
        Column(name, kind, comment="Null: the default of the settings; 0: no limit.")
        for name, kind in (
            ("requests_per_minute", Integer),
            ("texts_per_minute", Integer),
            ("texts_per_day", BigInteger),
        )
    ),
    CheckConstraint("kind IN ('key', 'sign_in', 'session', 'retired')", name="kind"),
    CheckConstraint("least(requests_per_minute, texts_per_minute, texts_per_day) >= 0", name="limits"),
    comment="API keys, one-time sign-in tokens and browser sessions; the secrets themselves are never stored.",
)

audit_log = Table(
    "audit_log",
    metadata,
    _id(),
    _instant("at", default_now=True),
    Column("actor", Text, nullable=False, comment="A key_id, or the part of the system that acted."),
    Column("action", Text, nullable=False),
    Column("subject", Text),
    Column("detail", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Index("ix_audit_log_at", "at"),
)

retrain_decisions = Table(
    "retrain_decisions",
    metadata,
    _id(),
    _instant("decided_at"),
    Column("outcome", Text, nullable=False, comment="submits: a run was made of it; waits: none was due."),
    Column("detail", JSONB, nullable=False, comment="Each criterion with its figures, and the reasons."),
    Column("model_version", Text, comment="Whose predictions were looked at."),
    Column("run", Text, unique=True, comment="Name of the run, and id under which its job is submitted to Ray."),
    Column("entrypoint", Text, comment="The command of the job."),
    Column("state", Text, comment="Of the run; null without one."),
    _instant("submitted_at", nullable=True),
    _instant("ended_at", nullable=True),
    CheckConstraint("outcome IN ('submits', 'waits')", name="outcome"),
    CheckConstraint("state IN ('open', 'succeeded', 'failed')", name="state"),
    CheckConstraint("(run IS NULL) = (state IS NULL)", name="run"),
    Index("ix_retrain_decisions_decided_at", "decided_at"),
    # However many decide at once, and whatever became of the lock: one run at a time.
    Index("uq_retrain_decisions_open", "state", unique=True, postgresql_where=text("state = 'open'")),
)

api_usage = Table(
    "api_usage",
    metadata,
    Column("day", Date, primary_key=True, comment="UTC day."),
    Column("resource", Text, primary_key=True, comment="What the X API bills: posts, users."),
    Column("count", BigInteger, nullable=False, server_default=text("0")),
    Column("cost_usd", Numeric(14, 6), nullable=False, server_default=text("0")),
)
