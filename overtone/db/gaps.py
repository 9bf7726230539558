"""The ledger of gaps: when a stream may have missed posts, and how each of these spans ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from overtone.db.audit import record_audit
from overtone.db.database import Connection, Database
from overtone.errors import FencedError

GapState = Literal["open", "closed", "repaired", "partly_repaired", "accepted"]
"""`open`: the stream is not back; `closed`: it is, and repair is due. The other three are endings."""

Ending = Literal["repaired", "partly_repaired", "accepted"]

Means = Literal["backfill", "replay", "search"]
"""How a gap is filled: X sends what was missed with the new connection, over a connection of its own, or on request."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A span in which a stream may have missed posts."""

    gap_id: int
    stream: str
    cause: str
    started_at: datetime
    ended_at: datetime | None
    after_post_id: int | None
    before_post_id: int | None
    state: GapState
    repaired_posts: int
    means: Means | None = None
    reason: str | None = None
    """Why not all of it was repaired."""


async def open_gap(
    db: Database,
    stream: str,
    cause: str,
    *,
    started_at: datetime | None = None,
    after_post_id: int | None = None,
    epoch: int | None = None,
) -> int:
    """Write down that `stream` may be missing posts from `started_at` (now) on; return the gap's id.

    Raises:
        FencedError: `epoch` is given and a later leader has taken over `stream`; nothing was written.
    """
    async with db.transaction() as connection:
        await _require_leader(connection, stream, epoch)
        return int(
            await connection.fetchval(
                "INSERT INTO overtone.stream_gaps (stream, cause, started_at, after_post_id)"
                " VALUES ($1, $2, coalesce($3, now()), $4) RETURNING id",
                stream,
                cause,
                started_at,
                after_post_id,
            )
        )


async def close_gap(db: Database, gap_id: int, *, before_post_id: int | None = None, epoch: int | None = None) -> None:
    """Write down that the stream is back: the gap reaches to `before_post_id` and waits for repair.

    Raises:
        FencedError: `epoch` is given and a later leader has taken over the stream; nothing was written.
    """
    async with db.transaction() as connection:
        await _require_leader_of(connection, gap_id, epoch)
        await connection.execute(
            "UPDATE overtone.stream_gaps SET state = 'closed', ended_at = coalesce(ended_at, now()),"
            " before_post_id = coalesce($2, before_post_id) WHERE id = $1 AND state IN ('open', 'closed')",
            gap_id,
            before_post_id,
        )


async def settle_gap(
    db: Database,
    gap_id: int,
    ending: Ending,
    *,
    repaired_posts: int = 0,
    means: Means | None = None,
    reason: str | None = None,
    epoch: int | None = None,
) -> None:
    """Write down how the gap ended. One that a person has accepted meanwhile stays accepted.

    Raises:
        FencedError: `epoch` is given and a later leader has taken over the stream; nothing was written.
    """
    async with db.transaction() as connection:
        await _require_leader_of(connection, gap_id, epoch)
        await connection.execute(
            "UPDATE overtone.stream_gaps SET state = CASE state WHEN 'accepted' THEN state ELSE $2 END,"
            " ended_at = coalesce(ended_at, now()), repaired_posts = repaired_posts + $3,"
            " means = coalesce($4, means), reason = coalesce(reason, $5) WHERE id = $1",
            gap_id,
            ending,
            repaired_posts,
            means,
            reason,
        )


async def accept_gaps(db: Database, gap_ids: Sequence[int], reason: str, *, actor: str) -> list[int]:
    """Take gaps that are over as they are, for `reason`, and return which of `gap_ids` that concerned.

    Those that are repaired, accepted already or still open are left alone.
    """
    async with db.transaction() as connection:
        rows = await connection.fetch(
            "UPDATE overtone.stream_gaps SET state = 'accepted', reason = $2"
            " WHERE id = ANY($1) AND state IN ('closed', 'partly_repaired') RETURNING id",
            list(gap_ids),
            reason,
        )
        accepted = sorted(row["id"] for row in rows)
        for gap_id in accepted:
            await record_audit(connection, actor, "gap.accepted", str(gap_id), {"reason": reason})
    return accepted


async def list_gaps(db: Database, stream: str | None = None, *, limit: int = 100) -> list[Gap]:
    """The newest gaps of `stream`, or of all streams."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT id AS gap_id, stream, cause, started_at, ended_at, after_post_id, before_post_id, state,"
            " repaired_posts, means, reason FROM overtone.stream_gaps WHERE $1::text IS NULL OR stream = $1"
            " ORDER BY started_at DESC, id DESC LIMIT $2",
            stream,
            limit,
        )
    return [Gap(**row) for row in rows]


async def posts_between(db: Database, stream: str, after_post_id: int, before_post_id: int) -> int:
    """How many stored posts of `stream` have an id between the two."""
    async with db.acquire() as connection:
        return int(
            await connection.fetchval(
                "SELECT count(*) FROM overtone.posts WHERE post_id > $2 AND post_id < $3 AND stream = $1",
                stream,
                after_post_id,
                before_post_id,
            )
        )


async def _require_leader_of(connection: Connection, gap_id: int, epoch: int | None) -> None:
    stream = await connection.fetchval("SELECT stream FROM overtone.stream_gaps WHERE id = $1", gap_id)
    await _require_leader(connection, stream, epoch)


async def _require_leader(connection: Connection, stream: str, epoch: int | None) -> None:
    """Keep later leaders out until the transaction ends, or raise FencedError if there is one."""
    newest = await connection.fetchval("SELECT epoch FROM overtone.stream_cursor WHERE stream = $1 FOR SHARE", stream)
    if epoch is not None and newest is not None and newest > epoch:
        raise FencedError(f"Another leader has taken over the stream {stream!r}.", stream=stream, epoch=epoch)
