"""Tombstones: what was erased and must not come back, whatever replays, backfills or late predictions bring.

Posts have them in `deleted_posts`, authors in `deleted_authors`; the statement that stores posts looks at both, in its
own transaction, under a lock that erasures hold alone. They hold ids, a reason and a time, and nothing else.
"""

from collections.abc import Sequence

from overtone.db.database import Connection, Database

ERASURE_LOCK = 0x6F76_7274_6572_6173
"""Advisory lock: shared by every transaction that writes posts or predictions, exclusive for one that erases."""


async def keep_out_erasures(connection: Connection) -> None:
    """Let no erasure happen until the transaction of `connection` ends. Any number of writers may do so at once."""
    await connection.execute("SELECT pg_advisory_xact_lock_shared($1)", ERASURE_LOCK)


async def keep_out_writers(connection: Connection) -> None:
    """Let nobody write posts or predictions until the transaction of `connection` ends."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", ERASURE_LOCK)


async def bury_authors(db: Database, author_ids: Sequence[int], *, reason: str) -> None:
    """Leave tombstones: when this returns, no post of these authors is stored any more. Author 0 is nobody.

    What is stored already stays; `overtone.db.erasure` removes it.
    """
    known = sorted({author_id for author_id in author_ids if author_id})
    if not known:
        return
    async with db.transaction() as connection:
        await keep_out_writers(connection)
        await connection.execute(
            "INSERT INTO overtone.deleted_authors (author_id, reason) SELECT a, $2 FROM unnest($1::bigint[]) a"
            " ON CONFLICT DO NOTHING",
            known,
            reason,
        )


async def admit_authors(db: Database, author_ids: Sequence[int], *, reason: str) -> int:
    """Take back the tombstones of authors that were left for `reason`, and for no other; return how many.

    Their posts are stored again from now on. The tombstones of posts erased in between stay.
    """
    async with db.transaction() as connection:
        rows = await connection.fetch(
            "DELETE FROM overtone.deleted_authors WHERE author_id = ANY($1) AND reason = $2 RETURNING author_id",
            list(author_ids),
            reason,
        )
    return len(rows)


async def admit_posts(db: Database, post_ids: Sequence[int], *, reason: str) -> int:
    """Take back the tombstones of posts that were left for `reason`, and for no other; return how many."""
    async with db.transaction() as connection:
        rows = await connection.fetch(
            "DELETE FROM overtone.deleted_posts WHERE post_id = ANY($1) AND reason = $2 RETURNING post_id",
            list(post_ids),
            reason,
        )
    return len(rows)


async def erased_among(db: Database, post_ids: Sequence[int], author_ids: Sequence[int] = ()) -> set[int]:
    """Those of `post_ids` that were erased; with the author of each in `author_ids`, those of erased authors too."""
    authors = list(author_ids) or [0] * len(post_ids)
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT p.post_id FROM unnest($1::bigint[], $2::bigint[]) AS p (post_id, author_id)"
            " WHERE EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = p.post_id)"
            " OR EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = p.author_id)",
            list(post_ids),
            authors,
        )
    return {row["post_id"] for row in rows}
