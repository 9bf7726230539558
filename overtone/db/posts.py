"""Writing posts exactly once, and the ledgers beside them: cursor and dead letters."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any

import asyncpg
import orjson

from overtone.db.database import Connection, Database
from overtone.db.partitions import ensure_months, plausible_ids
from overtone.db.payload import is_int64, json_text, raw_of
from overtone.db.queries import query
from overtone.db.tombstones import keep_out_erasures
from overtone.errors import FencedError
from overtone.logging import get_logger
from overtone.schema import Post, datetime_to_snowflake
from overtone.text import storable

_TAG_SEPARATOR = "\x1f"
_POISON = (asyncpg.DataError, asyncpg.ProgramLimitExceededError, ValueError)

_log = get_logger()

_Row = tuple[int, int, str, datetime, str | None, str, str]


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a stream has been stored."""

    stream: str
    post_id: int
    """The newest post stored from it; 0 for none."""
    epoch: int
    """Fencing number of its last leader."""
    moved_at: datetime


@dataclass(slots=True)
class _Batch:
    """Rows fit to be stored, in the order of their ids, and posts that are not, with the reason."""

    rows: list[_Row] = field(default_factory=list)
    rejected: list[tuple[Post, str]] = field(default_factory=list)
    by_id: dict[int, Post] = field(default_factory=dict)


async def write_posts(db: Database, posts: Sequence[Post], *, stream: str, epoch: int | None = None) -> int:
    """Store `posts` and return how many were new.

    One transaction stores them, moves the cursor of `stream` to the newest of them and adds to the tallies; it may
    be repeated with the same posts any number of times. Posts that were erased stay erased. A post that cannot be
    stored, for an impossible id or a value PostgreSQL refuses, becomes a dead letter and holds up no other.

    Raises:
        FencedError: `epoch` is given and a later leader has taken over `stream`; nothing was stored.
        DatabaseUnavailableError: nothing was stored, or the answer was lost; repeat the call.
    """
    if not posts:
        return 0
    batch = _prepare(posts, datetime.now(UTC))
    await ensure_months(db, [row[0] for row in batch.rows])
    try:
        return await _write(db, batch, stream, epoch)
    except asyncpg.CheckViolationError:
        # A partition that this process has seen was detached since.
        db.known_months.clear()
        await ensure_months(db, [row[0] for row in batch.rows])
        return await _write(db, batch, stream, epoch)


async def unclassified(
    db: Database, model_version: str | None, *, since: datetime | None = None, after_post_id: int = 0, limit: int = 1000
) -> list[tuple[int, str]]:
    """Posts (id, text) without a prediction by `model_version`, or by any model if it is None, oldest first.

    `since` bounds the time the post was made. To walk through all of them, pass the last id of one answer as
    `after_post_id` of the next call.
    """
    first = max(after_post_id, datetime_to_snowflake(since) - 1 if since else 0)
    async with db.acquire() as connection:
        rows = await connection.fetch(query("unclassified"), first, model_version, limit)
    return [(row["post_id"], row["text"]) for row in rows]


async def cursor(db: Database, stream: str) -> Cursor | None:
    """How far `stream` has been stored; None before its first post."""
    async with db.acquire() as connection:
        row = await connection.fetchrow(
            "SELECT stream, post_id, epoch, moved_at FROM overtone.stream_cursor WHERE stream = $1", stream
        )
    return Cursor(**row) if row else None


async def touch_cursor(db: Database, stream: str) -> None:
    """Note that `stream`, which brings no posts, has been read up to now."""
    async with db.transaction() as connection:
        await connection.execute(
            "INSERT INTO overtone.stream_cursor (stream, post_id) VALUES ($1, 0)"
            " ON CONFLICT (stream) DO UPDATE SET moved_at = now()",
            stream,
        )


async def stored_ids(db: Database, *, after_post_id: int = 0, limit: int) -> list[int]:
    """Ids of stored posts above `after_post_id`, ascending."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT post_id FROM overtone.posts WHERE post_id > $1 ORDER BY post_id LIMIT $2", after_post_id, limit
        )
    return [row["post_id"] for row in rows]


async def newest_posts(db: Database, limit: int) -> list[tuple[int, str, dict[str, Any]]]:
    """Id, text and payload of the stored posts with the highest ids, newest first."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT post_id, text, payload::text AS payload FROM overtone.posts ORDER BY post_id DESC LIMIT $1", limit
        )
    return [(row["post_id"], row["text"], orjson.loads(row["payload"])) for row in rows]


