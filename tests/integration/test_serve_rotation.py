"""Secrets are exchanged under load: of an API key, of the database and of tokens, and no request fails."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt
import pytest
import uvicorn

from overtone.db import Database, keys
from overtone.engine import open_engine
from overtone.rotation import Rotation
from overtone.settings import load_settings
from serve.auth import Gate, KeyRing
from serve.classifier import Classifier
from serve.http import create_app
from serve.quotas import Quotas
from serve.rotation import address, follow_secrets
from serve.service import Service
from serve.store import Store
from serve.tokens import open_tokens

ROLE = "rotating"
OLD, NEW = "the first secret, of more than 32 bytes", "the second secret, of more than 32 bytes"


class Mount:
    """A folder as Kubernetes mounts a Secret: all files change at once, by a link that is exchanged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        folder.mkdir()

    def keep(self, **values: str) -> None:
        self._count += 1
        fresh = self._folder / f"..{self._count}"
        fresh.mkdir()
        for name, value in values.items():
            (fresh / name).write_text(value)
        link = self._folder / "..new"
        link.symlink_to(fresh.name)
        os.replace(link, self._folder / "..data")
        for name in values:
            if not (self._folder / name).is_symlink():
                (self._folder / name).symlink_to(f"..data/{name}")
        for path in self._folder.iterdir():
            if not path.name.startswith(".") and path.name not in values:
                path.unlink()


def token(secret: str) -> str:
    return jwt.encode({"sub": "ann", "scope": "predict", "exp": time.time() + 600}, secret, "HS256")


