"""Callers known by a JSON Web Token: signed by an identity provider whose public keys are fetched, or by a secret.

The signature a token names is never trusted to choose how it is checked: secrets only ever check HMAC signatures, keys
of the provider only those of their own kind, and keys of the provider that are secrets are left out. A token that was
found good is remembered by its digest until it ends, so that the next request with it costs a look-up.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import httpx
import jwt
import orjson

from overtone.db.keys import SCOPES
from overtone.errors import UnauthorizedError, UnavailableError
from overtone.logging import get_logger
from overtone.settings import Settings
from serve.auth import Identity
from serve.quotas import Allowance

MAX_TOKEN_CHARS = 8192
_MAX_SUBJECT_CHARS = 256
_MAX_KNOWN = 10_000
_MAX_KEY_SET_BYTES = 1024 * 1024
_MAX_KEYS = 100
_MIN_RSA_BITS = 2048
_RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES = {"P-256": frozenset({"ES256"}), "P-384": frozenset({"ES384"}), "P-521": frozenset({"ES512"})}
_REFUSED = "The token is not valid or has expired."


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key of the provider, and the signatures it may check."""

    key: Any
    algorithms: frozenset[str]


class KeySet:
    """The public keys of an identity provider, as they were when it last answered."""

    def __init__(
        self,
        url: str,
        *,
        refresh_s: float = 300.0,
        unknown_s: float = 30.0,
        client: httpx.AsyncClient | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A key that is not known makes it ask again, at most once in `unknown_s`, whoever sends such tokens."""
        self._url = url
        self._refresh_s = refresh_s
        self._unknown_s = unknown_s
        self._client = client or httpx.AsyncClient(timeout=5.0, trust_env=False)
        self._clock = clock
        self._keys: Mapping[str | None, PublicKey] | None = None
        self._asked_at = -float("inf")
        self._asking: asyncio.Task[None] | None = None

    async def find(self, key_id: str | None) -> PublicKey | None:
        """The key with this id; without an id the only key there is.

        Raises:
            UnavailableError: the provider has not answered yet.
        """
        found = self._known(key_id)
        if found is None and (self._asking is not None or self._clock() - self._asked_at >= self._unknown_s):
            await self.refresh()
            found = self._known(key_id)
        if found is None and self._keys is None:
            raise UnavailableError("The keys that sign tokens cannot be fetched now.")
        return found

    async def refresh(self) -> None:
        """Ask the provider again, once for all who wait; its old keys stay if it does not answer."""
        if self._asking is None:
            self._asked_at = self._clock()
            self._asking = asyncio.get_running_loop().create_task(self._ask())
            self._asking.add_done_callback(lambda _: setattr(self, "_asking", None))
        await asyncio.shield(self._asking)

    async def keep_fresh(self) -> None:
        """Refresh for as long as the task runs; sooner while the provider has never answered."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_s if self._keys is not None else min(5.0, self._refresh_s))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _known(self, key_id: str | None) -> PublicKey | None:
        keys = self._keys or {}
        if key_id is None and len(keys) == 1:
            return next(iter(keys.values()))
        return keys.get(key_id)

    async def _ask(self) -> None:
        try:
            async with self._client.stream("GET", self._url, follow_redirects=False) as response:
                response.raise_for_status()
                body = b""
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _MAX_KEY_SET_BYTES:
                        raise ValueError("too large")
            self._keys = _usable_keys(body)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError, AttributeError, jwt.PyJWTError) as error:
            known = len(self._keys or ())
            get_logger().warning("tokens.keys_not_fetched", reason=type(error).__name__, known=known)


