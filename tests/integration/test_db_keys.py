"""The life of keys, sign-in tokens and sessions."""

import asyncio
from datetime import UTC, datetime, timedelta

from overtone.db import Database
from overtone.db.keys import (
    active_keys,
    create_key,
    create_session,
    create_sign_in,
    exchange_sign_in,
    find_key,
    hash_key,
    import_key,
    new_secret,
    revoke,
)


async def test_a_key_is_found_by_its_hash_until_revoked(database: Database) -> None:
    key_id, secret = await create_key(database, "ci", ["predict", "read"])
    record = await find_key(database, hash_key(secret))
    assert record
    assert (record.key_id, record.kind, record.name, record.scopes) == (key_id, "key", "ci", {"predict", "read"})
    assert record in await active_keys(database)
    assert await revoke(database, key_id)
    assert not await revoke(database, key_id)
    assert await find_key(database, hash_key(secret)) is None
    assert key_id not in {found.key_id for found in await active_keys(database)}


async def test_no_secret_is_stored(fresh_database: Database) -> None:
    _, secret = await create_key(fresh_database, "ci", ["predict"])
    token = await create_sign_in(fresh_database, 60)
    session = await exchange_sign_in(fresh_database, token)
    async with fresh_database.acquire() as connection:
        stored = str(await connection.fetch("SELECT * FROM overtone.api_keys"))
    assert secret not in stored
    assert token not in stored
    assert str(session) not in stored


async def test_an_expired_key_is_no_key(database: Database) -> None:
    _, secret = await create_key(database, "old", ["predict"], expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert await find_key(database, hash_key(secret)) is None


async def test_importing_a_key_again_changes_nothing(database: Database) -> None:
    secret = new_secret()
    first = await import_key(database, "file", secret, ["predict"])
    assert await import_key(database, "other", secret, ["admin"]) == first
    record = await find_key(database, hash_key(secret))
    assert record
    assert (record.name, record.scopes) == ("file", {"predict"})


async def test_a_sign_in_token_works_once_even_when_used_at_once(database: Database) -> None:
    token = await create_sign_in(database, 60)
    assert await find_key(database, hash_key(token)) is None
    sessions = [
        found for found in await asyncio.gather(*(exchange_sign_in(database, token) for _ in range(8))) if found
    ]
    assert len(sessions) == 1
    record = await find_key(database, hash_key(sessions[0]))
    assert record
    assert (record.kind, record.scopes) == ("session", {"predict", "read"})
    assert record.expires_at
    assert record.expires_at > datetime.now(UTC)


async def test_expired_and_unknown_tokens_are_refused(database: Database) -> None:
    assert await exchange_sign_in(database, await create_sign_in(database, -1)) is None
    assert await exchange_sign_in(database, "never made") is None
    assert await exchange_sign_in(database, "\ud800\x00") is None


async def test_sessions_end_with_their_key(database: Database) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    key_id, _ = await create_key(database, "browser", ["read"], expires_at=soon)
    session = await create_session(database, key_id)
    assert session
    record = await find_key(database, hash_key(session))
    assert record
    assert (record.scopes, record.expires_at) == ({"read"}, soon)
    await revoke(database, key_id)
    assert await find_key(database, hash_key(session)) is None
    assert await create_session(database, key_id) is None


async def test_signing_out_ends_one_session(database: Database) -> None:
    key_id, secret = await create_key(database, "browser", ["read"])
    first, second = await create_session(database, key_id), await create_session(database, key_id)
    assert first
    assert second
    record = await find_key(database, hash_key(first))
    assert record
    await revoke(database, record.key_id)
    assert await find_key(database, hash_key(first)) is None
    assert await find_key(database, hash_key(second))
    assert await find_key(database, hash_key(secret))
