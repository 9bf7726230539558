"""JSON Web Tokens: whose are taken, and that nothing about a token chooses how it is checked."""

import asyncio
import json
import time
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.warnings import InsecureKeyLengthWarning

from overtone.errors import UnauthorizedError, UnavailableError
from overtone.settings import Settings
from serve.quotas import Allowance
from serve.tokens import KeySet, Tokens, open_tokens

ISSUER, AUDIENCE, URL = "https://id.example", "overtone", "https://id.example/keys"
SECRET = "a secret that is long enough for every algorithm there is, also for the longest"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_KEY = ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, **fields: str) -> dict[str, Any]:
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), **fields}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Provider:
    """An identity provider that publishes keys."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.asked = 0
        self.is_down = False
        self.clock = Clock()
        client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        self.key_set = KeySet(URL, client=client, clock=self.clock, unknown_s=30)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        return httpx.Response(503) if self.is_down else httpx.Response(200, json={"keys": self.keys})


@pytest.fixture
def provider() -> Provider:
    return Provider(jwk(RSA_KEY, kid="rsa"), jwk(EC_KEY, kid="ec"))


def settings(**options: Any) -> Settings:
    given = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_jwks_url": URL, "jwt_secret": SECRET} | options
    return Settings(_env_file=None, **given)


def token(
    key: Any, algorithm: str, kid: str | None = None, *, headers: dict[str, Any] | None = None, **claims: Any
) -> str:
    body = {"sub": "ann", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600, "scope": "predict other"} | claims
    chosen = {name: value for name, value in body.items() if value is not None}
    return jwt.encode(chosen, key, algorithm, headers={**({"kid": kid} if kid else {}), **(headers or {})})


@pytest.mark.parametrize(
    "good",
    [
        token(RSA_KEY, "RS256", "rsa"),
        token(EC_KEY, "ES256", "ec"),
        token(SECRET, "HS256"),
        token(SECRET, "HS256", aud=["else", AUDIENCE]),
        token(SECRET, "HS256", scope=["predict", 3]),
    ],
)
async def test_a_good_token_is_an_identity(provider: Provider, good: str) -> None:
    allowance = Allowance(texts_per_day=5)
    identity = await Tokens(settings(), keys=provider.key_set, allowance=allowance).check(good)
    assert (identity.key_id, identity.account, identity.scopes) == ("jwt:ann", "jwt:ann", {"predict"})
    assert identity.allowance == allowance


PUBLIC_PEM = RSA_KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def forged_with_public_key() -> str:
    """What a server that lets the token choose would take: HMAC with the provider's public key as secret."""
    import base64
    import hashlib
    import hmac

    def part(value: dict[str, Any]) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    body = {"sub": "eve", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600, "scope": "admin"}
    signed = part({"alg": "HS256", "kid": "rsa"}) + b"." + part(body)
    signature = hmac.new(PUBLIC_PEM, signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "a.b.c",
        "x" * 9000 + ".b.c",
        jwt.encode({"sub": "ann", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600}, None, "none"),
        forged_with_public_key(),
        token(OTHER_KEY, "ES256", "ec"),
        token(EC_KEY, "ES256", "rsa"),
        token(RSA_KEY, "RS384", "rsa"),
        token(RSA_KEY, "PS256", "rsa"),
        token(SECRET + "x", "HS256"),
        token(SECRET, "HS512"),
        token(SECRET, "HS256", exp=None),
        token(SECRET, "HS256", exp=time.time() - 60),
        token(SECRET, "HS256", exp=10**30),
        token(SECRET, "HS256", nbf=time.time() + 600),
        token(SECRET, "HS256", iss="https://evil.example"),
        token(SECRET, "HS256", iss=None),
        token(SECRET, "HS256", aud="else"),
        token(SECRET, "HS256", aud=None),
        token(SECRET, "HS256", sub=None),
        token(SECRET, "HS256", sub=""),
        token(SECRET, "HS256", sub="x" * 257),
        token(SECRET, "HS256", headers={"crit": ["b64"]}),
    ],
)
async def test_a_bad_token_is_refused_in_the_same_words(provider: Provider, bad: str) -> None:
    with pytest.raises(UnauthorizedError, match="not valid or has expired"):
        await Tokens(settings(), keys=provider.key_set).check(bad)


async def test_without_a_secret_none_is_taken(provider: Provider) -> None:
    with pytest.raises(UnauthorizedError):
        await Tokens(settings(jwt_secret=None), keys=provider.key_set).check(token(SECRET, "HS256"))


async def test_keys_that_are_secrets_private_weak_or_for_other_uses_are_left_out() -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    provider = Provider(
        {"kty": "oct", "k": "c2VjcmV0", "kid": "oct"},
        jwk(EC_KEY, kid="enc", use="enc"),
        jwk(weak, kid="weak"),
        jwk(RSA_KEY, kid="named", alg="PS256"),
        {"kty": "EC", "crv": "P-256", "kid": "broken", "x": "!", "y": "?"},
    )
    tokens = Tokens(settings(), keys=provider.key_set)
    with pytest.warns(InsecureKeyLengthWarning):
        weakly_signed = token(weak, "RS256", "weak")
    for bad in (token(EC_KEY, "ES256", "enc"), weakly_signed, token(RSA_KEY, "RS256", "named")):
        with pytest.raises(UnauthorizedError):
            await tokens.check(bad)


async def test_a_known_token_asks_nobody(provider: Provider) -> None:
    tokens = Tokens(settings(), keys=provider.key_set)
    good = token(EC_KEY, "ES256", "ec")
    first = await tokens.check(good)
    provider.is_down = True
    assert await tokens.check(good) is first
    assert provider.asked == 1


async def test_unknown_keys_make_it_ask_again_but_not_often(provider: Provider) -> None:
    tokens = Tokens(settings(), keys=provider.key_set)
    await tokens.check(token(EC_KEY, "ES256", "ec"))
    provider.keys.append(jwk(OTHER_KEY, kid="new"))
    for _ in range(5):
        with pytest.raises(UnauthorizedError):
            await tokens.check(token(OTHER_KEY, "ES256", "new"))
    assert provider.asked == 1
    provider.clock.now = 31
    fresh = token(OTHER_KEY, "ES256", "new")
    await asyncio.gather(*(tokens.check(fresh) for _ in range(5)))
    assert provider.asked == 2


async def test_a_provider_that_never_answered_is_our_fault_and_one_that_did_is_remembered(provider: Provider) -> None:
    provider.is_down = True
    tokens = Tokens(settings(), keys=provider.key_set)
    with pytest.raises(UnavailableError):
        await tokens.check(token(EC_KEY, "ES256", "ec"))
    provider.is_down = False
    await provider.key_set.refresh()
    provider.is_down = True
    await provider.key_set.refresh()
    assert (await tokens.check(token(EC_KEY, "ES256", "ec"))).key_id == "jwt:ann"


async def test_a_remembered_token_still_ends() -> None:
    tokens = Tokens(settings(jwt_leeway_s=0, jwt_jwks_url=None))
    ends = time.time() + 1.5
    short = token(SECRET, "HS256", exp=ends)
    await tokens.check(short)
    while time.time() <= int(ends):  # noqa: ASYNC110  (what is waited for is the time of the claim)
        await asyncio.sleep(0.05)
    await asyncio.sleep(max(0.0, ends - time.time()))
    with pytest.raises(UnauthorizedError):
        await tokens.check(short)


def test_without_settings_there_are_no_tokens() -> None:
    assert open_tokens(Settings(_env_file=None), None) is None
