"""The restore drill: back up, wipe, restore, and find everything as it was."""

import asyncio
import shutil
import time
from importlib import resources
from pathlib import Path

import asyncpg
import pytest

from overtone.backup import create, found, read_key, restore, verify
from overtone.bundle import load_bundle
from overtone.db import Database
from overtone.db.keys import import_key
from overtone.engine import OnnxEngine
from overtone.errors import ConfigurationError, DataError, NotFoundError

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
    finally:
        await db.close()


def _predictions(home: Path) -> list[list[float]]:
    bundle = load_bundle(home / "bundles" / "kept")
    engine = OnnxEngine(bundle)
    try:
        return [[float(share) for share in row] for row in engine.classify([[101, 1045, 2293, 2009, 102], [101, 102]])]
    finally:
        engine.close()


async def _checksum(url: str) -> str:
    connection = await asyncpg.connect(url)
    try:
        return str(
            await connection.fetchval("SELECT md5(string_agg(k::text, '|' ORDER BY key_id)) FROM overtone.api_keys k")
        )
    finally:
        await connection.close()


async def _wipe(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA overtone CASCADE")
    await connection.close()


def test_what_was_wiped_comes_back(fresh_postgres_url: str, home: Path, tmp_path: Path) -> None:
    asyncio.run(_fill(fresh_postgres_url))
    key = read_key(tmp_path / "key", make=True)
    checksum = asyncio.run(_checksum(fresh_postgres_url))
    before = _predictions(home)
    made = create(fresh_postgres_url, home, str(tmp_path / "target"), key)
    asyncio.run(_wipe(fresh_postgres_url))
    shutil.rmtree(home)

    started = time.monotonic()
    restored = restore(fresh_postgres_url, home, str(tmp_path / "target"), "latest", key)
    print(f"restored in {time.monotonic() - started:.2f} s")  # noqa: T201

    assert restored == made
    assert made.rows["api_keys"] == 1
    assert asyncio.run(_checksum(fresh_postgres_url)) == checksum
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
