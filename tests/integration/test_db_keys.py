"""The life of keys, sign-in tokens and sessions."""

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from overtone.db import Database
from overtone.db.audit import read_audit, record_audit
from overtone.db.keys import (
    KeyLimits,
    active_keys,
    create_key,
    create_session,
    create_sign_in,
    exchange_sign_in,
    find_key,
    hash_key,
    import_key,
    list_keys,
    new_secret,
    revoke,
    rotate_key,
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


async def test_a_rotated_key_keeps_its_old_secret_for_the_grace_period(database: Database) -> None:
    limits = KeyLimits(requests_per_minute=5, texts_per_day=0)
    key_id, old = await create_key(database, "turning", ["predict"], limits=limits)
    new = await rotate_key(database, key_id, grace_s=3600)
    assert new
    records = [await find_key(database, hash_key(secret)) for secret in (old, new)]
    assert all(record and record.key_id == record.account == key_id and record.limits == limits for record in records)
    assert records[0]
    assert records[0].expires_at
    [info] = [found for found in await list_keys(database) if found.key_id == key_id]
    assert info.old_secret_until == records[0].expires_at
    assert {found.key_hash for found in await active_keys(database) if found.key_id == key_id} == {
        hash_key(old),
        hash_key(new),
    }
    await revoke(database, key_id)
    assert [await find_key(database, hash_key(secret)) for secret in (old, new)] == [None, None]


async def test_without_grace_every_old_secret_and_session_ends_at_once(database: Database) -> None:
    key_id, first = await create_key(database, "leaked", ["read"])
    session = await create_session(database, key_id)
    second = await rotate_key(database, key_id, grace_s=3600)
    third = await rotate_key(database, key_id, grace_s=0)
    assert session
    assert second
    assert third
    assert [bool(await find_key(database, hash_key(each))) for each in (first, second, third, session)] == [
        False,
        False,
        True,
        False,
    ]


async def test_a_secret_from_before_a_rotation_cannot_be_imported_again(database: Database) -> None:
    key_id, old = await create_key(database, "file", ["read"])
    await rotate_key(database, key_id, grace_s=0)
    assert await import_key(database, "file", old, ["admin"]) == key_id
    assert await find_key(database, hash_key(old)) is None


async def test_only_valid_keys_are_rotated(database: Database) -> None:
    key_id, _ = await create_key(database, "gone", ["read"])
    await revoke(database, key_id)
    assert await rotate_key(database, key_id, grace_s=0) is None
    assert await rotate_key(database, "key_none", grace_s=0) is None


async def test_a_session_counts_under_its_key_and_has_its_limits(database: Database) -> None:
    limits = KeyLimits(texts_per_minute=7)
    key_id, _ = await create_key(database, "browser", ["read"], limits=limits)
    until = datetime.now(UTC) + timedelta(minutes=5)
    session = await create_session(database, key_id, until=until)
    assert session
    record = await find_key(database, hash_key(session))
    assert record
    assert (record.account, record.limits, record.expires_at) == (key_id, limits, until)
    assert record.key_id != key_id


async def test_a_limit_is_not_below_zero(database: Database) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await create_key(database, "wrong", ["read"], limits=KeyLimits(requests_per_minute=-1))


async def test_ended_keys_are_listed_on_request(fresh_database: Database) -> None:
    active, _ = await create_key(fresh_database, "a", ["read"])
    revoked, _ = await create_key(fresh_database, "b", ["read"])
    await revoke(fresh_database, revoked)
    past = datetime.now(UTC) - timedelta(seconds=1)
    expired, _ = await create_key(fresh_database, "c", ["read"], expires_at=past)
    assert [info.key_id for info in await list_keys(fresh_database)] == [active]
    states = {info.key_id: info.state for info in await list_keys(fresh_database, with_ended=True)}
    assert states == {active: "active", revoked: "revoked", expired: "expired"}


async def test_the_life_of_a_key_is_in_the_audit_log_without_its_secrets(fresh_database: Database) -> None:
    key_id, first = await create_key(fresh_database, "ci", ["predict"], actor="cli:ann")
    second = await rotate_key(fresh_database, key_id, grace_s=60, actor="cli:ann")
    session = await create_session(fresh_database, key_id)
    assert session
    record = await find_key(fresh_database, hash_key(session))
    assert record
    await revoke(fresh_database, record.key_id, actor=record.key_id)
    await revoke(fresh_database, key_id, actor="cli:bob")
    entries = await read_audit(fresh_database)
    assert [(entry.actor, entry.action, entry.subject) for entry in reversed(entries)] == [
        ("cli:ann", "key.created", key_id),
        ("cli:ann", "key.rotated", key_id),
        (key_id, "session.started", record.key_id),
        (record.key_id, "session.ended", record.key_id),
        ("cli:bob", "key.revoked", key_id),
    ]
    told = str(entries)
    assert not any(secret in told for secret in (first, str(second), session))
    assert [entry.action for entry in await read_audit(fresh_database, action="session.", newest=1)] == [
        "session.ended"
    ]
    assert len(await read_audit(fresh_database, action="key.created")) == 1


async def test_an_entry_of_the_audit_log_is_small(database: Database) -> None:
    async with database.transaction() as connection:
        with pytest.raises(ValueError, match="4096"):
            await record_audit(connection, "cli:ann", "model.promoted", "v1", {"note": "x" * 5000})
