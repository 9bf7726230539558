"""API keys, one-time sign-in tokens and browser sessions: kinds of one thing, a secret with scopes.

The database holds the SHA-256 of each secret and never the secret. Secrets are 256 random bits, so a plain hash
is enough: there is nothing to guess from. A key that is rotated keeps its id and its limits; its old secret becomes a
row of its own, *retired*, that stands for the key until the grace period ends and keeps that secret from ever being
imported again.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import asyncpg

from overtone.db.audit import record_audit
from overtone.db.database import Database
from overtone.db.queries import query

SCOPES = ("predict", "read", "feedback", "admin")

SESSION_TTL_S = 7 * 86_400.0
"""How long a browser stays signed in, in seconds."""

SYSTEM = "system"
"""The actor of what no person asked for."""

_PREFIXES = {"key": "ovt_", "sign_in": "ovt_in_", "session": "ovt_se_"}
_LIMITS = ("requests_per_minute", "texts_per_minute", "texts_per_day")
_ALIVE = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"
_SELECT_ALIVE = f"""
SELECT CASE k.kind WHEN 'retired' THEN k.parent_id ELSE k.key_id END AS key_id, k.kind, k.name, k.digest AS key_hash,
    k.scopes, k.expires_at, coalesce(k.parent_id, k.key_id) AS account,
    {", ".join(f"coalesce(p.{name}, k.{name}) AS {name}" for name in _LIMITS)}
