"""API keys, one-time sign-in tokens and browser sessions: three kinds of one thing, a secret with scopes.

The database holds the SHA-256 of each secret and never the secret. Secrets are 256 random bits, so a plain hash
is enough: there is nothing to guess from.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import asyncpg

from overtone.db.database import Database
from overtone.db.queries import query

SCOPES = ("predict", "read", "admin")

SESSION_TTL_S = 7 * 86_400.0
"""How long a browser stays signed in, in seconds."""

_PREFIXES = {"key": "ovt_", "sign_in": "ovt_in_", "session": "ovt_se_"}
_FIELDS = "key_id, kind, name, digest AS key_hash, scopes, expires_at"
_ALIVE = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"

Kind = Literal["key", "sign_in", "session"]


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key or session that is valid."""

    key_id: str
    """Public name, safe in logs."""
    kind: Literal["key", "session"]
    name: str
    key_hash: bytes
    """SHA-256 of the secret, 32 bytes."""
    scopes: frozenset[str]
    expires_at: datetime | None


def hash_key(secret: str) -> bytes:
    """The SHA-256 by which `secret` is known, 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def new_secret(kind: Kind = "key") -> str:
    """A fresh random secret."""
    return _PREFIXES[kind] + secrets.token_urlsafe(32)


async def create_key(
    db: Database, name: str, scopes: Sequence[str], *, expires_at: datetime | None = None
) -> tuple[str, str]:
    """Make an API key; return (key_id, secret). The secret cannot be read again."""
    secret = new_secret()
    key_id = await import_key(db, name, secret, scopes, expires_at=expires_at)
    return key_id, secret


async def import_key(
    db: Database, name: str, secret: str, scopes: Sequence[str], *, expires_at: datetime | None = None
) -> str:
    """Make `secret` a valid API key and return its key_id; one that is known already is left as it is."""
    async with db.transaction() as connection:
        return str(
            await connection.fetchval(
                "INSERT INTO overtone.api_keys AS k (key_id, kind, name, digest, scopes, expires_at)"
                " VALUES ($1, 'key', $2, $3, $4, $5)"
                " ON CONFLICT (digest) DO UPDATE SET name = k.name RETURNING key_id",
                _new_id("key"),
                name,
                hash_key(secret),
                list(scopes),
                expires_at,
            )
        )


async def active_keys(db: Database) -> list[KeyRecord]:
    """Every key and session that is valid now."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            f"SELECT {_FIELDS} FROM overtone.api_keys WHERE kind IN ('key', 'session') AND {_ALIVE} ORDER BY created_at"
        )
    return [_record(row) for row in rows]


async def find_key(db: Database, key_hash: bytes) -> KeyRecord | None:
    """The key or session with this hash, if it is valid now."""
    async with db.acquire() as connection:
        row = await connection.fetchrow(
            f"SELECT {_FIELDS} FROM overtone.api_keys WHERE digest = $1 AND kind IN ('key', 'session') AND {_ALIVE}",
            key_hash,
        )
    return _record(row) if row else None


async def create_sign_in(db: Database, ttl_s: float, *, scopes: Sequence[str] = ("predict", "read")) -> str:
    """Make a one-time token, good for `ttl_s` seconds, that a browser exchanges for a session with `scopes`."""
    token = new_secret("sign_in")
    async with db.transaction() as connection:
        # Tokens and sessions past their time are of no use to anyone; this is where their number would grow.
        await connection.execute(
            "DELETE FROM overtone.api_keys WHERE kind <> 'key' AND expires_at < now() - interval '1 day'"
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
        made = await connection.fetchval(
            query("exchange_sign_in"), hash_key(token), _new_id("session"), hash_key(secret), ttl_s
        )
    return secret if made else None


async def create_session(db: Database, key_id: str, *, ttl_s: float = SESSION_TTL_S) -> str | None:
    """The secret of a new session with the scopes of the key `key_id`; None if that key is not valid.

    The session ends no later than its key and is revoked with it.
    """
    secret = new_secret("session")
    async with db.transaction() as connection:
        made = await connection.fetchval(
            "INSERT INTO overtone.api_keys (key_id, kind, name, digest, scopes, parent_id, expires_at)"
            " SELECT $1, 'session', name, $2, scopes, key_id, least(expires_at, now() + make_interval(secs => $4))"
            f" FROM overtone.api_keys WHERE key_id = $3 AND kind = 'key' AND {_ALIVE} FOR SHARE RETURNING key_id",
            _new_id("session"),
            hash_key(secret),
            key_id,
            ttl_s,
        )
    return secret if made else None


async def revoke(db: Database, key_id: str) -> bool:
    """End a key or session, and the sessions made from it, now; whether there was one to end."""
    async with db.transaction() as connection:
        ended = await connection.fetch(
            "UPDATE overtone.api_keys SET revoked_at = now()"
            " WHERE (key_id = $1 OR parent_id = $1) AND revoked_at IS NULL RETURNING key_id",
            key_id,
        )
    return bool(ended)


def _new_id(kind: Kind) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


def _record(row: asyncpg.Record) -> KeyRecord:
    return KeyRecord(**{**row, "scopes": frozenset(row["scopes"])})
