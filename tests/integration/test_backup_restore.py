"""The restore drill: back up, wipe, restore, and find everything as it was."""

import asyncio
import shutil
import time
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path

import asyncpg
import pytest

from overtone.backup import create, found, read_key, restore, verify
from overtone.bundle import load_bundle
from overtone.db import Database
from overtone.db.keys import import_key
from overtone.db.posts import write_posts
from overtone.db.predictions import write_predictions
from overtone.engine import OnnxEngine
from overtone.errors import ConfigurationError, DataError, NotFoundError
from overtone.schema import Post, Prediction, datetime_to_snowflake

POSTS = 300
SECRET = "a-secret-long-enough-for-a-test-of-backups"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    bundle = tmp_path / "home" / "bundles" / "kept"
    with resources.as_file(resources.files("overtone.bundles") / "default") as source:
        shutil.copytree(source, bundle)
    (tmp_path / "home" / "api_key").write_text(SECRET)
    return tmp_path / "home"


async def _fill(url: str) -> None:
    db = await Database.open(url)
    try:
        await import_key(db, "drill", SECRET, ("predict",))
        # Over three months, which are partitions, and with what a dump may trip over in the texts.
        posts = [
            Post(datetime_to_snowflake(when), author_id=number, text=f"№ {number}\t\\N\n😀 'x'", created_at=when)
            for number in range(POSTS)
            for when in [datetime.now(UTC) - timedelta(hours=7 * number)]
        ]
        assert await write_posts(db, posts, stream="drill") == POSTS
        scores = {"negative": 0.1, "neutral": 0.2, "positive": 0.7}
        predictions = [(each.post_id, Prediction("positive", 0.7, scores, "drill-1")) for each in posts]
        assert await write_predictions(db, predictions) == POSTS
    finally:
        await db.close()


def _predictions(home: Path) -> list[list[float]]:
    bundle = load_bundle(home / "bundles" / "kept")
    engine = OnnxEngine(bundle)
    try:
        return [[float(share) for share in row] for row in engine.classify([[101, 1045, 2293, 2009, 102], [101, 102]])]
    finally:
        engine.close()


async def _checksums(url: str) -> dict[str, tuple[int, str]]:
    """Rows, and a digest of all that is in them, of every table with anything in it."""
    connection = await asyncpg.connect(url)
    try:
        tables = await connection.fetch(
            "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = 'overtone' AND c.relkind IN ('r', 'p') AND NOT c.relispartition"
        )
        found = {}
        for [name] in tables:
            query = f"SELECT count(*), md5(string_agg(t::text, '|' ORDER BY t::text)) FROM overtone.{name} t"
            count, digest = await connection.fetchrow(query)
            if count:
                found[name] = (count, digest)
        return found
    finally:
        await connection.close()


async def _wipe(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA overtone CASCADE")
    await connection.close()


def test_what_was_wiped_comes_back(fresh_postgres_url: str, home: Path, tmp_path: Path) -> None:
    asyncio.run(_fill(fresh_postgres_url))
    key = read_key(tmp_path / "key", make=True)
    checksums = asyncio.run(_checksums(fresh_postgres_url))
    before = _predictions(home)
    made = create(fresh_postgres_url, home, str(tmp_path / "target"), key)
    asyncio.run(_wipe(fresh_postgres_url))
    shutil.rmtree(home)

    started = time.monotonic()
    restored = restore(fresh_postgres_url, home, str(tmp_path / "target"), "latest", key)
    print(f"restored {sum(made.rows.values())} rows in {time.monotonic() - started:.2f} s")  # noqa: T201

    assert restored == made
    assert (made.rows["api_keys"], made.rows["posts"], made.rows["predictions"]) == (1, POSTS, POSTS)
    assert asyncio.run(_checksums(fresh_postgres_url)) == checksums
    assert {"posts", "predictions", "api_keys", "tallies"} <= set(checksums)
    assert (home / "api_key").read_text() == SECRET
    assert _predictions(home) == before


def test_damage_another_key_and_another_name_are_refused(fresh_postgres_url: str, home: Path, tmp_path: Path) -> None:
    target = f"file://{tmp_path / 'target'}"
    key = read_key(tmp_path / "key", make=True)
    made = create(fresh_postgres_url, home, target, key)
    assert verify(target, made.name, key) == made
    with pytest.raises(DataError, match="another key"):
        verify(target, made.name, bytes(32))
    with pytest.raises(NotFoundError):
        verify(target, "overtone-never", key)
    with pytest.raises(ConfigurationError):
        read_key(tmp_path / "absent")
    file = tmp_path / "target" / f"{made.name}.backup"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        restore(fresh_postgres_url, home, target, made.name, key)
    assert found(target) == [made]
