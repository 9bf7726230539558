"""Jobs: what was asked for, how far it is, and which part of it is whose.

A job is done in chunks. A chunk is open, held by an attempt, or done. Who holds one says so every few seconds; when it
no longer does, the chunk is given to another. Done is done once: the transaction that finishes a chunk counts it, so
that a task which is delivered twice, or a consumer that was only slow, changes nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import orjson

from overtone.db.database import Connection, Database
from overtone.db.queries import query
from overtone.db.tombstones import keep_out_erasures
from overtone.errors import DatabaseUnavailableError

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
UNDER_WAY = ("queued", "running")
MAX_PROBLEMS = 20
"""How many lines that failed a job names."""

_DISPATCH_LOCK = 0x6F76_7274_6A6F_6273
_COLUMNS = (
    "job_id, kind, state, parameters, done, failed, total, result, error, key_id, created_at, started_at, finished_at"
)
_BY_REQUEST = f"SELECT {_COLUMNS} FROM overtone.jobs WHERE key_id = $1 AND request_key = $2"


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be stored."""

    job_id: UUID
    kind: str
    key_id: str
    parameters: Mapping[str, Any]
    chunks: Sequence[int]
    """How many items each holds."""
    problems: Sequence[Mapping[str, Any]] = ()
    """Of the first lines that are wrong: line, field and problem."""
    request_key: str | None = None
    """With `key_id` it names the request: the same again makes no other job."""
    is_planned: bool = True
    """Whether these are all its chunks; if not, the first one finds out about the others (`overtone.db.job_spans`)."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is stored."""

    job_id: UUID
    kind: str
    state: State
    parameters: dict[str, Any]
    done: int
    failed: int
    total: int | None
    """None until it is planned."""
    problems: list[dict[str, Any]]
    outcome: dict[str, Any] | None
    """Of a job whose result is no file."""
    error: str | None
    key_id: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended."""
        return self.state in UNDER_WAY


@dataclass(frozen=True, slots=True)
class ChunkName:
    """Which chunk of which job."""

    job_id: UUID
    number: int


@dataclass(frozen=True, slots=True)
class Due:
    """A chunk that somebody is to do."""

    name: ChunkName
    kind: str
    """Of the job."""


@dataclass(slots=True)
class Holders:
    """The attempts of one process, which say together that they live."""

    hold_s: float = 30.0
    """After so long without a word of its holder a chunk is given to another."""
    _live: set[UUID] = field(default_factory=set)

    @contextmanager
    def holding(self, holder: UUID) -> Iterator[None]:
        """Count `holder` among the living for the block."""
        self._live.add(holder)
        try:
            yield
        finally:
            self._live.discard(holder)

    async def speak(self, db: Database) -> None:
        """Say that they live; to be called a few times within `hold_s`."""
        if self._live:
            await keep_holding(db, list(self._live), self.hold_s)


@dataclass(frozen=True, slots=True)
class Claim:
    """A chunk that is ours to do."""

    items: int
    attempts: int
    """This one counted."""
    kind: str
    parameters: dict[str, Any]
    first_post_id: int | None = None
    """Of the span of stored posts that the chunk is, if it is one; both ends are included."""
    last_post_id: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """What a chunk came to."""

    items: int
    failed: int
    problems: Sequence[Mapping[str, Any]]
    ids: Collection[int] = ()
    """Ids of posts and authors among its lines."""


async def create_job(db: Database, job: NewJob) -> tuple[Job, bool]:
    """Store `job` and its chunks; the job that its request made before, and False, if there is one.

    Raises:
        DatabaseUnavailableError: nothing was stored, or the answer was lost; repeat the call.
    """
    async with db.transaction() as connection:
        row = await connection.fetchrow(
            "INSERT INTO overtone.jobs (job_id, kind, key_id, parameters, total, result, request_key)"
            f" VALUES ($1, $2, $3, $4::jsonb, $5, $6::jsonb, $7) ON CONFLICT DO NOTHING RETURNING {_COLUMNS}",
            job.job_id,
            job.kind,
            job.key_id,
            orjson.dumps(dict(job.parameters)).decode(),
            sum(job.chunks) if job.is_planned else None,
            orjson.dumps({"problems": list(job.problems)[:MAX_PROBLEMS]}).decode(),
            job.request_key,
        )
        if row is None:
            known = await connection.fetchrow(_BY_REQUEST, job.key_id, job.request_key)
            if known is None:
                raise DatabaseUnavailableError("The job that this request made before was deleted meanwhile.")
            return _job(known), False
        await connection.execute(
            "INSERT INTO overtone.job_chunks (job_id, number, items)"
            " SELECT $1, number, items FROM unnest($2::int[]) WITH ORDINALITY AS c (items, number)",
            job.job_id,
            list(job.chunks),
        )
    return _job(row), True


async def find_job(db: Database, job_id: UUID) -> Job | None:
    """The job with that id."""
    async with db.acquire() as connection:
        row = await connection.fetchrow(f"SELECT {_COLUMNS} FROM overtone.jobs WHERE job_id = $1", job_id)
    return _job(row) if row else None


async def find_by_request(db: Database, key_id: str, request_key: str) -> Job | None:
    """The job that this request made."""
    async with db.acquire() as connection:
        row = await connection.fetchrow(_BY_REQUEST, key_id, request_key)
    return _job(row) if row else None


async def list_jobs(db: Database, *, key_id: str | None, limit: int) -> list[Job]:
    """The newest jobs, newest first; with `key_id` only those of that account."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            f"SELECT {_COLUMNS} FROM overtone.jobs WHERE $1::text IS NULL OR key_id = $1"
            " ORDER BY created_at DESC, job_id LIMIT $2",
            key_id,
            limit,
        )
    return [_job(row) for row in rows]


