"""Dead letters as people look through them: what was put aside, why, and how often."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from overtone.db.audit import record_audit
from overtone.db.database import Database


@dataclass(frozen=True, slots=True)
class Letter:
    """One payload that was put aside."""

    letter_id: int
    reason: str
    post_id: int | None
    attempts: int
    first_seen_at: datetime
    last_seen_at: datetime
    raw: bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """Which letters: those that fit everything that is given."""

    ids: tuple[int, ...] | None = None
    reason: str | None = None
    """How their reason begins."""
    before: datetime | None = None
    """They were last seen before this."""


_FITS = (
    " WHERE ($1::bigint[] IS NULL OR id = ANY($1)) AND ($2::text IS NULL OR starts_with(reason, $2))"
    " AND ($3::timestamptz IS NULL OR last_seen_at < $3)"
)


async def chosen_letters(db: Database, choice: Choice, *, limit: int, above_id: int = 0) -> list[Letter]:
    """The letters of `choice` with ids above `above_id`, in the order of their ids."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT id AS letter_id, reason, post_id, attempts, first_seen_at, last_seen_at, raw"
            f" FROM overtone.dead_letters{_FITS} AND id > $4 ORDER BY id LIMIT $5",
            choice.ids,
            choice.reason,
            choice.before,
            above_id,
            limit,
        )
    return [Letter(**row) for row in rows]


async def newest_letters(db: Database, choice: Choice, *, limit: int) -> list[Letter]:
    """The letters of `choice` that were seen last, the newest first."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT id AS letter_id, reason, post_id, attempts, first_seen_at, last_seen_at, raw"
            f" FROM overtone.dead_letters{_FITS} ORDER BY last_seen_at DESC, id DESC LIMIT $4",
            choice.ids,
            choice.reason,
            choice.before,
            limit,
        )
    return [Letter(**row) for row in rows]


async def count_letters(db: Database, choice: Choice) -> dict[str, int]:
    """How many letters of `choice` there are, by reason."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            f"SELECT reason, count(*) AS letters FROM overtone.dead_letters{_FITS} GROUP BY reason ORDER BY reason",
            choice.ids,
            choice.reason,
            choice.before,
        )
    return {row["reason"]: row["letters"] for row in rows}


async def drop_letters(db: Database, choice: Choice, *, actor: str) -> int:
    """Remove the letters of `choice` for good, write that into the audit log, and return how many they were."""
    async with db.transaction() as connection:
        rows = await connection.fetch(
            f"DELETE FROM overtone.dead_letters{_FITS} RETURNING id", choice.ids, choice.reason, choice.before
        )
        if rows:
            await record_audit(connection, actor, "dead_letters.dropped", None, {"letters": len(rows)})
    return len(rows)


async def settle_letters(db: Database, letter_ids: Sequence[int]) -> None:
    """Remove letters that did their duty: what they held is stored, or is not wanted any more."""
    async with db.transaction() as connection:
        await connection.execute("DELETE FROM overtone.dead_letters WHERE id = ANY($1)", list(letter_ids))
