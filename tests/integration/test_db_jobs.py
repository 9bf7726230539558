"""Jobs in the database: chunks that are held, lost, finished once, and kept clear of what was erased."""

import asyncio
from collections.abc import Collection
from uuid import UUID, uuid4

import pytest

from overtone.db import Database, jobs
from overtone.db.erasure import erase_posts
from overtone.db.jobs import ChunkName, Due, Finished, Job, NewJob
from overtone.db.tombstones import bury_authors
from overtone.errors import DatabaseUnavailableError

HOLD_S = 60.0


async def made(db: Database, *chunks: int, key_id: str = "k", request_key: str | None = None) -> Job:
    job, is_new = await jobs.create_job(
        db, NewJob(uuid4(), "score", key_id, {"top_k": 1}, chunks or (5,), request_key=request_key)
    )
    assert is_new
    return job


def nothing(_erased: Collection[int]) -> None:
    pass


async def let_lapse(db: Database, column: str) -> None:
    async with db.acquire() as connection:
        await connection.execute(f"UPDATE overtone.job_chunks SET {column} = {column} - interval '1 day'")


async def test_a_job_is_stored_found_and_listed(fresh_database: Database) -> None:
    job = await made(fresh_database, 3, 2)
    await made(fresh_database, key_id="other")
    assert (job.state, job.total, job.done, job.parameters, job.problems) == ("queued", 5, 0, {"top_k": 1}, [])
    assert await jobs.find_job(fresh_database, job.job_id) == job
    assert await jobs.find_job(fresh_database, uuid4()) is None
    assert await jobs.list_jobs(fresh_database, key_id="k", limit=10) == [job]
    assert len(await jobs.list_jobs(fresh_database, key_id=None, limit=10)) == 2
    assert await jobs.open_jobs(fresh_database, "k") == 1


async def test_a_request_makes_one_job(fresh_database: Database) -> None:
    new = [NewJob(uuid4(), "score", "k", {}, (1,), request_key="once") for _ in range(4)]
    answers = await asyncio.gather(*(jobs.create_job(fresh_database, one) for one in new))
    assert sum(is_new for _, is_new in answers) == 1
    assert len({job.job_id for job, _ in answers}) == 1
    found = await jobs.find_by_request(fresh_database, "k", "once")
    assert found is not None
    assert found.job_id == answers[0][0].job_id
    assert await jobs.find_by_request(fresh_database, "other", "once") is None


async def test_chunks_are_given_a_window_at_a_time(fresh_database: Database) -> None:
    big, small = await made(fresh_database, *[1] * 10), await made(fresh_database, 1)
    due = await jobs.due_chunks(fresh_database, window=4, lost_after_s=60)
    assert {(one.name.job_id, one.name.number) for one in due} == {
        *((big.job_id, number) for number in range(1, 5)),
        (small.job_id, 1),
    }
    assert await jobs.due_chunks(fresh_database, window=4, lost_after_s=60) == []
    await finish(fresh_database, ChunkName(big.job_id, 2))
    assert await jobs.due_chunks(fresh_database, window=4, lost_after_s=60) == [Due(ChunkName(big.job_id, 5), "score")]
    await jobs.unqueue_chunks(fresh_database, [ChunkName(big.job_id, 5)])
    assert await jobs.due_chunks(fresh_database, window=4, lost_after_s=60) == [Due(ChunkName(big.job_id, 5), "score")]


async def test_callers_at_once_get_each_chunk_once(fresh_database: Database) -> None:
    await made(fresh_database, *[1] * 200)
    answers = await asyncio.gather(*(jobs.due_chunks(fresh_database, window=500, lost_after_s=60) for _ in range(6)))
    given = [name for answer in answers for name in answer]
    assert len(given) == len(set(given)) == 200


async def finish(db: Database, name: ChunkName, items: int = 1, failed: int = 0) -> jobs.State | None:
    return await jobs.finish_chunk(db, name, Finished(items, failed, ()), nothing)


async def test_a_chunk_has_one_holder_until_that_falls_silent(fresh_database: Database) -> None:
    job = await made(fresh_database, 5)
    name, first, second = ChunkName(job.job_id, 1), uuid4(), uuid4()
    await jobs.due_chunks(fresh_database, window=8, lost_after_s=60)
    claims = await asyncio.gather(*(jobs.claim_chunk(fresh_database, name, uuid4(), HOLD_S) for _ in range(5)))
    assert [claim.items for claim in claims if claim] == [5]
    await let_lapse(fresh_database, "held_until")
    assert await jobs.due_chunks(fresh_database, window=8, lost_after_s=1e6) == [Due(name, "score")]
    claim = await jobs.claim_chunk(fresh_database, name, first, HOLD_S)
    assert claim is not None
    assert claim.attempts == 2
    await let_lapse(fresh_database, "held_until")
    await jobs.keep_holding(fresh_database, [first], HOLD_S)
    assert await jobs.due_chunks(fresh_database, window=8, lost_after_s=0) == []
    assert await jobs.claim_chunk(fresh_database, name, second, HOLD_S) is None
    await jobs.release_chunk(fresh_database, name, first, retry_within_s=60)
    assert await jobs.due_chunks(fresh_database, window=8, lost_after_s=1) == []
    assert await jobs.claim_chunk(fresh_database, name, second, HOLD_S) is not None