async def open_jobs(db: Database, key_id: str) -> int:
    """How many jobs of that account are under way."""
    async with db.acquire() as connection:
        return int(
            await connection.fetchval(
                "SELECT count(*) FROM overtone.jobs WHERE state = ANY($1) AND key_id = $2", list(UNDER_WAY), key_id
            )
        )


async def end_job(db: Database, job_id: UUID, state: Literal["cancelled", "failed"], error: str | None = None) -> bool:
    """End a job that is under way; False if it has ended, or never was. Chunks that are being done are not counted."""
    async with db.acquire() as connection:
        status = await connection.execute(
            "UPDATE overtone.jobs SET state = $2, error = $3, finished_at = now()"
            " WHERE job_id = $1 AND state = ANY($4)",
            job_id,
            state,
            error,
            list(UNDER_WAY),
        )
    return bool(status == "UPDATE 1")


async def resume_job(db: Database, job_id: UUID) -> bool:
    """Go on with a job that has failed, where it stopped; False if it has not failed."""
    async with db.transaction() as connection:
        status = await connection.execute(
            "UPDATE overtone.jobs SET state = 'running', error = NULL, finished_at = NULL"
            " WHERE job_id = $1 AND state = 'failed'",
            job_id,
        )
        await connection.execute(
            "UPDATE overtone.job_chunks SET queued_at = NULL"
            " WHERE job_id = $1 AND done_at IS NULL AND held_until IS NULL",
            job_id,
        )
    return bool(status == "UPDATE 1")


async def delete_job(db: Database, job_id: UUID) -> None:
    """Forget a job, whatever its state."""
    async with db.acquire() as connection:
        await connection.execute("DELETE FROM overtone.jobs WHERE job_id = $1", job_id)


async def known_jobs(db: Database, job_ids: Collection[UUID]) -> dict[UUID, State]:
    """The states of those of `job_ids` that there are."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT job_id, state FROM overtone.jobs WHERE job_id = ANY($1::uuid[])", list(job_ids)
        )
    return {row["job_id"]: row["state"] for row in rows}


async def delete_old_jobs(db: Database, days: int) -> list[UUID]:
    """Forget the jobs that ended more than so many days ago; return which."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "DELETE FROM overtone.jobs WHERE finished_at < now() - make_interval(days => $1) RETURNING job_id", days
        )
    return [row["job_id"] for row in rows]


async def due_chunks(db: Database, *, window: int, lost_after_s: float) -> list[Due]:
    """Note as queued, and return, what the broker is to be given now: see `due_chunks.sql`.

    At most `window` chunks of a job wait at a time, so that a small job is not behind all of a large one. Of two
    callers at once one gets everything.
    """
    async with db.transaction() as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _DISPATCH_LOCK):
            return []
        rows = await connection.fetch(query("due_chunks"), window, lost_after_s)
    due = (Due(ChunkName(row["job_id"], row["number"]), row["kind"]) for row in rows)
    return sorted(due, key=lambda one: one.name.number)


async def unqueue_chunks(db: Database, names: Sequence[ChunkName]) -> None:
    """Take back that `names` were queued: the broker did not take them."""
    async with db.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.job_chunks c SET queued_at = NULL FROM unnest($1::uuid[], $2::int[]) AS r (job_id, number)"
            " WHERE c.job_id = r.job_id AND c.number = r.number AND c.holder IS NULL",
            [name.job_id for name in names],
            [name.number for name in names],
        )


async def claim_chunk(db: Database, name: ChunkName, holder: UUID, hold_s: float) -> Claim | None:
    """Hold the chunk for `hold_s` seconds; None if it is done or held by another, or the job has ended."""
    async with db.transaction() as connection:
        # The job before the chunk, as `finish_chunk` does it: the other way round the two could wait for each other.
        await connection.execute(
            "UPDATE overtone.jobs SET state = 'running', started_at = coalesce(started_at, now())"
            " WHERE job_id = $1 AND state = 'queued'",
            name.job_id,
        )
        row = await connection.fetchrow(query("claim_chunk"), name.job_id, name.number, holder, hold_s)
    return Claim(**{**row, "parameters": orjson.loads(row["parameters"])}) if row else None