FROM overtone.api_keys k LEFT JOIN overtone.api_keys p ON p.key_id = k.parent_id AND p.kind = 'key'
WHERE k.kind <> 'sign_in' AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())
"""

Kind = Literal["key", "sign_in", "session"]


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much may be done with a key; None leaves it to the settings, 0 is without limit."""

    requests_per_minute: int | None = None
    texts_per_minute: int | None = None
    texts_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A secret that is valid: of a key, of a key before it was rotated, or of a session."""

    key_id: str
    """Public name of the key or session, safe in logs."""
    kind: Literal["key", "session", "retired"]
    name: str
    key_hash: bytes
    """SHA-256 of the secret, 32 bytes."""
    scopes: frozenset[str]
    expires_at: datetime | None
    account: str
    """What use is counted under: the key, for its sessions too."""
    limits: KeyLimits


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as its owner sees it."""

    key_id: str
    name: str
    scopes: tuple[str, ...]
    state: Literal["active", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    old_secret_until: datetime | None
    """Until when a secret from before the last rotation still works."""
    limits: KeyLimits


def hash_key(secret: str) -> bytes:
    """The SHA-256 by which `secret` is known, 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def new_secret(kind: Kind = "key") -> str:
    """A fresh random secret."""
    return _PREFIXES[kind] + secrets.token_urlsafe(32)


async def create_key(
    db: Database,
    name: str,
    scopes: Sequence[str],
    *,
    expires_at: datetime | None = None,
    limits: KeyLimits | None = None,
    actor: str = SYSTEM,
) -> tuple[str, str]:
    """Make an API key; return (key_id, secret). The secret cannot be read again."""
    secret, key_id = new_secret(), _new_id("key")
    chosen = limits or KeyLimits()
    async with db.transaction() as connection:
        await connection.execute(
            "INSERT INTO overtone.api_keys (key_id, kind, name, digest, scopes, expires_at,"
            " requests_per_minute, texts_per_minute, texts_per_day) VALUES ($1, 'key', $2, $3, $4, $5, $6, $7, $8)",
            key_id,
            name,
            hash_key(secret),
            list(scopes),
            expires_at,
            *(getattr(chosen, limit) for limit in _LIMITS),
        )
        ends = expires_at.isoformat() if expires_at else None
        detail: dict[str, Any] = {"name": name, "scopes": list(scopes), "expires_at": ends, **asdict(chosen)}
        await record_audit(connection, actor, "key.created", key_id, detail)
    return key_id, secret


async def import_key(
    db: Database, name: str, secret: str, scopes: Sequence[str], *, expires_at: datetime | None = None
) -> str:
    """Make `secret` a valid API key and return its key_id.

    A secret that is known is left as it is, whether its key is valid, was revoked or has another secret by now.
    """
    key_id = _new_id("key")
    async with db.transaction() as connection:
        found = await connection.fetchval(
            "INSERT INTO overtone.api_keys AS k (key_id, kind, name, digest, scopes, expires_at)"
            " VALUES ($1, 'key', $2, $3, $4, $5) ON CONFLICT (digest) DO UPDATE SET name = k.name"
            " RETURNING CASE k.kind WHEN 'retired' THEN k.parent_id ELSE k.key_id END",
            key_id,
            name,
            hash_key(secret),
            list(scopes),
            expires_at,
        )
        if found == key_id:
            await record_audit(connection, SYSTEM, "key.imported", key_id, {"name": name, "scopes": list(scopes)})
    return str(found)


async def rotate_key(db: Database, key_id: str, *, grace_s: float, actor: str = SYSTEM) -> str | None:
    """Give the key a new secret and return it; None if there is no such valid key.

    Its old secrets, and the sessions made from it, end `grace_s` seconds from now at the latest.
    """
    secret = new_secret()
    async with db.transaction() as connection:
        old = await connection.fetchrow(
            f"SELECT digest FROM overtone.api_keys WHERE key_id = $1 AND kind = 'key' AND {_ALIVE} FOR UPDATE", key_id
        )
        if old is None:
            return None
        await connection.execute("UPDATE overtone.api_keys SET digest = $2 WHERE key_id = $1", key_id, hash_key(secret))
        await connection.execute(
            "INSERT INTO overtone.api_keys (key_id, kind, name, digest, scopes, parent_id, expires_at)"
            " SELECT $2, 'retired', name, $3, scopes, key_id, expires_at FROM overtone.api_keys WHERE key_id = $1",
            key_id,
            _new_id("retired"),
            old["digest"],
        )
        await connection.execute(
            "UPDATE overtone.api_keys SET expires_at = least(expires_at, now() + make_interval(secs => $2))"
            " WHERE parent_id = $1",
            key_id,
            grace_s,
        )
        await record_audit(connection, actor, "key.rotated", key_id, {"grace_s": grace_s})
    return secret


async def list_keys(db: Database, *, with_ended: bool = False) -> list[KeyInfo]:
    """The API keys, oldest first; with `with_ended` those too that were revoked or have expired."""
    async with db.acquire() as connection:
        rows = await connection.fetch(query("list_keys"), with_ended)
    return [KeyInfo(**{**_with_limits(row), "scopes": tuple(row["scopes"])}) for row in rows]


async def active_keys(db: Database) -> list[KeyRecord]:
    """Every secret that is valid now."""
    async with db.acquire() as connection:
        rows = await connection.fetch(f"{_SELECT_ALIVE} ORDER BY k.created_at")
    return [_record(row) for row in rows]


async def find_key(db: Database, key_hash: bytes) -> KeyRecord | None:
    """The key or session whose secret has this hash, if it is valid now."""
    async with db.acquire() as connection:
        row = await connection.fetchrow(f"{_SELECT_ALIVE} AND k.digest = $1", key_hash)
    return _record(row) if row else None


async def create_sign_in(db: Database, ttl_s: float, *, scopes: Sequence[str] = ("predict", "read")) -> str:
    """Make a one-time token, good for `ttl_s` seconds, that a browser exchanges for a session with `scopes`."""
    token = new_secret("sign_in")
    async with db.transaction() as connection:
        # Tokens and sessions past their time are of no use to anyone; this is where their number would grow.
        await connection.execute(
            "DELETE FROM overtone.api_keys WHERE kind IN ('sign_in', 'session')"
            " AND expires_at < now() - interval '1 day'"
        )
        await connection.execute(
            "INSERT INTO overtone.api_keys (key_id, kind, name, digest, scopes, expires_at)"
            " VALUES ($1, 'sign_in', 'browser', $2, $3, now() + make_interval(secs => $4))",
            _new_id("sign_in"),
            hash_key(token),
            list(scopes),
            ttl_s,
        )
    return token


async def exchange_sign_in(db: Database, token: str, *, ttl_s: float = SESSION_TTL_S) -> str | None:
    """Use up `token` and return the secret of a new session; None if it was used, has expired or never was."""
    secret = new_secret("session")
    async with db.transaction() as connection:
        made = await connection.fetchrow(
            query("exchange_sign_in"), hash_key(token), _new_id("session"), hash_key(secret), ttl_s
        )
        if made:
            await record_audit(connection, made["parent_id"], "session.started", made["key_id"])
    return secret if made else None


async def create_session(
    db: Database, key_id: str, *, ttl_s: float = SESSION_TTL_S, until: datetime | None = None
) -> str | None:
    """The secret of a new session with the scopes of the key `key_id`; None if that key is not valid.

    The session ends no later than its key and than `until`, and is revoked with its key.
    """
    secret, session_id = new_secret("session"), _new_id("session")
    async with db.transaction() as connection:
        made = await connection.fetchval(
            "INSERT INTO overtone.api_keys (key_id, kind, name, digest, scopes, parent_id, expires_at)"
            " SELECT $1, 'session', name, $2, scopes, key_id, least(expires_at, now() + make_interval(secs => $4), $5)"
            f" FROM overtone.api_keys WHERE key_id = $3 AND kind = 'key' AND {_ALIVE} FOR SHARE RETURNING key_id",
            session_id,
            hash_key(secret),
            key_id,
            ttl_s,
            until,
        )
        if made:
            await record_audit(connection, key_id, "session.started", session_id)
    return secret if made else None


async def revoke(db: Database, key_id: str, *, actor: str = SYSTEM) -> bool:
    """End a key or session, and what was made from it, now; whether there was one to end."""
    async with db.transaction() as connection:
        ended = await connection.fetch(
            "UPDATE overtone.api_keys SET revoked_at = now()"
            " WHERE (key_id = $1 OR parent_id = $1) AND revoked_at IS NULL RETURNING key_id, kind",
            key_id,
        )
        kind = next((row["kind"] for row in ended if row["key_id"] == key_id), None)
        if kind is not None:
            action = "session.ended" if kind == "session" else "key.revoked"
            sessions = sum(row["kind"] == "session" and row["key_id"] != key_id for row in ended)
            await record_audit(connection, actor, action, key_id, {"sessions": sessions})
    return bool(ended)


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


def _record(row: asyncpg.Record) -> KeyRecord:
    return KeyRecord(**{**_with_limits(row), "scopes": frozenset(row["scopes"])})


def _with_limits(row: asyncpg.Record) -> dict[str, Any]:
    plain = dict(row)
    limits = KeyLimits(**{name: plain.pop(name) for name in _LIMITS})
    return plain | {"limits": limits}
