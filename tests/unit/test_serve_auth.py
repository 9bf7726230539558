"""Keys in memory: what is asked of the store, and when."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest

from overtone.errors import DatabaseUnavailableError, ForbiddenError, OverloadedError, UnauthorizedError
from serve.auth import Identity, KeyRing


def digest(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


class Store:
    """Keys in memory, every look-up written down."""

    def __init__(self, **secrets: Identity) -> None:
        self.keys = {digest(secret): identity for secret, identity in secrets.items()}
        self.looked_up: list[bytes] = []
        self.is_down = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def active(self) -> Mapping[bytes, Identity]:
        if self.is_down:
            raise DatabaseUnavailableError
        return dict(self.keys)

    async def find(self, digest: bytes) -> Identity | None:
        self.looked_up.append(digest)
        await self.gate.wait()
        if self.is_down:
            raise DatabaseUnavailableError
        return self.keys.get(digest)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


READER = Identity("key_1", frozenset({"read"}))


async def test_a_known_key_costs_no_look_up() -> None:
    store = Store(known=READER)
    ring = KeyRing(store)
    await ring.refresh()

    assert await ring.check("known", "read") == READER
    assert store.looked_up == []


async def test_a_key_made_since_is_looked_up_once_and_remembered() -> None:
    store = Store(new=READER)
    ring = KeyRing(store)
    store.gate.clear()
    checks = [asyncio.create_task(ring.check("new", "read")) for _ in range(5)]
    await asyncio.sleep(0)
    store.gate.set()

    assert await asyncio.gather(*checks) == [READER] * 5
    assert await ring.check("new", "read") == READER
    assert store.looked_up == [digest("new")]


async def test_an_unknown_key_is_not_asked_for_again_at_once() -> None:
    store, clock = Store(), Clock()
    ring = KeyRing(store, unknown_s=5, clock=clock)
    for _ in range(3):
        with pytest.raises(UnauthorizedError):
            await ring.check("unknown", "read")
    assert len(store.looked_up) == 1

    clock.now = 5.1
    store.keys[digest("unknown")] = READER
    assert await ring.check("unknown", "read") == READER


async def test_a_flood_of_unknown_keys_is_bounded() -> None:
    store = Store()
    ring = KeyRing(store)
    store.gate.clear()
    flood = [asyncio.create_task(ring.check(f"guess{number}", "read")) for number in range(200)]
    await asyncio.sleep(0)
    store.gate.set()
    outcomes = await asyncio.gather(*flood, return_exceptions=True)

    assert len(store.looked_up) == 64
    assert {type(outcome) for outcome in outcomes} == {UnauthorizedError, OverloadedError}


@pytest.mark.parametrize("secret", [None, ""])
async def test_no_key_is_unauthorized(secret: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        await KeyRing(Store()).check(secret, "read")


async def test_scopes_are_kept_apart_and_admin_has_all() -> None:
    ring = KeyRing(Store(reader=READER, admin=Identity("key_2", frozenset({"admin"}))))
    with pytest.raises(ForbiddenError):
        await ring.check("reader", "predict")

    assert (await ring.check("admin", "predict")).key_id == "key_2"


async def test_an_expired_key_is_unauthorized_even_from_memory() -> None:
    ring = KeyRing(Store(old=Identity("key_1", frozenset({"read"}), datetime.now(UTC) - timedelta(seconds=1))))
    await ring.refresh()

    with pytest.raises(UnauthorizedError):
        await ring.check("old", "read")


async def test_a_store_that_is_away_leaves_what_is_known() -> None:
    store = Store(known=READER)
    ring = KeyRing(store)
    assert await ring.refresh()
    store.is_down = True
    assert not await ring.refresh()

    assert await ring.check("known", "read") == READER
    with pytest.raises(DatabaseUnavailableError):
        await ring.check("unknown", "read")


async def test_a_revoked_key_ends_with_the_next_refresh() -> None:
    store = Store(known=READER)
    ring = KeyRing(store)
    await ring.refresh()
    store.keys.clear()
    await ring.refresh()

    with pytest.raises(UnauthorizedError):
        await ring.check("known", "read")


async def test_it_keeps_fresh_in_the_background() -> None:
    store = Store()
    ring = KeyRing(store, refresh_s=0.001, unknown_s=0.0)
    task = asyncio.create_task(ring.keep_fresh())
    store.keys[digest("late")] = READER
    async with asyncio.timeout(5):
        while not ring.knows("late"):  # noqa: ASYNC110  (what is waited for is state of the code under test)
            await asyncio.sleep(0.001)
    task.cancel()

    assert store.looked_up == []
