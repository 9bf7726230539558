"""What people say of posts and texts: one label a person and subject. And what is worth asking, and learning, of it."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from overtone.db.database import Database
from overtone.db.queries import query
from overtone.db.tombstones import keep_out_erasures
from overtone.schema import datetime_to_snowflake
from overtone.text import storable

Source = Literal["human", "import"]
State = Literal["created", "changed", "unchanged"]

_PAGE_ROWS = 2_000


@dataclass(frozen=True, slots=True)
class Feedback:
    """A label for a stored post, or for a text; one of the two is given."""

    label: str
    post_id: int | None = None
    text: str | None = None
    annotator: str = ""
    """Who says so, where one key speaks for several."""
    predicted_label: str | None = None
    """What the model said. Left out for a post: what its newest prediction says."""
    model_version: str | None = None

    @property
    def subject(self) -> bytes:
        """SHA-256 of what the label is for."""
        named = f"post:{self.post_id}" if self.post_id is not None else f"text:{self.text}"
        return hashlib.sha256(storable(named).encode()).digest()


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one piece of feedback."""

    feedback_id: int
    state: State


@dataclass(frozen=True, slots=True)
class TrainingLabel:
    """A label that may be learned from."""

    feedback_id: int
    label: str
    text: str
    post_id: int | None
    author_id: int | None
    annotator: str
    """Key and annotator: one opinion a text."""


@dataclass(frozen=True, slots=True)
class ToLabel:
    """A post whose label would teach much."""

    post_id: int
    text: str
    predicted_label: str | None
    confidence: float | None
    model_version: str | None
    reason: str
    """uncertain, versions disagree or annotators disagree."""


async def write_feedback(
    db: Database, items: Sequence[Feedback], *, key_id: str, source: Source = "human"
) -> list[Written | None]:
    """Store `items` in one transaction; None stands for a post that is not stored or is erased.

    A key and annotator have one label for each subject: the same again changes nothing, another label replaces it. Of
    several `items` for one of these, the last counts.

    Raises:
        DatabaseUnavailableError: nothing was stored, or the answer was lost; repeat the call.
    """
    named = [(storable(item.annotator), item.subject) for item in items]
    unique = dict(zip(named, items, strict=True))
    if not unique:
        return []
    rows = [
        (
            item.post_id,
            None if item.text is None else storable(item.text),
            subject,
            storable(item.label),
            item.predicted_label and storable(item.predicted_label),
            item.model_version and storable(item.model_version),
            annotator,
        )
        for (annotator, subject), item in sorted(unique.items(), key=lambda pair: pair[0])
    ]
    async with db.transaction() as connection:
        await keep_out_erasures(connection)
        changed = await connection.fetch(query("write_feedback"), *zip(*rows, strict=True), key_id, source)
        known = await connection.fetch(
            "SELECT f.id, f.subject, f.annotator FROM overtone.feedback f"
            " JOIN unnest($1::text[], $2::bytea[], $3::text[]) AS r (annotator, subject, label)"
            " USING (annotator, subject, label) WHERE f.key_id = $4",
            *([row[column] for row in rows] for column in (6, 2, 3)),
            key_id,
        )
    found = {(row["annotator"], row["subject"]): Written(row["id"], "unchanged") for row in known}
    for row in changed:
        state: State = "created" if row["is_new"] else "changed"
        found[row["annotator"], row["subject"]] = Written(row["id"], state)
    return [found.get(name) for name in named]


async def known_posts(db: Database, post_ids: Sequence[int]) -> set[int]:
    """Those of `post_ids` that feedback may be about: they are stored, and neither they nor their authors erased."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT p.post_id FROM overtone.posts p WHERE p.post_id = ANY($1)"
            " AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = p.post_id)"
            " AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = p.author_id)",
            list(post_ids),
        )
    return {row["post_id"] for row in rows}


async def to_label(db: Database, *, since: datetime, limit: int) -> list[ToLabel]:
    """Posts made since then that are worth labelling: up to `limit` of each reason, the most telling first."""
    async with db.acquire() as connection:
        rows = await connection.fetch(query("to_label"), datetime_to_snowflake(since), limit)
    return [ToLabel(**row) for row in rows]


async def newest_feedback(db: Database) -> int:
    """The id of the newest row; 0 for none."""
    async with db.acquire() as connection:
        return int(await connection.fetchval("SELECT coalesce(max(id), 0) FROM overtone.feedback"))


async def training_labels(db: Database, *, with_posts: bool, up_to: int) -> AsyncIterator[TrainingLabel]:
    """The labels up to feedback id `up_to`, in the order of their ids, page by page.

    Texts that people submitted; with `with_posts` those of stored posts too. What was erased, by post or by author, is
    never among them.
    """
    last = 0
    while True:
        async with db.acquire() as connection:
            rows = await connection.fetch(query("training_labels"), with_posts, last, _PAGE_ROWS, up_to)
        for row in rows:
            who = f"{row['key_id']}/{row['annotator']}" if row["key_id"] else ""
            yield TrainingLabel(row["id"], row["label"], row["text"], row["post_id"], row["author_id"], who)
        if len(rows) < _PAGE_ROWS:
            return
        last = rows[-1]["id"]