async def keep_holding(db: Database, holders: Sequence[UUID], hold_s: float) -> None:
    """Say that `holders` live."""
    async with db.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.job_chunks SET held_until = now() + make_interval(secs => $2)"
            " WHERE holder = ANY($1::uuid[]) AND done_at IS NULL",
            list(holders),
            hold_s,
        )


async def release_chunk(db: Database, name: ChunkName, holder: UUID, *, retry_within_s: float) -> None:
    """Let go of a chunk that failed, which the broker will deliver again within so many seconds."""
    async with db.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.job_chunks SET holder = NULL, held_until = NULL,"
            " queued_at = now() + make_interval(secs => $4)"
            " WHERE job_id = $1 AND number = $2 AND holder = $3 AND done_at IS NULL",
            name.job_id,
            name.number,
            holder,
            retry_within_s,
        )


async def finish_chunk(
    db: Database, name: ChunkName, done: Finished, keep: Callable[[Collection[int]], None]
) -> State | None:
    """Have `keep` write the result and count the chunk as done; the job's state then, or None if it was not needed.

    `keep` is given those of the ids that were erased. No erasure happens between that and the commit: one that comes
    earlier is seen here, one that comes later finds the file.

    Raises:
        DatabaseUnavailableError: the chunk is not counted, or the answer was lost; do it again.
    """
    async with finishing(db, name) as connection:
        if connection is None:
            return None
        await asyncio.to_thread(keep, await _erased(connection, done.ids))
        return await count_chunk(connection, name, done)


@asynccontextmanager
async def finishing(db: Database, name: ChunkName) -> "AsyncIterator[Connection | None]":
    """A transaction that notes that the chunk is done; None if that was noted before, or its job has ended.

    No erasure happens until it ends.

    Raises:
        DatabaseUnavailableError: nothing is noted, or the answer was lost; do it again.
    """
    async with db.transaction() as connection:
        await keep_out_erasures(connection)
        state = await connection.fetchval("SELECT state FROM overtone.jobs WHERE job_id = $1 FOR UPDATE", name.job_id)
        is_ours = state in UNDER_WAY and await _close_chunk(connection, name)
        yield connection if is_ours else None


async def count_chunk(connection: Connection, name: ChunkName, done: Finished) -> State:
    """Count a chunk of a job that is planned, in the transaction of `finishing`; the job's state then."""
    problems = orjson.dumps(list(done.problems)[:MAX_PROBLEMS]).decode()
    counted: State = await connection.fetchval(
        query("count_chunk"), name.job_id, done.items, done.failed, problems, MAX_PROBLEMS
    )
    return counted


async def finish_chore(db: Database, name: ChunkName, outcome: Mapping[str, Any]) -> bool:
    """Note that a job of one chunk is done, and what came of it; False if that was noted before, or it was ended.

    What it was asked to do is forgotten: an erasure must leave nothing that the receipt does not need.
    """
    async with db.transaction() as connection:
        status = await connection.execute(
            "UPDATE overtone.jobs SET state = 'succeeded', done = total, finished_at = now(), parameters = '{}',"
            " result = jsonb_build_object('outcome', $2::jsonb) WHERE job_id = $1 AND state = ANY($3)",
            name.job_id,
            orjson.dumps(dict(outcome)).decode(),
            list(UNDER_WAY),
        )
        await _close_chunk(connection, name)
    return bool(status == "UPDATE 1")


async def _close_chunk(connection: Connection, name: ChunkName) -> bool:
    """Note that the chunk is done; False if it was before."""
    status = await connection.execute(
        "UPDATE overtone.job_chunks SET done_at = now(), holder = NULL, held_until = NULL"
        " WHERE job_id = $1 AND number = $2 AND done_at IS NULL",
        name.job_id,
        name.number,
    )
    return bool(status == "UPDATE 1")


async def _erased(connection: Connection, ids: Collection[int]) -> set[int]:
    wanted = [one for one in ids if 0 < one < 2**63]
    if not wanted:
        return set()
    rows = await connection.fetch(
        "SELECT post_id AS id FROM overtone.deleted_posts WHERE post_id = ANY($1::bigint[])"
        " UNION SELECT author_id FROM overtone.deleted_authors WHERE author_id = ANY($1::bigint[])",
        wanted,
    )
    return {row["id"] for row in rows}


def _job(row: asyncpg.Record) -> Job:
    given = dict(row)
    result = orjson.loads(given.pop("result") or "{}")
    parameters = orjson.loads(given.pop("parameters"))
    return Job(**given, parameters=parameters, problems=result.get("problems", []), outcome=result.get("outcome"))
