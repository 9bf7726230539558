"""Who may call, and how much: API keys and browser sessions, known by the SHA-256 of their secret, and tokens.

The keys are read from a store in the background and kept in memory, so that checking one costs a hash and a look-up,
and a database that is away stops nobody who was known before. Comparing digests instead of secrets leaves nothing to
learn from how long an answer takes.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Protocol

from fastapi import Request
from starlette.types import Scope

from overtone.errors import ForbiddenError, OverloadedError, OvertoneError, UnauthorizedError
from overtone.logging import get_logger
from serve.quotas import Allowance, Quotas

SESSION_COOKIE = "overtone_session"
_MAX_UNKNOWN = 4096
_MAX_LOOKUPS = 64
_LIMITED = "overtone.limited"


@dataclass(frozen=True, slots=True)
class Identity:
    """A known caller."""

    key_id: str
    scopes: frozenset[str]
    expires_at: datetime | None = None
    account: str = ""
    """What use is counted under; empty for `key_id`."""
    allowance: Allowance | None = None
    """How much may be used; None for no limit."""
    is_session: bool = False
    """Whether it is a browser session, which may end itself."""


class KeyStore(Protocol):
    """Where keys are kept."""

    async def active(self) -> Mapping[bytes, Identity]:
        """Every key and session in force, by digest."""
        ...

    async def find(self, digest: bytes) -> Identity | None:
        """The key or session in force with `digest`."""
        ...


class Tokens(Protocol):
    """What checks JSON Web Tokens."""

    async def check(self, token: str) -> Identity:
        """The caller that `token` speaks for."""
        ...

    async def keep_fresh(self) -> None:
        """Keep what tokens are checked with fresh for as long as the task runs."""
        ...


class KeyRing:
    """The keys in force, as they were when the store was last reached."""

    def __init__(
        self,
        store: KeyStore,
        *,
        refresh_s: float = 5.0,
        unknown_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A revoked key stops working, and an unknown one may be asked for again, within the seconds given."""
        self._store = store
        self._refresh_s = refresh_s
        self._unknown_s = unknown_s
        self._clock = clock
        self._known: Mapping[bytes, Identity] = {}
        self._unknown: dict[bytes, float] = {}
        self._lookups: dict[bytes, asyncio.Task[Identity | None]] = {}
        self._is_reached = True

    async def check(self, secret: str | None, scope: str) -> Identity:
        """The caller with `secret`, who must have `scope`.

        Raises:
            UnauthorizedError: no secret, or one that nobody has.
            ForbiddenError: the caller is known but lacks `scope`.
            DatabaseUnavailableError: the secret is not in memory and the store cannot be asked.
            OverloadedError: too many unknown secrets are being asked for at once.
        """
        if not secret:
            raise UnauthorizedError("An API key is needed.")
        digest = _digest(secret)
        identity = self._known.get(digest)
        if identity is None:
            identity = await self._look_up(digest)
        if identity is None or (identity.expires_at is not None and identity.expires_at <= datetime.now(UTC)):
            raise UnauthorizedError("The API key is not known, was revoked or has expired.")
        return _allowed(identity, scope)

    def knows(self, secret: str) -> bool:
        """Whether `secret` was in force when the store was last reached."""
        return _digest(secret) in self._known

    async def refresh(self) -> bool:
        """Read all keys again; whether the store could be reached."""
        try:
            self._known = dict(await self._store.active())
        except OvertoneError as error:
            if self._is_reached:
                get_logger().warning("keys.refresh_failed", code=error.code, known=len(self._known))
            self._is_reached = False
            return False
        if not self._is_reached:
            get_logger().info("keys.refreshed", known=len(self._known))
        self._is_reached = True
        return True

    async def keep_fresh(self) -> None:
        """Refresh for as long as the task runs."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_s)

    async def _look_up(self, digest: bytes) -> Identity | None:
        """Ask the store, once for all who ask at the same time, and not again soon for what it does not know."""
        if self._unknown.get(digest, 0.0) > self._clock():
            return None
        task = self._lookups.get(digest)
        if task is None:
            if len(self._lookups) >= _MAX_LOOKUPS:
                raise OverloadedError("Too many unknown API keys are being checked.", retry_after_s=1.0)
            task = asyncio.get_running_loop().create_task(self._store.find(digest))
            self._lookups[digest] = task
            task.add_done_callback(lambda _: self._lookups.pop(digest, None))
        identity = await asyncio.shield(task)
        if identity is None:
            self._remember_unknown(digest)
        else:
            self._known = {**self._known, digest: identity}
        return identity

    def _remember_unknown(self, digest: bytes) -> None:
        now = self._clock()
        if len(self._unknown) >= _MAX_UNKNOWN:
            self._unknown = {key: until for key, until in self._unknown.items() if until > now}
            if len(self._unknown) >= _MAX_UNKNOWN:
                self._unknown.clear()
        self._unknown[digest] = now + self._unknown_s


class Gate:
    """Whether a request may pass."""

    def __init__(
        self,
        keys: KeyRing,
        *,
        api_key_header: str = "X-API-Key",
        tokens: Tokens | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        """`api_key_header` names the header that carries a key; a bearer token and the session cookie do too.

        Without `tokens` no JSON Web Token is taken.
        """
        self.keys = keys
        self.api_key_header = api_key_header
        self.quotas = quotas or Quotas()
        self._tokens = tokens
        self._key_header = api_key_header.lower().encode("latin-1")

    async def authorise(self, request: Request, scope: str) -> Identity:
        """The caller of `request`, who must have `scope`.

        Raises:
            UnauthorizedError, ForbiddenError, DatabaseUnavailableError, OverloadedError: see `KeyRing.check`.
            UnavailableError: the keys that check tokens have never been fetched.
        """
        secret = self._secret(request)
        if self._tokens is not None and secret is not None and secret.count(".") == 2:
            identity = _allowed(await self._tokens.check(secret), scope)
        else:
            identity = await self.keys.check(secret, scope)
        if identity.allowance is not None:
            request.scope[_LIMITED] = identity
        return identity

    async def spend(self, identity: Identity, texts: int) -> None:
        """Count a request of `texts` texts against the limits of `identity`; 0 for one that classifies nothing.

        Raises:
            QuotaExceededError: a limit is used up; it says for how long.
            TooLargeError: the request alone is over a limit.
        """
        if identity.allowance is not None:
            await self.quotas.spend(identity.account or identity.key_id, identity.allowance, texts)

    def limit_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What tells the caller of an authorised request about the limits; empty for one without."""
        identity: Identity | None = scope.get(_LIMITED)
        if identity is None or identity.allowance is None:
            return []
        return self.quotas.headers(identity.account or identity.key_id, identity.allowance)

    async def keep_fresh(self) -> None:
        """Keep keys fresh for as long as the task runs."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.keys.keep_fresh())
            if self._tokens is not None:
                group.create_task(self._tokens.keep_fresh())

    def _secret(self, request: Request) -> str | None:
        """The secret a request carries: the key header wins over a bearer token, and that over the cookie."""
        bearer = None
        has_cookie = False
        for name, value in request.scope["headers"]:
            if name == self._key_header:
                return str(value, "latin-1")
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                bearer = str(value[7:], "latin-1").strip()
            elif name == b"cookie":
                has_cookie = True
        return bearer or (request.cookies.get(SESSION_COOKIE) if has_cookie else None)


def _allowed(identity: Identity, scope: str) -> Identity:
    if scope not in identity.scopes and "admin" not in identity.scopes:
        raise ForbiddenError(f"The API key does not have the scope {scope!r}.", scope=scope)
    return identity


def _digest(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogateescape")).digest()
