"""What keeps callers apart and browsers safe, seen from outside: the whole app over ASGI, with a tiny bundle."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from hashlib import sha256
from typing import Any

import httpx
import jwt
import pytest

from overtone.bundle import Bundle
from overtone.settings import Settings
from serve.auth import Gate, Identity, KeyRing
from serve.classifier import Classifier
from serve.http import create_app
from serve.quotas import Allowance
from serve.service import Service
from serve.tokens import open_tokens

FREE, LIMITED = "ovt_free", "ovt_limited"
ORIGIN = "https://a.example"
ALLOWANCE = Allowance(requests_per_minute=2, texts_per_day=5)
JWT_SECRET = "a secret that is long enough for every algorithm there is"
SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
Open = Callable[..., Awaitable[httpx.AsyncClient]]


class Keys:
    """The store of a key without limits and of one with."""

    async def active(self) -> Mapping[bytes, Identity]:
        scopes = frozenset({"predict", "read"})
        return {
            sha256(FREE.encode()).digest(): Identity("key_free", scopes),
            sha256(LIMITED.encode()).digest(): Identity("key_limited", scopes, None, "limited", ALLOWANCE),
        }

    async def find(self, digest: bytes) -> Identity | None:
        return None


class Records:
    """A database without posts and sign-in links."""

    async def exchange_sign_in(self, token: str) -> str | None:
        return None

    async def figures(self, *, minutes: int, newest: int) -> dict[str, Any]:
        return {"posts": 0}


@pytest.fixture
async def open_client(tiny_bundle: Bundle) -> AsyncIterator[Open]:
    classifier = Classifier()
    await classifier.load(tiny_bundle.path)
    clients: list[httpx.AsyncClient] = []

    async def opened(key: str | None = FREE, **options: Any) -> httpx.AsyncClient:
        keys = KeyRing(Keys())
        await keys.refresh()
        settings = Settings(_env_file=None, jwt_secret=JWT_SECRET, jwt_issuer="https://id.example")
        gate = Gate(keys, tokens=open_tokens(settings, ALLOWANCE))
        service = Service(classifier=classifier, gate=gate, records=Records(), **options)  # type: ignore[arg-type]
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(service)),
            base_url="http://test",
            headers={"x-api-key": key} if key else {},
        )
        clients.append(client)
        return client

    yield opened
    for client in clients:
        await client.aclose()
    await classifier.close()


async def predict(client: httpx.AsyncClient, *texts: str, **headers: str) -> httpx.Response:
    return await client.post("/predict/batch", json={"texts": texts or ["love"]}, headers=headers)


async def test_an_explained_text_counts_as_often_as_it_is_read(open_client: Open) -> None:
    client = await open_client(LIMITED)  # 5 texts a day

    short = await client.post("/predict", json={"text": "love it", "explain": True})
    over = await client.post("/predict/batch", json={"texts": ["love", "hate"], "explain": True})

    assert (short.status_code, over.status_code) == (200, 413)
    assert '"texts-day";r=1;' in short.headers["ratelimit"]


# --- headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/docs", 200),
        ("GET", "/static/app.js", 200),
        ("GET", "/health", 200),
        ("GET", "/ready", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/stats", 200),
        ("GET", "/v2", 200),
        ("GET", "/stats?minutes=0", 422),
        ("POST", "/predict", 415),
        ("GET", "/predict", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/sign-in?token=no", 401),
        ("DELETE", "/session", 204),
    ],
)
async def test_every_answer_is_safe_for_browsers(open_client: Open, method: str, path: str, status: int) -> None:
    response = await (await open_client()).request(method, path)

    assert response.status_code == status
    for name, value in SAFE.items():
        assert response.headers.get_list(name) == [value]
    assert "server-timing" not in response.headers
    assert "access-control-allow-origin" not in response.headers
    if response.headers.get("content-type", "").startswith("text/html"):
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("media", "body"), [("application/json", b'{"texts": ["a"]}'), ("application/x-ndjson", b'"a"')]
)
async def test_predictions_and_streams_are_safe_too(open_client: Open, media: str, body: bytes) -> None:
    response = await (await open_client()).post("/predict/batch", content=body, headers={"content-type": media})

    assert response.status_code == 200
    assert SAFE.items() <= dict(response.headers).items()


async def test_refusals_are_kept_by_nobody(open_client: Open) -> None:
    response = await predict(await open_client(key=None))

    assert response.status_code == 401
    assert response.headers["cache-control"] == "no-store"
    assert SAFE.items() <= dict(response.headers).items()


# --- other origins


def preflight(origin: str, method: str, headers: str) -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": headers,
    }


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/stats", "/v2/models/overtone/infer"])
async def test_a_named_origin_may_send_a_key_but_no_cookie(open_client: Open, path: str) -> None:
    client = await open_client(key=None, cors_origins=(ORIGIN,))
    asked = await client.options(path, headers=preflight(ORIGIN, "POST", "x-api-key,content-type,authorization"))

    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert {"GET", "POST"} == set(asked.headers["access-control-allow-methods"].split(", "))
    assert "access-control-allow-credentials" not in asked.headers
    assert SAFE.items() <= dict(asked.headers).items()


@pytest.mark.parametrize(
    ("origin", "method", "headers"),
    [
        ("https://b.example", "POST", "x-api-key"),
        ("http://a.example", "POST", "x-api-key"),
        ("https://a.example.b.example", "POST", "x-api-key"),
        ("null", "POST", "x-api-key"),
        (ORIGIN, "DELETE", "x-api-key"),
        (ORIGIN, "POST", "x-other"),
    ],
)
async def test_all_else_is_refused(open_client: Open, origin: str, method: str, headers: str) -> None:
    client = await open_client(key=None, cors_origins=(ORIGIN,))
    asked = await client.options("/predict", headers=preflight(origin, method, headers))

    assert asked.status_code == 400
    assert asked.headers.get("access-control-allow-origin") == (ORIGIN if origin == ORIGIN else None)


async def test_a_page_of_a_named_origin_reads_errors_and_limits(open_client: Open) -> None:
    client = await open_client(cors_origins=(ORIGIN,))
    for answer in (await predict(client, origin=ORIGIN), await client.get("/nowhere", headers={"origin": ORIGIN})):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-credentials" not in answer.headers
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID"} == set(exposed)
    assert "access-control-allow-origin" not in (await predict(client, origin="https://b.example")).headers


async def test_without_origins_there_is_no_preflight(open_client: Open) -> None:
    asked = await (await open_client()).options("/predict", headers=preflight(ORIGIN, "POST", "x-api-key"))

    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


# --- limits


async def test_a_limited_key_is_told_and_then_refused(open_client: Open) -> None:
    client = await open_client(LIMITED)
    first, second, third = [await predict(client) for _ in range(3)]

    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    for response in (first, second, third):
        assert response.headers["ratelimit-policy"] == '"requests";q=2;w=60, "texts-day";q=5;w=86400'
    assert first.headers["ratelimit"].startswith('"requests";r=1;t=')
    assert '"texts-day";r=3;t=' in second.headers["ratelimit"]
    assert third.headers["ratelimit"].startswith('"requests";r=0;t=')
    assert third.json()["code"] == "quota_exceeded"
    assert 1 <= int(third.headers["retry-after"]) <= 120


async def test_more_texts_than_a_limit_allows_at_all_are_too_large(open_client: Open) -> None:
    response = await predict(await open_client(LIMITED), *["love"] * 6)

    assert (response.status_code, response.json()["code"]) == (413, "too_large")


async def test_reading_tells_the_limits_and_counts_for_none(open_client: Open) -> None:
    client = await open_client(LIMITED)
    await predict(client)
    answers = [await client.get("/stats") for _ in range(4)]

    assert {answer.status_code for answer in answers} == {200}
    assert answers[-1].headers["ratelimit"].startswith('"requests";r=1;t=')


async def test_a_key_without_limits_is_told_of_none(open_client: Open) -> None:
    response = await predict(await open_client())

    assert not [name for name in response.headers if name.startswith("ratelimit")]


# --- tokens


def token(secret: str = JWT_SECRET, **claims: Any) -> str:
    body = {"sub": "ann", "iss": "https://id.example", "exp": time.time() + 600, "scope": "predict"} | claims
    return jwt.encode(body, secret, "HS256")


async def test_a_token_is_taken_and_limited_by_who_it_speaks_for(open_client: Open) -> None:
    client = await open_client(key=None)
    anns = [await predict(client, authorization=f"Bearer {token(jti=str(number))}") for number in range(3)]
    bobs = await predict(client, authorization=f"Bearer {token(sub='bob')}")

    assert [response.status_code for response in anns] == [200, 200, 429]
    assert bobs.status_code == 200
    assert bobs.headers["ratelimit"].startswith('"requests";r=1;')


@pytest.mark.parametrize(
    ("given", "path", "status"),
    [
        (token("another secret that is long enough for every algorithm"), "/v2", 401),
        (token(exp=time.time() - 600), "/v2", 401),
        (token(iss="https://else.example"), "/v2", 401),
        (token(scope="other"), "/v2", 403),
        (token(), "/stats", 403),
        (token(), "/v2", 200),
        (token(scope="read"), "/stats", 200),
    ],
)
async def test_other_tokens_are_refused(open_client: Open, given: str, path: str, status: int) -> None:
    client = await open_client(key=None)
    response = await client.get(path, headers={"authorization": f"Bearer {given}"})

    assert response.status_code == status
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert given not in response.text