class Load:
    """Clients that ask all the time, each with what `credentials` gives for its kind at that moment."""

    def __init__(self, url: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=30)
        self.key = ""
        self.token = ""
        self.answered = {"key": 0, "token": 0, "database": 0}
        self.failed: list[str] = []
        self._tasks = [asyncio.create_task(self._ask(kind)) for kind in self.answered for _ in range(4)]

    async def _ask(self, kind: str) -> None:
        while True:
            by_token = {"Authorization": f"Bearer {self.token}"}
            headers = by_token if kind == "token" else {"X-API-Key": self.key}
            if kind == "database":
                answer = await self.client.get("/stats", headers=headers)
            else:
                answer = await self.client.post("/predict", json={"text": "I love this"}, headers=headers)
            self.answered[kind] += 1
            if answer.status_code != 200:
                self.failed.append(f"{kind}: {answer.status_code} {answer.text[:200]}")

    async def go_on(self) -> None:
        """Wait until every kind has been answered 20 times more."""
        wanted = {kind: count + 20 for kind, count in self.answered.items()}
        await until(lambda: all(self.answered[kind] >= count for kind, count in wanted.items()))

    async def status(self, **headers: str) -> int:
        """The status of one request beside the load."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return (await self.client.post("/predict", json={"text": "fine"}, headers=named)).status_code

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.aclose()


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.02)


def put_first(file: Path, line: str, rest: str | None = None) -> str:
    """Write `line` before what is in `file`, or before `rest`; return what was there."""
    before = file.read_text()
    file.write_text(line + (before if rest is None else rest))
    return before


@pytest.fixture
async def role_url(fresh_postgres_url: str) -> AsyncIterator[Callable[[str], str]]:
    """Makes the address of the database for a role that needs a password, which is `first` to begin with."""
    admin = await asyncpg.connect(fresh_postgres_url)
    hba = Path(await admin.fetchval("SHOW hba_file"))
    before = put_first(hba, f"local all {ROLE} scram-sha-256\n")
    await admin.execute("SELECT pg_reload_conf()")
    await admin.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD 'first'; GRANT overtone TO {ROLE}")
    yield lambda password: fresh_postgres_url.replace("//overtone@", f"//{ROLE}:{password}@")
    put_first(hba, "", before)
    await admin.execute(f"SELECT pg_reload_conf(); DROP ROLE {ROLE}")
    await admin.close()


@asynccontextmanager
async def serving(rotation: Rotation) -> AsyncIterator[str]:
    """The address of the API with the parts that a replica gives it, less Ray."""
    settings = rotation.settings
    store = Store(address(settings.database_url), renew=rotation.renew_database_url)
    ring, tokens, quotas = KeyRing(store, refresh_s=0.2, unknown_s=0.2), open_tokens(settings, None), Quotas()
    follow_secrets(rotation, store=store, tokens=tokens, quotas=quotas, cache=None)
    gate = Gate(ring, tokens=tokens, quotas=quotas)
    classifier = Classifier(engine_for=open_engine)
    await classifier.load(None)
    app = create_app(Service(classifier=classifier, gate=gate, records=store))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    tasks = [asyncio.create_task(work) for work in (server.serve(), gate.keep_fresh(), rotation.keep_fresh())]
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await classifier.close()
        await store.close()


@pytest.mark.timeout(180)
async def test_secrets_are_exchanged_under_load_and_no_request_fails(
    fresh_postgres_url: str, role_url: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = Mount(tmp_path / "secrets")
    mount.keep(DATABASE_URL=role_url("first"), JWT_SECRET=OLD)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    settings = load_settings(secrets_from=f"file://{tmp_path}/secrets", secrets_refresh_s=1)
    db = await Database.open(fresh_postgres_url, max_size=1)
    key_id, first_key = await keys.create_key(db, "load", ["predict", "read"])

    async with serving(Rotation(settings)) as url:
        load = Load(url)
        load.key, load.token = first_key, token(OLD)
        try:
            await load.go_on()
            await exchange_the_key(load, db, key_id)
            await exchange_the_password(load, db, mount, role_url)
            await exchange_the_token_secret(load, mount, role_url("second"))
        finally:
            await load.stop()
    await db.close()
    print(f"{sum(load.answered.values())} requests, {len(load.failed)} failed: {load.answered}")  # noqa: T201
    assert load.failed == []


async def exchange_the_key(load: Load, db: Database, key_id: str) -> None:
    old = load.key
    new = await keys.rotate_key(db, key_id, grace_s=3600.0)
    assert new is not None
    await load.go_on()  # with the old key, in its grace
    load.key = new
    await load.go_on()
    async with db.acquire() as connection:  # as an hour does
        await connection.execute("UPDATE overtone.api_keys SET expires_at = now() WHERE parent_id = $1", key_id)
    await until(lambda: refused(load, X_API_Key=old))
    await load.go_on()


async def exchange_the_password(load: Load, db: Database, mount: Mount, role_url: Callable[[str], str]) -> None:
    mount.keep(DATABASE_URL=role_url("second"), JWT_SECRET=OLD)
    await load.go_on()  # the server does not take it yet
    async with db.acquire() as connection:
        await connection.execute(f"ALTER ROLE {ROLE} PASSWORD 'second'")
        changed_at = await connection.fetchval("SELECT clock_timestamp()")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(role_url("first"))

    async def is_moved() -> bool:
        async with db.acquire() as connection:
            query = "SELECT min(backend_start) > $1 FROM pg_stat_activity WHERE usename = $2"
            return bool(await connection.fetchval(query, changed_at, ROLE))

    await until(is_moved)
    await load.go_on()


async def exchange_the_token_secret(load: Load, mount: Mount, database_url: str) -> None:
    mount.keep(DATABASE_URL=database_url, JWT_SECRET=NEW, JWT_SECRET_PREVIOUS=OLD)
    await until(lambda: accepted(load, Authorization=f"Bearer {token(NEW)}"))
    await load.go_on()  # with tokens of the old secret
    old, load.token = load.token, token(NEW)
    await load.go_on()
    mount.keep(DATABASE_URL=database_url, JWT_SECRET=NEW)
    await until(lambda: refused(load, Authorization=f"Bearer {old}"))
    assert await load.status(Authorization=f"Bearer {token(OLD)}") == 401
    await load.go_on()


async def accepted(load: Load, **headers: str) -> bool:
    return await load.status(**headers) == 200


async def refused(load: Load, **headers: str) -> bool:
    return await load.status(**headers) == 401


async def test_a_password_that_changes_at_the_server_first_is_found_when_it_is_needed(
    fresh_postgres_url: str, role_url: Callable[[str], str]
) -> None:
    kept = ["first"]
    asked: list[str] = []

    async def renew() -> str:
        asked.append(kept[0])
        return role_url(kept[0])

    database = await Database.open(role_url("first"), max_size=2, renew=renew)
    admin = await asyncpg.connect(fresh_postgres_url)
    await admin.execute(f"ALTER ROLE {ROLE} PASSWORD 'second'")
    async with database.acquire():
        kept[0] = "second"
        async with database.acquire() as connection:  # which must be a new one
            assert await connection.fetchval("SELECT current_user") == ROLE
    assert asked == ["second"]
    await admin.close()
    await database.close()