async def are_stored(db: Database, post_ids: Sequence[int]) -> bool:
    """Whether each of `post_ids`, which are different ones, is a stored post."""
    async with db.acquire() as connection:
        found = await connection.fetchval("SELECT count(*) FROM overtone.posts WHERE post_id = ANY($1)", list(post_ids))
    return bool(found == len(post_ids))


async def claim_stream(db: Database, stream: str) -> int:
    """Become the leader of `stream`: the epoch to write with from now on. Writers with an older one are refused."""
    async with db.transaction() as connection:
        return int(
            await connection.fetchval(
                "INSERT INTO overtone.stream_cursor AS c (stream, post_id, epoch) VALUES ($1, 0, 1)"
                " ON CONFLICT (stream) DO UPDATE SET epoch = c.epoch + 1 RETURNING epoch",
                stream,
            )
        )


async def write_dead_letter(db: Database, raw: bytes, reason: str, *, post_id: int | None = None) -> None:
    """Put `raw` aside; the same bytes again only count an attempt. Give `post_id` if known: erasure looks for it."""
    async with db.transaction() as connection:
        await _write_dead_letters(connection, [(raw, reason, post_id)])


def _prepare(posts: Sequence[Post], now: datetime) -> _Batch:
    batch, plausible = _Batch(), plausible_ids(now)
    for post in posts:
        reason = _impossible(post, plausible)
        if reason is None:
            try:
                batch.rows.append(_row(post))
                batch.by_id[post.post_id] = post
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            batch.rejected.append((post, reason))
    batch.rows.sort(key=itemgetter(0))
    return batch


def _impossible(post: Post, plausible: range) -> str | None:
    if post.post_id not in plausible:
        return "the post id is not positive or lies in the future"
    if not is_int64(post.author_id):
        return "the author id does not fit 64 bits"
    return None


def _row(post: Post) -> _Row:
    lang = None if post.lang is None else storable(post.lang)
    payload, tags = json_text(post.payload), _joined(post.rule_tags)
    return post.post_id, post.author_id, storable(post.text), post.created_at, lang, tags, payload


@lru_cache(4096)  # a stream has few rules and many posts
def _joined(tags: tuple[str, ...]) -> str:
    return _TAG_SEPARATOR.join(storable(tag).replace(_TAG_SEPARATOR, " ") for tag in tags)


async def _write(db: Database, batch: _Batch, stream: str, epoch: int | None) -> int:
    try:
        return await _transact(db, batch, stream, epoch, careful=False)
    except _POISON:
        return await _transact(db, batch, stream, epoch, careful=True)


async def _transact(db: Database, batch: _Batch, stream: str, epoch: int | None, *, careful: bool) -> int:
    async with db.transaction() as connection:
        await keep_out_erasures(connection)
        rejected = list(batch.rejected)
        if careful:
            stored = await _insert_around_poison(connection, batch, batch.rows, stream, rejected)
        else:
            stored = await _insert(connection, batch.rows, stream)
        if stored:
            await connection.execute(query("add_tallies"), "posts", [""], [stored])
        if rejected:
            letters = [(raw_of(post), reason, _known_id(post)) for post, reason in rejected]
            await _write_dead_letters(connection, letters)
            _log.warning("posts.rejected", posts=len(rejected), reasons=sorted({reason for _, reason in rejected}))
        newest = batch.rows[-1][0] if batch.rows else 0
        if await connection.fetchval(query("move_cursor"), stream, newest, epoch) is None:
            raise FencedError(f"Another leader has taken over the stream {stream!r}.", stream=stream, epoch=epoch)
    return stored


async def _insert(connection: Connection, rows: Sequence[_Row], stream: str) -> int:
    columns = list(zip(*rows, strict=True)) or [()] * 7
    return int(await connection.fetchval(query("write_posts"), *columns, stream))


async def _insert_around_poison(
    connection: Connection, batch: _Batch, rows: Sequence[_Row], stream: str, rejected: list[tuple[Post, str]]
) -> int:
    try:
        async with connection.transaction():
            return await _insert(connection, rows, stream)
    except _POISON as error:
        if len(rows) == 1:
            rejected.append((batch.by_id[rows[0][0]], f"PostgreSQL refuses a value: {type(error).__name__}"))
            return 0
    middle = len(rows) // 2
    return await _insert_around_poison(
        connection, batch, rows[:middle], stream, rejected
    ) + await _insert_around_poison(connection, batch, rows[middle:], stream, rejected)


def _known_id(post: Post) -> int | None:
    return post.post_id if is_int64(post.post_id) else None


async def _write_dead_letters(connection: Connection, letters: Sequence[tuple[bytes, str, int | None]]) -> None:
    raws, reasons, ids = zip(*letters, strict=True)
    await connection.execute(query("write_dead_letters"), raws, [storable(reason) for reason in reasons], ids)