async def test_a_chunk_that_the_broker_lost_is_given_again(fresh_database: Database) -> None:
    job = await made(fresh_database, 5)
    await jobs.due_chunks(fresh_database, window=8, lost_after_s=60)
    await let_lapse(fresh_database, "queued_at")
    assert await jobs.due_chunks(fresh_database, window=8, lost_after_s=60) == [Due(ChunkName(job.job_id, 1), "score")]


async def test_a_chunk_counts_once_and_the_last_one_ends_the_job(fresh_database: Database) -> None:
    job = await made(fresh_database, 3, 2)
    written: list[int] = []
    problems = [{"line": line, "field": "text", "problem": "x"} for line in (9, 2)]

    def keep(_erased: Collection[int]) -> None:
        written.append(1)

    async def done(number: int, items: int) -> jobs.State | None:
        result = Finished(items, 1, problems if number == 1 else ())
        return await jobs.finish_chunk(fresh_database, ChunkName(job.job_id, number), result, keep)

    await jobs.claim_chunk(fresh_database, ChunkName(job.job_id, 1), uuid4(), HOLD_S)
    states = await asyncio.gather(*(done(1, 3) for _ in range(4)))
    assert sorted(states, key=str) == [None, None, None, "running"]
    assert await done(2, 2) == "succeeded"
    found = await jobs.find_job(fresh_database, job.job_id)
    assert found is not None
    assert (found.state, found.done, found.failed, len(written)) == ("succeeded", 5, 2, 2)
    assert [item["line"] for item in found.problems] == [2, 9]
    assert found.started_at
    assert found.finished_at
    assert await jobs.claim_chunk(fresh_database, ChunkName(job.job_id, 2), uuid4(), HOLD_S) is None


async def test_a_result_that_cannot_be_kept_is_not_counted(fresh_database: Database) -> None:
    job = await made(fresh_database, 3)

    def keep(_erased: Collection[int]) -> None:
        raise OSError("no space")

    with pytest.raises((OSError, DatabaseUnavailableError)):
        await jobs.finish_chunk(fresh_database, ChunkName(job.job_id, 1), Finished(3, 0, ()), keep)
    found = await jobs.find_job(fresh_database, job.job_id)
    assert found is not None
    assert found.done == 0
    assert await jobs.claim_chunk(fresh_database, ChunkName(job.job_id, 1), uuid4(), HOLD_S) is not None


async def test_a_job_that_was_ended_takes_no_more(fresh_database: Database) -> None:
    job = await made(fresh_database, 1, 1)
    name = ChunkName(job.job_id, 1)
    await jobs.claim_chunk(fresh_database, name, uuid4(), HOLD_S)
    assert await jobs.end_job(fresh_database, job.job_id, "cancelled")
    assert not await jobs.end_job(fresh_database, job.job_id, "failed", "late")
    assert await finish(fresh_database, name) is None
    assert await jobs.due_chunks(fresh_database, window=8, lost_after_s=0) == []
    found = await jobs.find_job(fresh_database, job.job_id)
    assert found is not None
    assert (found.state, found.done, found.error) == ("cancelled", 0, None)
    await jobs.delete_job(fresh_database, job.job_id)
    assert await finish(fresh_database, ChunkName(job.job_id, 2)) is None


async def test_what_was_erased_before_the_result_is_told_to_who_writes_it(fresh_database: Database) -> None:
    job = await made(fresh_database, 4)
    await erase_posts(fresh_database, [17], reason="requested")
    await bury_authors(fresh_database, [42], reason="requested")
    told: list[set[int]] = []
    ids = {17, 18, 42, 43, -1, 2**70}
    await jobs.finish_chunk(
        fresh_database, ChunkName(job.job_id, 1), Finished(4, 0, (), ids), lambda gone: told.append(set(gone))
    )
    assert told == [{17, 42}]


async def test_no_erasure_comes_between_the_look_and_the_commit(fresh_database: Database) -> None:
    job = await made(fresh_database, 1)
    order: list[str] = []
    loop, erasing = asyncio.get_running_loop(), asyncio.Event()

    async def erase() -> None:
        await erasing.wait()
        await erase_posts(fresh_database, [17], reason="requested")
        order.append("erased")

    def keep(_gone: Collection[int]) -> None:
        loop.call_soon_threadsafe(erasing.set)
        # Until the erasure waits for the lock, which the transaction of this chunk holds.
        asyncio.run_coroutine_threadsafe(_until_someone_waits(fresh_database), loop).result(30)
        order.append("kept")

    eraser = asyncio.create_task(erase())
    await jobs.finish_chunk(fresh_database, ChunkName(job.job_id, 1), Finished(1, 0, (), {17}), keep)
    await eraser
    assert order == ["kept", "erased"]


async def _until_someone_waits(db: Database) -> None:
    while True:
        async with db.acquire() as connection:
            if await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
                return
        await asyncio.sleep(0.01)


async def test_old_jobs_are_forgotten(fresh_database: Database) -> None:
    old, fresh, open_one = [await made(fresh_database) for _ in range(3)]
    for job in (old, fresh):
        await jobs.end_job(fresh_database, job.job_id, "cancelled")
    async with fresh_database.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.jobs SET finished_at = now() - interval '8 days' WHERE job_id = $1", old.job_id
        )
    assert await jobs.delete_old_jobs(fresh_database, 7) == [old.job_id]
    known = await jobs.known_jobs(fresh_database, [old.job_id, fresh.job_id, open_one.job_id, UUID(int=1)])
    assert known == {fresh.job_id: "cancelled", open_one.job_id: "queued"}
