"""Feedback from the API into the table, once a person and subject, and never about what was erased."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from overtone.db import Database
from overtone.db.erasure import erase_posts
from overtone.db.feedback import Feedback, to_label, write_feedback
from overtone.db.keys import create_key
from overtone.db.posts import write_posts
from overtone.db.predictions import write_predictions
from overtone.db.tombstones import bury_authors
from overtone.schema import Post, Prediction, datetime_to_snowflake
from serve.auth import Gate, KeyRing
from serve.classifier import Classifier
from serve.http import create_app
from serve.service import Service
from serve.store import Store

_ids = itertools.count(datetime_to_snowflake(datetime.now(UTC) - timedelta(hours=3)), 4096)


async def stored(db: Database, count: int, *, author: int = 7, confidence: float = 0.6) -> list[Post]:
    posts = [Post(next(_ids), author, f"text {number}", datetime.now(UTC)) for number in range(count)]
    await write_posts(db, posts, stream="s")
    scores = {"positive": confidence, "negative": 1 - confidence}
    await write_predictions(db, [(one.post_id, Prediction("positive", confidence, scores, "m-1")) for one in posts])
    return posts


@pytest.fixture
async def api(
    fresh_database: Database, fresh_postgres_url: str, classifier: Classifier
) -> AsyncIterator[httpx.AsyncClient]:
    store = Store(fresh_postgres_url)
    service = Service(classifier=classifier, gate=Gate(KeyRing(store)), records=store)
    _, secret = await create_key(fresh_database, "people", ["feedback"])
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://t", headers={"x-api-key": secret}) as client:
        yield client
    await store.close()


async def test_a_post_and_a_text_are_corrected_once(fresh_database: Database, api: httpx.AsyncClient) -> None:
    [post] = await stored(fresh_database, 1)
    about_post = {"post_id": str(post.post_id), "label": "negative"}
    first = (await api.post("/feedback", json=about_post)).json()
    assert first["state"] == "created"
    assert (await api.post("/feedback", json=about_post)).json() == {**first, "state": "unchanged"}
    assert (await api.post("/feedback", json={**about_post, "label": "neutral"})).json() == {
        **first,
        "state": "changed",
    }
    other = (await api.post("/feedback", json={**about_post, "annotator": "ann"})).json()
    assert other["state"] == "created"
    text = {"text": "love", "label": "negative", "predicted_label": "positive", "model_version": "m-0"}
    answers = await asyncio.gather(*(api.post("/feedback", json=text) for _ in range(5)))
    assert sorted(answer.json()["state"] for answer in answers) == ["created", *["unchanged"] * 4]
    async with fresh_database.acquire() as connection:
        rows = await connection.fetch(
            "SELECT label, predicted_label, model_version, annotator, source, text FROM overtone.feedback ORDER BY id"
        )
    assert [tuple(row) for row in rows] == [
        ("neutral", "positive", "m-1", "", "human", None),
        ("negative", "positive", "m-1", "ann", "human", None),
        ("negative", "positive", "m-0", "", "human", "love"),
    ]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"label": "happy", "text": "x"}, 422, "label"),
        ({"label": ["negative"], "text": "x"}, 422, "label"),
        ({"label": "negative"}, 422, "post_id"),
        ({"label": "negative", "text": "x", "post_id": "1"}, 422, "post_id"),
        ({"label": "negative", "post_id": 17}, 422, "post_id"),
        ({"label": "negative", "post_id": "9" * 19}, 422, "post_id"),
        ({"label": "negative", "text": "  "}, 422, "text"),
        ({"label": "negative", "text": "x", "annotator": "a" * 201}, 422, "annotator"),
        ({"label": "negative", "text": "x", "secret words": 1}, 422, "body"),
        ({"label": "negative", "post_id": "17"}, 404, None),
        ([], 422, "body"),
    ],
)
async def test_what_is_wrong_is_a_problem(api: httpx.AsyncClient, body: object, status: int, field: str | None) -> None:
    answer = await api.post("/feedback", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert [item["field"] for item in answer.json()["errors"]] == ([field] if field else [])
    assert "secret" not in answer.text


async def test_the_scope_is_needed(fresh_database: Database, api: httpx.AsyncClient) -> None:
    _, secret = await create_key(fresh_database, "readers", ["predict", "read"])
    body = {"text": "x", "label": "negative"}
    assert (await api.post("/feedback", json=body, headers={"x-api-key": secret})).status_code == 403
    assert (await api.post("/feedback", json=body, headers={"x-api-key": "none"})).status_code == 401


async def test_openapi_tells_of_feedback(api: httpx.AsyncClient) -> None:
    schema = (await api.get("/openapi.json")).json()
    answers = schema["paths"]["/feedback"]["post"]["responses"]
    assert {"200", "401", "403", "404", "422"} <= set(answers)
    assert "FeedbackRequest" in schema["components"]["schemas"]


async def test_nothing_is_kept_about_what_is_erased(fresh_database: Database) -> None:
    db = fresh_database
    [kept], [gone], [hidden] = [await stored(db, 1, author=author) for author in (7, 8, 9)]
    items = [Feedback("neutral", post_id=one.post_id) for one in (kept, gone, hidden)]
    before = await write_feedback(db, items[:2], key_id="k")
    await erase_posts(db, [gone.post_id], reason="requested")
    # The author has a tombstone, and the posts are not gone yet.
    await bury_authors(db, [9], reason="requested")
    assert await write_feedback(db, items, key_id="k") == [
        before[0] and replace(before[0], state="unchanged"),
        None,
        None,
    ]
    async with db.acquire() as connection:
        assert await connection.fetchval("SELECT array_agg(post_id) FROM overtone.feedback") == [kept.post_id]
        # As retention takes it.
        await connection.execute("DELETE FROM overtone.posts WHERE post_id = $1", kept.post_id)
    changed = [Feedback("positive", post_id=kept.post_id)]
    assert await write_feedback(db, changed, key_id="k") == [None]


async def test_of_several_for_one_subject_the_last_counts(fresh_database: Database) -> None:
    # PostgreSQL keeps no NUL: two names that differ in how they are written are one when they are stored.
    items = [Feedback(label, text="x", annotator=name) for label, name in (("neutral", "a\0"), ("negative", "a\ufffd"))]
    first, second = await write_feedback(fresh_database, items, key_id="k", source="import")
    assert first == second
    async with fresh_database.acquire() as connection:
        rows = await connection.fetch("SELECT label, source FROM overtone.feedback")
    assert [tuple(row) for row in rows] == [("negative", "import")]
    assert await write_feedback(fresh_database, [], key_id="k") == []


async def test_what_is_worth_labelling(fresh_database: Database) -> None:
    db = fresh_database
    sure, unsure, split = [(await stored(db, 1, confidence=share))[0] for share in (0.99, 0.4, 0.9)]
    labelled, argued = await stored(db, 2, confidence=0.35)
    await write_predictions(db, [(split.post_id, Prediction("negative", 0.8, {"negative": 0.8}, "m-2"))])
    await write_feedback(db, [Feedback("neutral", post_id=labelled.post_id)], key_id="k")
    both = [Feedback(label, argued.post_id, annotator=label) for label in ("neutral", "negative")]
    await write_feedback(db, both, key_id="k")
    for erased, author in ((0.3, 8), (0.2, 9)):
        await stored(db, 1, author=author, confidence=erased)
    await bury_authors(db, [8, 9], reason="requested")
    found = await to_label(db, since=datetime.now(UTC) - timedelta(days=1), limit=1)
    assert [(one.post_id, one.reason) for one in found] == [
        (argued.post_id, "annotators disagree"),
        (unsure.post_id, "uncertain"),
        (split.post_id, "versions disagree"),
    ]
    assert sure.post_id not in {one.post_id for one in found}
