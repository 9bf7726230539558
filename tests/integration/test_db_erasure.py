"""Erasure in a real database: gone from every table, and never back."""

import asyncio
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from overtone.db import Database
from overtone.db.erasure import (
    Removed,
    count_of,
    erase_letters,
    erase_posts,
    everything_of,
    posts_of,
    scrub_places,
    versions_of,
)
from overtone.db.partitions import month_of, partition_name
from overtone.db.posts import write_dead_letter, write_posts
from overtone.db.predictions import write_predictions
from overtone.db.tombstones import admit_authors, admit_posts, bury_authors, erased_among
from overtone.schema import Post, Prediction, datetime_to_snowflake

_ids = itertools.count(datetime_to_snowflake(datetime.now(UTC) - timedelta(hours=1)))


def post(author: int = 7, post_id: int | None = None, history: list[int] | None = None, **data: Any) -> Post:
    number = next(_ids) if post_id is None else post_id
    if history is not None:
        data["edit_history_tweet_ids"] = [str(one) for one in history]
    return Post(number, author, "hello", datetime.now(UTC), payload={"data": {"id": str(number), **data}})


PREDICTION = Prediction("positive", 0.8, {"positive": 0.8, "negative": 0.2}, "tiny-1")


async def values(db: Database, statement: str, *arguments: Any) -> list[Any]:
    async with db.acquire() as connection:
        return [row[0] for row in await connection.fetch(statement, *arguments)]


async def store(db: Database, *posts: Post) -> None:
    await write_posts(db, posts, stream="s")
    await write_predictions(db, [(one.post_id, PREDICTION) for one in posts])


async def test_an_erased_author_stays_away(fresh_database: Database) -> None:
    theirs, others = [post(8) for _ in range(20)], [post(9) for _ in range(5)]
    await store(fresh_database, *theirs, *others)
    await bury_authors(fresh_database, [8, 0], reason="asked")
    ids = await posts_of(fresh_database, 8)
    assert ids == [one.post_id for one in theirs]
    assert await count_of(fresh_database, ids) == Removed(posts=20, predictions=20)
    assert await erase_posts(fresh_database, ids, reason="asked") == Removed(posts=20, predictions=20)
    assert await count_of(fresh_database, ids) == Removed()
    # The stream again, a search, and a post that nobody had seen yet.
    assert await write_posts(fresh_database, [*theirs, *others, post(8)], stream="s_search") == 0
    assert await values(fresh_database, "SELECT DISTINCT author_id FROM overtone.posts") == [9]
    # Author 0 stands for posts whose author X was not asked for.
    assert await write_posts(fresh_database, [post(0)], stream="s") == 1


async def test_a_tombstone_is_taken_back_only_for_its_reason(fresh_database: Database) -> None:
    one = post(8)
    await bury_authors(fresh_database, [8], reason="suspended")
    await bury_authors(fresh_database, [8], reason="asked")
    assert await admit_authors(fresh_database, [8], reason="asked") == 0
    assert await write_posts(fresh_database, [one], stream="s") == 0
    assert await admit_authors(fresh_database, [8], reason="suspended") == 1
    assert await write_posts(fresh_database, [one], stream="s") == 1
    await erase_posts(fresh_database, [one.post_id], reason="dropped")
    assert await admit_posts(fresh_database, [one.post_id], reason="deleted") == 0
    assert await admit_posts(fresh_database, [one.post_id], reason="dropped") == 1
    assert await write_posts(fresh_database, [one], stream="s") == 1


async def test_a_backfill_under_way_brings_nothing_back(fresh_database: Database) -> None:
    posts = [post(8) for _ in range(400)]

    async def backfill() -> None:
        for _ in range(5):
            await asyncio.gather(*(write_posts(fresh_database, posts[part::4], stream="s") for part in range(4)))

    async def erase() -> None:
        await bury_authors(fresh_database, [8], reason="asked")
        while ids := await posts_of(fresh_database, 8, limit=100):
            await erase_posts(fresh_database, ids, reason="asked")

    await asyncio.gather(backfill(), erase())
    await backfill()
    assert await values(fresh_database, "SELECT count(*) FROM overtone.posts") == [0]


