"""Erasing posts and authors from every table, and reading what is stored about one author."""

import re
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import orjson

from overtone.db.database import Connection, Database
from overtone.db.partitions import detached
from overtone.db.queries import query
from overtone.db.tables import SCHEMA
from overtone.db.tombstones import keep_out_writers

BATCH_POSTS = 5_000
"""Posts erased in one transaction: what writers have to wait for, a fraction of a second."""

_EDITS_IDS = 3_600_000 << 22
"""Edits of a post are made within half an hour, the last of them at most an hour after the first version."""
_NUMBER = re.compile(rb"(?<!\d)\d{1,19}(?!\d)")
_PAGE_ROWS = 500


@dataclass(frozen=True, slots=True)
class Removed:
    """Rows, by table."""

    posts: int = 0
    predictions: int = 0
    feedback: int = 0
    dead_letters: int = 0

    def __add__(self, other: "Removed") -> "Removed":
        return Removed(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


async def erase_posts(db: Database, post_ids: Sequence[int], *, reason: str) -> Removed:
    """Remove posts with their predictions, feedback and dead letters, and leave tombstones, all or nothing.

    Posts that are not stored get their tombstone too. A repetition changes nothing.
    """
    async with db.transaction() as connection:
        await keep_out_writers(connection)
        row = await connection.fetchrow(query("erase_posts"), list(post_ids), reason)
        assert row is not None
        return Removed(**row) + await _erase_detached(connection, list(post_ids))


async def versions_of(db: Database, post_id: int, author_id: int | None = None) -> list[int]:
    """The stored versions of an edited post, of which `post_id` is one; at least `post_id` itself.

    `author_id` helps to find them where `post_id` itself is not stored.
    """
    async with db.acquire() as connection:
        author = author_id or await connection.fetchval(
            "SELECT author_id FROM overtone.posts WHERE post_id = $1", post_id
        )
        rows = await connection.fetch(
            "SELECT post_id, payload #> '{data,edit_history_tweet_ids}' AS history FROM overtone.posts"
            " WHERE author_id = $1 AND author_id <> 0 AND post_id BETWEEN $2 AND $3",
            author or 0,
            max(post_id - _EDITS_IDS, 0),
            min(post_id + _EDITS_IDS, 2**63 - 1),
        )
    chains = {row["post_id"]: _ids_in(row["history"]) for row in rows}
    # Every version lists all before it: those of one post share their first.
    firsts = {chain[0] for chain in chains.values() if post_id in chain}
    return sorted({post_id} | {one for one, chain in chains.items() if chain and chain[0] in firsts})


async def posts_of(db: Database, author_id: int, *, limit: int = BATCH_POSTS) -> list[int]:
    """The ids of up to `limit` stored posts of an author, those of detached partitions among them."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT post_id FROM overtone.posts WHERE author_id = $1 LIMIT $2", author_id, limit
        )
        for name in await detached(connection, "posts") if not rows else ():
            rows = rows or await connection.fetch(
                f"SELECT post_id FROM {SCHEMA}.{name} WHERE author_id = $1 LIMIT $2", author_id, limit
            )
    return sorted(row["post_id"] for row in rows)


async def count_of(db: Database, post_ids: Sequence[int]) -> Removed:
    """How much is stored about these posts."""
    async with db.acquire() as connection:
        numbers = [
            await connection.fetchval(
                f"SELECT count(*) FROM overtone.{one.name} WHERE post_id = ANY($1)", list(post_ids)
            )
            for one in fields(Removed)
        ]
    return Removed(*numbers)


async def erase_letters(db: Database, numbers: Collection[int]) -> int:
    """Remove dead letters whose raw bytes name one of `numbers`, ids of posts or authors; return how many.

    Lines that hold no post that could be read have no post id beside them: only their bytes tell whose they are.
    """
    wanted = {b"%d" % number for number in numbers}
    async with db.transaction() as connection:
        letters = connection.cursor("SELECT id, raw FROM overtone.dead_letters", prefetch=_PAGE_ROWS)
        doomed = [row["id"] async for row in letters if wanted.intersection(_NUMBER.findall(row["raw"]))]
        rows = await connection.fetch("DELETE FROM overtone.dead_letters WHERE id = ANY($1) RETURNING id", doomed)
    return len(rows)


async def scrub_places(db: Database, author_ids: Sequence[int], *, up_to_post_id: int = 2**63 - 1) -> int:
    """Take the places out of what is stored of these authors' posts, up to a post; return how many posts had one."""
    async with db.transaction() as connection:
        rows = await connection.fetch(
            "UPDATE overtone.posts SET payload = payload #- '{data,geo}' #- '{includes,places}'"
            " WHERE author_id = ANY($1) AND post_id <= $2"
            " AND (payload #> '{data,geo}' IS NOT NULL OR payload #> '{includes,places}' IS NOT NULL)"
            " RETURNING post_id",
            list(author_ids),
            up_to_post_id,
        )
    return len(rows)


async def scrub_posts(db: Database, post_ids: Sequence[int]) -> None:
    """Take the places out of what is stored of these posts."""
    async with db.transaction() as connection:
        await connection.execute(
            "UPDATE overtone.posts SET payload = payload #- '{data,geo}' #- '{includes,places}'"
            " WHERE post_id = ANY($1)",
            list(post_ids),
        )


async def everything_of(db: Database, author_id: int) -> AsyncIterator[dict[str, Any]]:
    """All that is stored about an author, one post with its predictions and feedback at a time, oldest first."""
    last = 0
    while True:
        async with db.acquire() as connection:
            rows = await connection.fetch(query("posts_of_author"), author_id, last, _PAGE_ROWS)
        for row in rows:
            yield {
                **{name: row[name] for name in ("post_id", "created_at", "stored_at", "text", "lang", "rule_tags")},
                **{name: orjson.loads(row[name]) for name in ("payload", "predictions", "feedback")},
            }
        if len(rows) < _PAGE_ROWS:
            return
        last = rows[-1]["post_id"]


async def _erase_detached(connection: Connection, post_ids: Sequence[int]) -> Removed:
    """The same in partitions that retention has detached and not yet dropped; no tally counts them."""
    counts = {"posts": 0, "predictions": 0}
    for table in counts:
        for name in await detached(connection, table):
            status = await connection.execute(f"DELETE FROM {SCHEMA}.{name} WHERE post_id = ANY($1)", post_ids)
            counts[table] += int(status.rpartition(" ")[2])
    return Removed(**counts)


def _ids_in(history: str | None) -> list[int]:
    loaded = orjson.loads(history) if history else None
    return [int(one) for one in loaded if str(one).isdigit()] if isinstance(loaded, list) else []
