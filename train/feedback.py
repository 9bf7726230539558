"""Feedback as training rows: what people said of texts, and of posts where the operator may train on them."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from overtone.db.database import Database
from overtone.db.embedded import url_of
from overtone.db.feedback import newest_feedback, training_labels
from overtone.db.tombstones import erased_among
from overtone.erasure_files import erase_from_folder
from overtone.errors import DataError
from overtone.settings import Settings
from train.sources import Finding, Row, Rows, row_problem

SOURCE = "feedback"

T = TypeVar("T")


def read_feedback(settings: Settings, names: Sequence[str]) -> tuple[Rows, tuple[Finding, ...]]:
    """The feedback that may be learned from, its ids as lines, and what of it cannot be used.

    Posts are among it only with `allow_training_on_x_content`. What was erased, by post or by author, never is.

    Raises:
        ConfigurationError: there is no database to read.
        DataError: it holds no such row.
        DatabaseUnavailableError: the database cannot be reached.
    """
    rows = _with_database(settings, lambda db: _rows(db, with_posts=settings.allow_training_on_x_content))
    flaws: dict[str, list[int]] = {}
    kept = []
    for row in rows:
        if problem := row_problem({"label": row.label, "text": row.text}, names):
            flaws.setdefault(problem, []).append(row.line)
        else:
            kept.append(row)
    if not kept:
        hint = "" if settings.allow_training_on_x_content else " on texts; that on posts is not trained on"
        raise DataError(f"there is no feedback to train on{hint}")
    digest = hashlib.sha256()
    for row in kept:
        digest.update(f"{row.line}\t{row.label}\t{row.annotator}\t{row.text}\n".encode())
    findings = tuple(Finding(SOURCE, reason, tuple(lines)) for reason, lines in flaws.items())
    return Rows(SOURCE, tuple(kept), digest.hexdigest()), findings


def require_not_erased(settings: Settings, rows: Sequence[Row], snapshot: Path) -> None:
    """Take out of `snapshot`, made of `rows`, what was erased since they were read: before it, no erasure saw it.

    Raises:
        DataError: there was such a row.
    """
    posts = {row.post_id: row.author_id or 0 for row in rows if row.post_id is not None}
    if not posts:
        return
    gone = _with_database(settings, lambda db: erased_among(db, list(posts), list(posts.values())))
    if gone:
        erase_from_folder(snapshot, gone)
        raise DataError(f"{len(gone)} posts were erased while the rows were read; give the command again")


async def _rows(db: Database, *, with_posts: bool) -> list[Row]:
    found = training_labels(db, with_posts=with_posts, up_to=await newest_feedback(db))
    return [
        Row(SOURCE, one.feedback_id, one.label, one.text, one.post_id, one.author_id, one.annotator)
        async for one in found
    ]


def _with_database(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    url = url_of(settings)

    async def opened() -> T:
        db = await Database.open(url, max_size=1, application_name="overtone-train")
        try:
            return await work(db)
        finally:
            await db.close()

    return asyncio.run(opened())