async def test_all_versions_of_an_edited_post_are_found(fresh_database: Database) -> None:
    first, second, third, other = (next(_ids) for _ in range(4))
    posts = [
        post(8, first, [first]),
        post(8, second, [first, second]),
        post(8, third, [first, second, third]),
        post(8, other, [other]),
        post(8),
    ]
    await store(fresh_database, *posts)
    for version in (first, second, third):
        assert await versions_of(fresh_database, version) == [first, second, third]
    assert await versions_of(fresh_database, other) == [other]
    assert await versions_of(fresh_database, 5) == [5]
    await erase_posts(fresh_database, [second], reason="x")
    assert await versions_of(fresh_database, second, 8) == [first, second, third]


async def test_dead_letters_are_found_by_what_they_say(fresh_database: Database) -> None:
    for raw in (b'{"data": {"author_id": "812"', b'{"id": 5812', b"\xff\x00 812 \x81", b"81 2"):
        await write_dead_letter(fresh_database, raw, "not_json")
    assert await erase_letters(fresh_database, [812]) == 2
    assert await erase_letters(fresh_database, []) == 0
    assert len(await values(fresh_database, "SELECT id FROM overtone.dead_letters")) == 2


async def test_detached_partitions_are_erased_too(fresh_database: Database) -> None:
    one = post(8)
    await store(fresh_database, one)
    async with fresh_database.acquire() as connection:
        for table in ("posts", "predictions"):
            name = partition_name(table, month_of(one.post_id))
            await connection.execute(f"ALTER TABLE overtone.{table} DETACH PARTITION overtone.{name}")
    assert await posts_of(fresh_database, 8) == [one.post_id]
    assert await erase_posts(fresh_database, [one.post_id], reason="x") == Removed(posts=1, predictions=1)
    assert await posts_of(fresh_database, 8) == []


async def test_everything_about_an_author_is_read(fresh_database: Database) -> None:
    posts = [post(8, lang="en") for _ in range(3)]
    await store(fresh_database, *posts, post(9))
    async with fresh_database.acquire() as connection:
        await connection.execute(
            "INSERT INTO overtone.feedback (post_id, label) VALUES ($1, 'neutral')", posts[0].post_id
        )
    found = [one async for one in everything_of(fresh_database, 8)]
    assert [one["post_id"] for one in found] == [one.post_id for one in posts]
    assert [len(one["feedback"]) for one in found] == [1, 0, 0]
    assert found[0]["predictions"][0]["label"] == "positive"
    assert found[0]["payload"]["data"]["lang"] == "en"


async def test_places_are_taken_out_and_nothing_else(fresh_database: Database) -> None:
    where = [post(8, geo={"place_id": "x"}, lang="en"), post(8, geo={"place_id": "y"}), post(9, geo={"place_id": "z"})]
    await store(fresh_database, *where)
    assert await scrub_places(fresh_database, [8], up_to_post_id=where[0].post_id) == 1
    assert await scrub_places(fresh_database, [8]) == 1
    payloads = await values(fresh_database, "SELECT payload::text FROM overtone.posts ORDER BY post_id")
    assert ["geo" in json.loads(payload)["data"] for payload in payloads] == [False, False, True]
    assert json.loads(payloads[0])["data"]["lang"] == "en"


async def test_who_was_erased_is_told(fresh_database: Database) -> None:
    await erase_posts(fresh_database, [5], reason="x")
    await bury_authors(fresh_database, [8], reason="x")
    assert await erased_among(fresh_database, [5, 6]) == {5}
    assert await erased_among(fresh_database, [5, 6, 7], [1, 8, 9]) == {5, 6}