class Tokens:
    """Finds out who sends a token."""

    def __init__(self, settings: Settings, *, keys: KeySet | None = None, allowance: Allowance | None = None) -> None:
        """`keys` are needed for tokens not signed by the secret of the settings; `allowance` limits each subject."""
        self._settings = settings
        self._secrets = _secrets(settings)
        self._keys = keys
        self._allowance = allowance
        self._known: dict[bytes, Identity] = {}

    async def check(self, token: str) -> Identity:
        """The caller `token` speaks for.

        Raises:
            UnauthorizedError: it is malformed, not signed by whom it should be, for someone else, or has ended.
            UnavailableError: the keys to check it with have never been fetched.
        """
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        identity = self._known.get(digest)
        if identity is None:
            identity = await self._verify(token)
            self._remember(digest, identity)
        if identity.expires_at is not None and identity.expires_at <= datetime.now(UTC):
            self._known.pop(digest, None)
            raise UnauthorizedError(_REFUSED)
        return identity

    async def use_secrets(self, settings: Settings) -> None:
        """Take what the secrets of `settings` have signed, and what no other secret has, from now on."""
        self._secrets = _secrets(settings)
        self._known = {}

    async def keep_fresh(self) -> None:
        """Keep the provider's keys fresh for as long as the task runs."""
        if self._keys is not None:
            await self._keys.keep_fresh()

    async def close(self) -> None:
        """Close the connections."""
        if self._keys is not None:
            await self._keys.close()

    async def _verify(self, token: str) -> Identity:
        settings = self._settings
        try:
            if len(token) > MAX_TOKEN_CHARS:
                raise jwt.InvalidTokenError
            header = jwt.get_unverified_header(token)
            algorithm = header.get("alg")
            if algorithm not in settings.jwt_algorithms or "crit" in header:
                raise jwt.InvalidTokenError
            claims = self._claims(token, algorithm, await self._keys_for(algorithm, header.get("kid")))
            return _identity(claims, settings, self._allowance)
        except (jwt.PyJWTError, ValueError, OverflowError, RecursionError):
            raise UnauthorizedError(_REFUSED) from None

    def _claims(self, token: str, algorithm: str, keys: Sequence[Any]) -> dict[str, Any]:
        """What `token` says, if one of `keys` has signed it and it is for us and in force."""
        settings = self._settings
        for key in keys:
            with suppress(jwt.InvalidSignatureError):
                return jwt.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    issuer=settings.jwt_issuer,
                    audience=settings.jwt_audience,
                    leeway=settings.jwt_leeway_s,
                    options={"require": _required(settings), "verify_aud": settings.jwt_audience is not None},
                )
        raise jwt.InvalidSignatureError

    async def _keys_for(self, algorithm: str, key_id: str | None) -> Sequence[Any]:
        """What may have made a signature by `algorithm`: the secrets, as bytes, or a public key of that kind."""
        if algorithm.startswith("HS"):
            return self._secrets
        key = await self._keys.find(key_id) if self._keys is not None else None
        if key is None or algorithm not in key.algorithms:
            raise jwt.InvalidKeyError
        return [key.key]

    def _remember(self, digest: bytes, identity: Identity) -> None:
        if len(self._known) >= _MAX_KNOWN:
            now = datetime.now(UTC)
            self._known = {key: found for key, found in self._known.items() if (found.expires_at or now) > now}
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
        self._known[digest] = identity


def open_tokens(settings: Settings, allowance: Allowance | None) -> Tokens | None:
    """What checks tokens as `settings` say; None if they name neither a secret nor a provider."""
    if not _secrets(settings) and settings.jwt_jwks_url is None:
        return None
    keys = KeySet(settings.jwt_jwks_url) if settings.jwt_jwks_url else None
    return Tokens(settings, keys=keys, allowance=allowance)


def _secrets(settings: Settings) -> tuple[bytes, ...]:
    """The secrets that may have signed a token, the newer one first."""
    found = (settings.jwt_secret, settings.jwt_secret_previous)
    return tuple(secret.get_secret_value().encode() for secret in found if secret is not None)


def _usable_keys(body: bytes) -> Mapping[str | None, PublicKey]:
    """The public signing keys of a key set, by id. Those of other kinds are left out.

    Raises:
        ValueError: `body` is no key set, or holds no key that can be used.
    """
    listed = orjson.loads(body)["keys"]
    if not isinstance(listed, list):
        raise ValueError("no list of keys")
    found: dict[str | None, PublicKey] = {}
    for item in listed[:_MAX_KEYS]:
        key = _public_key(item) if isinstance(item, dict) else None
        if key is not None and isinstance(item.get("kid"), str | None):
            found[item.get("kid")] = key
    if not found:
        raise ValueError("no usable key")
    return found


def _public_key(item: Mapping[str, Any]) -> PublicKey | None:
    """The key that `item` describes; None unless it is a public RSA or EC key for signatures."""
    algorithms = _RSA_ALGORITHMS if item.get("kty") == "RSA" else _CURVES.get(str(item.get("crv")), frozenset())
    named = item.get("alg")
    if named is not None:
        algorithms &= {named}
    if item.get("kty") not in {"RSA", "EC"} or item.get("use", "sig") != "sig" or not algorithms:
        return None
    try:
        # Without its private part: nothing here has a use for one that was published by mistake.
        key = jwt.PyJWK({name: value for name, value in item.items() if name != "d"}).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    is_weak = item["kty"] == "RSA" and key.key_size < _MIN_RSA_BITS
    return None if is_weak else PublicKey(key, algorithms)


def _required(settings: Settings) -> list[str]:
    return ["exp", "sub", *(["iss"] if settings.jwt_issuer else []), *(["aud"] if settings.jwt_audience else [])]


def _identity(claims: Mapping[str, Any], settings: Settings, allowance: Allowance | None) -> Identity:
    subject = claims["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT_CHARS:
        raise jwt.InvalidTokenError
    given = claims.get(settings.jwt_scope_claim, "")
    words = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    scopes = frozenset(word for word in words if isinstance(word, str)) & frozenset(SCOPES)
    ends = datetime.fromtimestamp(float(claims["exp"]) + settings.jwt_leeway_s, UTC)
    name = f"jwt:{subject}"
    return Identity(name, scopes, ends, name, allowance)
