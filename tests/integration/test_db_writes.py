"""Posts and predictions in a real database: exactly once, whatever happens."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overtone.db import Database
from overtone.db.audit import read_audit
from overtone.db.connects import connects_since, forget_connect, note_connect
from overtone.db.erasure import erase_posts
from overtone.db.gaps import accept_gaps, close_gap, list_gaps, open_gap, posts_between, settle_gap
from overtone.db.partitions import ensure_partitions, month_of, partition_name
from overtone.db.posts import claim_stream, cursor, unclassified, write_dead_letter, write_posts
from overtone.db.predictions import Counts, counts, stats, write_predictions
from overtone.errors import DatabaseUnavailableError, FencedError
from overtone.schema import Post, Prediction, datetime_to_snowflake

_ids = itertools.count(datetime_to_snowflake(datetime.now(UTC) - timedelta(hours=1)))


def post(post_id: int | None = None, text: str = "hello", **fields: Any) -> Post:
    number = next(_ids) if post_id is None else post_id
    return Post(number, author_id=7, text=text, created_at=datetime.now(UTC), **fields)


def prediction(label: str = "positive", version: str = "tiny-1") -> Prediction:
    return Prediction(label, 0.8, {"negative": 0.1, "neutral": 0.1, label: 0.8}, version)


async def rows(db: Database, statement: str, *values: Any) -> list[Any]:
    async with db.acquire() as connection:
        return [tuple(row) for row in await connection.fetch(statement, *values)]


async def assert_tallies_match_tables(db: Database) -> None:
    counted = await rows(
        db,
        "SELECT 'posts', date_trunc('minute', stored_at), '', count(*) FROM overtone.posts GROUP BY 2"
        " UNION ALL SELECT 'predictions', date_trunc('minute', stored_at), label, count(*)"
        " FROM overtone.predictions GROUP BY 2, 3",
    )
    tallied = await rows(
        db, "SELECT kind, minute, label, count FROM overtone.tallies WHERE minute > '-infinity' AND count > 0"
    )
    assert sorted(tallied) == sorted(counted)
    sums: Counter[tuple[str, str]] = Counter()
    for kind, _, label, count in counted:
        sums[kind, label] += count
    totals = await rows(db, "SELECT kind, label, count FROM overtone.tallies WHERE minute = '-infinity' AND count > 0")
    assert {(kind, label): count for kind, label, count in totals} == dict(sums)


async def test_a_post_is_stored_as_it_came(database: Database) -> None:
    given_post = post(text="naïve 😀", lang="fr", rule_tags=("one", "two"), payload={"id": "1", "n": [1.5, None]})
    assert await write_posts(database, [given_post], stream="filtered") == 1
    found = await rows(
        database,
        "SELECT author_id, text, created_at, lang, rule_tags, payload::text, stream FROM overtone.posts"
        " WHERE post_id = $1",
        given_post.post_id,
    )
    assert found == [
        (7, "naïve 😀", given_post.created_at, "fr", ["one", "two"], '{"n": [1.5, null], "id": "1"}', "filtered")
    ]


async def test_a_replay_stores_nothing_twice(fresh_database: Database) -> None:
    posts = [post() for _ in range(100)]
    assert await write_posts(fresh_database, [*posts, *posts], stream="s") == 100
    assert await write_posts(fresh_database, posts, stream="s") == 0
    predictions = [(one.post_id, prediction()) for one in posts]
    assert await write_predictions(fresh_database, [*predictions, *predictions]) == 100
    assert await write_predictions(fresh_database, predictions) == 0
    assert await counts(fresh_database) == Counts(100, 100)
    await assert_tallies_match_tables(fresh_database)


async def test_writers_of_the_same_posts_at_once_store_each_once(fresh_database: Database) -> None:
    posts = [post() for _ in range(300)]
    orders: list[Sequence[Post]] = [posts, posts[::-1], posts[150:] + posts[:150], posts[::2] + posts[1::2]]
    stored = await asyncio.gather(*(write_posts(fresh_database, order, stream="s") for order in orders * 3))
    assert sum(stored) == 300
    predictions = [[(one.post_id, prediction("neutral")) for one in order] for order in orders]
    classified = await asyncio.gather(*(write_predictions(fresh_database, batch) for batch in predictions * 3))
    assert sum(classified) == 300
    assert await counts(fresh_database) == Counts(300, 300)
    await assert_tallies_match_tables(fresh_database)


async def test_nothing_is_stored_when_the_transaction_fails(fresh_database: Database) -> None:
    first = await claim_stream(fresh_database, "s")
    second = await claim_stream(fresh_database, "s")
    assert second > first
    with pytest.raises(FencedError):
        await write_posts(fresh_database, [post()], stream="s", epoch=first)
    assert await counts(fresh_database) == Counts(0, 0)
    newest = post()
    assert await write_posts(fresh_database, [newest], stream="s", epoch=second) == 1
    found = await cursor(fresh_database, "s")
    assert found
    assert (found.post_id, found.epoch) == (newest.post_id, second)
    await assert_tallies_match_tables(fresh_database)


async def test_the_cursor_only_moves_ahead(database: Database) -> None:
    older, newer = post(), post()
    await write_posts(database, [newer], stream="ahead")
    await write_posts(database, [older], stream="ahead")
    found = await cursor(database, "ahead")
    assert found
    assert found.post_id == newer.post_id
    assert await cursor(database, "never seen") is None


async def test_erased_posts_do_not_come_back(fresh_database: Database) -> None:
    kept, gone = post(), post()
    await write_posts(fresh_database, [kept, gone], stream="s")
    await write_predictions(fresh_database, [(kept.post_id, prediction()), (gone.post_id, prediction())])
    await write_dead_letter(fresh_database, b"raw", "unreadable", post_id=gone.post_id)
    removed = await erase_posts(fresh_database, [gone.post_id, 12345], reason="deleted by its author")
    assert (removed.posts, removed.predictions, removed.dead_letters) == (1, 1, 1)

    assert await write_posts(fresh_database, [gone, post(12345)], stream="s") == 0
    assert await write_predictions(fresh_database, [(gone.post_id, prediction(version="tiny-2"))]) == 0
    assert await counts(fresh_database) == Counts(1, 1)
    assert await rows(fresh_database, "SELECT FROM overtone.dead_letters") == []
    await assert_tallies_match_tables(fresh_database)
    figures = await stats(fresh_database)
    assert (figures.posts, figures.predictions) == (1, 1)


async def test_erasing_while_others_write_leaves_nothing_behind(fresh_database: Database) -> None:
    posts = [post() for _ in range(200)]
    ids = [one.post_id for one in posts]
    predictions = [(number, prediction()) for number in ids]

    async def write(part: int) -> None:
        await write_posts(fresh_database, posts[part::4], stream="s")
        await write_predictions(fresh_database, predictions[part::4])

    await asyncio.gather(*(write(part) for part in range(4)), erase_posts(fresh_database, ids, reason="test"))
    await erase_posts(fresh_database, ids[:100], reason="test")
    left = await rows(
        fresh_database,
        "SELECT post_id FROM overtone.posts JOIN overtone.deleted_posts USING (post_id)"
        " UNION ALL SELECT post_id FROM overtone.predictions JOIN overtone.deleted_posts USING (post_id)",
    )
    assert left == []
    await assert_tallies_match_tables(fresh_database)


async def test_no_prediction_without_its_post(database: Database) -> None:
    assert await write_predictions(database, [(next(_ids), prediction())]) == 0
    assert await write_predictions(database, []) == 0
    assert await write_posts(database, [], stream="s") == 0


async def test_a_post_has_one_prediction_a_model(fresh_database: Database) -> None:
    one = post()
    await write_posts(fresh_database, [one], stream="s")
    assert await write_predictions(fresh_database, [(one.post_id, prediction("positive"))]) == 1
    assert await write_predictions(fresh_database, [(one.post_id, prediction("negative"))]) == 0
    assert await write_predictions(fresh_database, [(one.post_id, prediction("negative", "tiny-2"))]) == 1
    figures = await stats(fresh_database, newest=5)
    assert figures.labels == {"negative": 1, "neutral": 0, "positive": 1}
    assert [(seen.label, seen.model_version) for seen in figures.newest] == [("negative", "tiny-2")]


@pytest.mark.parametrize(
    "bad",
    [
        {"text": "nul \x00 and \ud800 surrogate"},
        {"payload": {"text": "\x00", "\ud800": ["\udfff", "\x00"]}},
        {"lang": "\x00"},
        {"rule_tags": ("\x00", "a\x1fb")},
    ],
)
async def test_poison_is_made_storable(database: Database, bad: dict[str, Any]) -> None:
    batch = [post(), post(**bad), post()]
    assert await write_posts(database, batch, stream="s") == 3


async def test_a_post_that_cannot_be_stored_becomes_a_dead_letter(fresh_database: Database) -> None:
    future = datetime_to_snowflake(datetime.now(UTC) + timedelta(days=400))
    bad = [post(future), post(-1), post(2**70), post(payload={"n": float(1), "huge": 10**140_000})]
    good = [post() for _ in range(5)]
    batch = [*good[:2], *bad, *good[2:]]
    assert await write_posts(fresh_database, batch, stream="s") == 5
    assert await write_posts(fresh_database, batch, stream="s") == 0
    letters = await rows(fresh_database, "SELECT reason, attempts FROM overtone.dead_letters")
    assert len(letters) == 4
    assert {attempts for _, attempts in letters} == {2}
    found = await cursor(fresh_database, "s")
    assert found
    assert found.post_id == good[-1].post_id


async def test_values_that_only_the_server_refuses_cost_their_posts_alone(fresh_database: Database) -> None:
    async with fresh_database.transaction() as connection:
        await connection.execute(
            "CREATE FUNCTION overtone.refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE numeric_value_out_of_range; END $$;"
            "CREATE TRIGGER refuse BEFORE INSERT ON overtone.posts FOR EACH ROW WHEN (NEW.text = 'bad')"
            " EXECUTE FUNCTION overtone.refuse()"
        )
    batch = [post(text="bad" if number in {3, 4, 17} else "good") for number in range(20)]
    assert await write_posts(fresh_database, batch, stream="s") == 17
    letters = await rows(fresh_database, "SELECT reason, post_id FROM overtone.dead_letters ORDER BY post_id")
    assert [post_id for _, post_id in letters] == [batch[number].post_id for number in (3, 4, 17)]
    assert all("NumericValueOutOfRange" in reason for reason, _ in letters)
    await assert_tallies_match_tables(fresh_database)


async def test_partitions_are_made_for_posts_of_any_age(fresh_database: Database) -> None:
    ids = [20, *(datetime_to_snowflake(datetime(year, 6, 15, tzinfo=UTC)) + 1 for year in range(2012, 2026, 3))]
    assert await write_posts(fresh_database, [post(number) for number in ids], stream="s") == len(ids)
    assert await write_predictions(fresh_database, [(number, prediction()) for number in ids]) == len(ids)
    stored = await rows(
        fresh_database,
        "SELECT c.relname, post_id FROM overtone.posts p JOIN pg_class c ON c.oid = p.tableoid ORDER BY post_id",
    )
    assert stored == [(partition_name("posts", month_of(number)), number) for number in ids]


async def test_a_partition_that_was_dropped_is_made_again(fresh_database: Database) -> None:
    old = datetime_to_snowflake(datetime(2020, 1, 10, tzinfo=UTC))
    await write_posts(fresh_database, [post(old)], stream="s")
    async with fresh_database.transaction() as connection:
        await connection.execute("DROP TABLE overtone.posts_2020_01")
    assert await write_posts(fresh_database, [post(old), post(old + 1)], stream="s") == 2


async def test_making_partitions_at_once_is_safe(fresh_database: Database) -> None:
    made = await asyncio.gather(*(ensure_partitions(fresh_database, ahead_days=200) for _ in range(4)))
    assert len([names for names in made if names]) == 1
    assert await ensure_partitions(fresh_database, ahead_days=200) == []


async def test_bounds_of_ids_leave_other_partitions_unread(fresh_database: Database) -> None:
    await ensure_partitions(fresh_database, ahead_days=200)
    since = datetime_to_snowflake(datetime.now(UTC))
    plan = await rows(
        fresh_database, "EXPLAIN SELECT * FROM overtone.posts WHERE post_id BETWEEN $1 AND $2", since, since + 10
    )
    scanned = {word for (line,) in plan for word in line.split() if word.startswith("posts_")}
    assert {name for name in scanned if "pkey" not in name} == {partition_name("posts", month_of(since))}


async def test_unclassified_posts_are_found_in_pages(fresh_database: Database) -> None:
    posts = [post(text=str(number)) for number in range(10)]
    await write_posts(fresh_database, posts, stream="s")
    await write_predictions(fresh_database, [(one.post_id, prediction()) for one in posts[::2]])
    wanted = [(one.post_id, one.text) for one in posts[1::2]]
    assert await unclassified(fresh_database, "tiny-1", since=None) == wanted
    page = await unclassified(fresh_database, "tiny-1", since=None, limit=2)
    assert page == wanted[:2]
    assert await unclassified(fresh_database, "tiny-1", since=None, after_post_id=page[-1][0]) == wanted[2:]
    assert len(await unclassified(fresh_database, "tiny-2", since=None)) == 10
    assert await unclassified(fresh_database, None, since=None) == wanted
    assert await unclassified(fresh_database, None, since=datetime.now(UTC)) == []


async def test_stats_of_an_empty_and_of_a_filled_database(fresh_database: Database) -> None:
    empty = await stats(fresh_database, minutes=5, newest=3)
    assert (empty.posts, empty.predictions, empty.newest, empty.source) == (0, 0, [], None)
    assert len(empty.series) == 5
    posts = [post(text=f"number {number}") for number in range(20)]
    await write_posts(fresh_database, posts, stream="filtered")
    await write_predictions(fresh_database, [(one.post_id, prediction()) for one in posts[:-1]])
    figures = await stats(fresh_database, minutes=5, newest=3)
    assert (figures.posts, figures.predictions, figures.source) == (20, 19, "filtered")
    assert figures.per_second.posts > figures.per_second.predictions > 0
    assert sum(minute.labels["positive"] for minute in figures.series) == 19
    assert figures.series == sorted(figures.series, key=lambda minute: minute.minute)
    assert [seen.post_id for seen in figures.newest] == [one.post_id for one in posts[:-4:-1]]
    assert [seen.label for seen in figures.newest] == [None, "positive", "positive"]
    assert figures.model_version == "tiny-1"


async def test_gaps_are_opened_closed_and_listed(fresh_database: Database) -> None:
    gap = await open_gap(fresh_database, "s", "network", after_post_id=5)
    [seen] = await list_gaps(fresh_database, "s")
    assert (seen.gap_id, seen.state, seen.after_post_id, seen.ended_at) == (gap, "open", 5, None)
    await close_gap(fresh_database, gap, before_post_id=9)
    await settle_gap(fresh_database, gap, "repaired", repaired_posts=3, means="replay")
    [seen] = await list_gaps(fresh_database)
    assert (seen.state, seen.before_post_id, seen.repaired_posts, seen.means) == ("repaired", 9, 3, "replay")
    assert seen.ended_at is not None
    assert await list_gaps(fresh_database, "other") == []
    await close_gap(fresh_database, gap, before_post_id=99)
    [seen] = await list_gaps(fresh_database)
    assert (seen.state, seen.before_post_id) == ("repaired", 9)


async def test_a_gap_that_a_person_accepted_stays_accepted(fresh_database: Database) -> None:
    ids = [await open_gap(fresh_database, "s", "network", after_post_id=5) for _ in range(3)]
    for gap in ids[1:]:
        await close_gap(fresh_database, gap, before_post_id=9)
    await settle_gap(fresh_database, ids[1], "partly_repaired", repaired_posts=2, means="search", reason="retweets")
    assert await accept_gaps(fresh_database, [*ids, 999_999], "a test of ours", actor="ann") == ids[1:]
    await settle_gap(fresh_database, ids[2], "repaired", repaired_posts=4, means="search")
    by_id = {gap.gap_id: gap for gap in await list_gaps(fresh_database)}
    assert [by_id[one].state for one in ids] == ["open", "accepted", "accepted"]
    assert (by_id[ids[2]].repaired_posts, by_id[ids[2]].reason) == (4, "a test of ours")
    assert {entry.subject for entry in await read_audit(fresh_database, action="gap.accepted")} == set(
        map(str, ids[1:])
    )


async def test_posts_of_a_stream_are_counted_between_two_ids(fresh_database: Database) -> None:
    posts = [post() for _ in range(5)]
    await write_posts(fresh_database, posts, stream="s")
    await write_posts(fresh_database, [post()], stream="other")
    assert await posts_between(fresh_database, "s", posts[0].post_id, posts[4].post_id) == 3


async def test_connections_are_remembered_for_a_while(fresh_database: Database) -> None:
    now, keep = datetime.now(UTC), timedelta(minutes=15)
    await note_connect(fresh_database, "s", now - timedelta(minutes=20), keep=keep)
    last = await note_connect(fresh_database, "s", now, keep=keep)
    await note_connect(fresh_database, "other", now, keep=keep)
    assert await connects_since(fresh_database, "s", now - timedelta(hours=1)) == [now]
    await forget_connect(fresh_database, last)
    assert await connects_since(fresh_database, "s", now - timedelta(hours=1)) == []


async def test_a_lost_connection_is_unavailable_and_mends_itself(database: Database) -> None:
    with pytest.raises(DatabaseUnavailableError):
        async with database.acquire() as connection:
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    await database.ping()


async def test_the_pool_is_bounded(postgres_url: str) -> None:
    db = await Database.open(postgres_url, max_size=2)

    async def use() -> int:
        async with db.acquire() as connection:
            return int(
                await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            )

    seen = await asyncio.gather(*(use() for _ in range(20)))
    others = max(seen) - 2
    assert others <= 1
    await db.close()


@given(texts=st.lists(st.text(st.characters(codec=None, exclude_categories=())), min_size=1, max_size=20))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_text_can_be_posted(postgres_url: str, texts: list[str]) -> None:
    async def write() -> None:
        db = await Database.open(postgres_url, max_size=1)
        posts = [post(text=text, payload={text: text}, rule_tags=(text,)) for text in texts]
        assert await write_posts(db, posts, stream="any") == len(posts)
        await db.close()

    asyncio.run(write())


async def test_a_leader_that_hangs_in_a_transaction_lets_go_of_its_locks(
    fresh_database: Database, fresh_postgres_url: str
) -> None:
    hanging = await Database.open(fresh_postgres_url, max_size=1, patience_s=0.5)
    await claim_stream(hanging, "s")

    async def hang() -> None:
        async with hanging.transaction() as connection:
            await connection.execute("UPDATE overtone.stream_cursor SET post_id = 7 WHERE stream = 's'")
            async with asyncio.timeout(30):
                assert await claim_stream(fresh_database, "s") == 2
            await connection.execute("SELECT 1")

    with pytest.raises(DatabaseUnavailableError):
        await hang()
    found = await cursor(fresh_database, "s")
    assert found is not None
    assert (found.post_id, found.epoch) == (0, 2)
    await hanging.close()


async def test_a_fenced_leader_changes_no_gap(fresh_database: Database) -> None:
    old = await claim_stream(fresh_database, "s")
    gap = await open_gap(fresh_database, "s", "network", epoch=old)
    await claim_stream(fresh_database, "s")
    with pytest.raises(FencedError):
        await open_gap(fresh_database, "s", "network", epoch=old)
    with pytest.raises(FencedError):
        await close_gap(fresh_database, gap, before_post_id=9, epoch=old)
    assert [one.state for one in await list_gaps(fresh_database, "s")] == ["open"]
