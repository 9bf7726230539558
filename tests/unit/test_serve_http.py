"""The API over ASGI, with a real classifier on a tiny bundle and keys kept in memory."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import Any

import httpx
import orjson
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from overtone import errors, logging
from overtone.bundle import Bundle
from overtone.engine import Engine, Probabilities, open_engine
from overtone.schema import MAX_BATCH_TEXTS, MAX_TEXT_CHARS
from serve import problems
from serve.auth import Gate, Identity, KeyRing
from serve.batcher import Limits
from serve.classifier import Classifier
from serve.haproxy import QUEUE_HEADER
from serve.http import create_app
from serve.problems import status_of
from serve.service import Service
from serve.tracing import open_tracing

SECRET = "ovt_a-key-that-may-do-all"
PREDICT_ONLY = "ovt_predict-only"
READ_ONLY = "ovt_read-only"
HATED = "hate hate hate"


def digest(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


class MemoryRecords:
    """Keys, sessions and figures in memory; `is_down` makes the database go away."""

    def __init__(self) -> None:
        self.is_down = False
        self.keys = {
            digest(SECRET): Identity("key_all", frozenset({"predict", "read"})),
            digest(PREDICT_ONLY): Identity("key_predict", frozenset({"predict"})),
            digest(READ_ONLY): Identity("key_read", frozenset({"read"})),
        }
        self.tokens = {"good-token"}
        self.asked: list[tuple[int, int]] = []

    def _reach(self) -> None:
        if self.is_down:
            raise errors.DatabaseUnavailableError("The database cannot be reached.")

    async def active(self) -> Mapping[bytes, Identity]:
        self._reach()
        return dict(self.keys)

    async def find(self, digest: bytes) -> Identity | None:
        self._reach()
        return self.keys.get(digest)

    async def exchange_sign_in(self, token: str) -> str | None:
        self._reach()
        if token not in self.tokens:
            return None
        self.tokens.remove(token)
        return self._session(frozenset({"predict", "read"}))

    async def create_session(self, key_id: str, until: datetime | None = None) -> str | None:
        self._reach()
        return self._session(next(key.scopes for key in self.keys.values() if key.key_id == key_id))

    async def end_session(self, session_id: str) -> None:
        self._reach()
        self.keys = {key: value for key, value in self.keys.items() if value.key_id != session_id}

    async def figures(self, *, minutes: int, newest: int) -> dict[str, Any]:
        self._reach()
        self.asked.append((minutes, newest))
        return {"posts": 2, "predictions": 1}

    def _session(self, scopes: frozenset[str]) -> str:
        secret = f"ovt_se_{len(self.keys)}"
        self.keys[digest(secret)] = Identity(f"session_{len(self.keys)}", scopes, is_session=True)
        return secret


class PickyEngine:
    """The engine of a bundle, which fails on texts of three or more of the same word."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._engine = open_engine(bundle, threads)
        self.labels = self._engine.labels

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        if any(len(ids) == 5 and len(set(ids[1:-1])) == 1 for ids in token_ids):
            raise errors.EngineError("The model failed.")
        return self._engine.classify(token_ids)

    def close(self) -> None:
        self._engine.close()


class Api:
    """A client of the app, and what stands behind it."""

    def __init__(self, service: Service, records: MemoryRecords) -> None:
        self.service = service
        self.records = records
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(service)),
            base_url="http://test",
            headers={service.gate.api_key_header: SECRET},
        )

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, content=content, headers={"content-type": "application/json"} | headers)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


async def opened(bundle: Bundle | None, **options: Any) -> Api:
    records = MemoryRecords()
    engine_for = options.pop("engine_for", PickyEngine)
    classifier = Classifier(engine_for=engine_for, limits=options.pop("limits", None))
    if bundle is not None:
        await classifier.load(bundle.path)
    keys = KeyRing(records)
    await keys.refresh()
    gate = Gate(keys, api_key_header=options.pop("api_key_header", "X-API-Key"))
    return Api(Service(classifier=classifier, gate=gate, records=records, **options), records)


@pytest.fixture
async def api(tiny_bundle: Bundle) -> AsyncIterator[Api]:
    api = await opened(tiny_bundle)
    yield api
    await api.client.aclose()
    await api.service.classifier.close()


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert body["status"] == status
    assert body["type"] == f"urn:overtone:problem:{code}"
    assert body["request_id"] == response.headers["x-request-id"]
    return body


# --- predictions


async def test_one_text(api: Api, tiny_bundle: Bundle) -> None:
    response = await api.post("/predict", {"text": "love"})
    body = response.json()

    assert response.status_code == 200
    assert body["label"] == "positive"
    assert body["confidence"] == max(body["scores"].values())
    assert sum(body["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert list(body["scores"]) == list(tiny_bundle.labels)
    assert body["model_version"] == tiny_bundle.version


async def test_many_texts_are_answered_in_order(api: Api) -> None:
    texts = ["love", "hate", "fine"] * 50
    body = (await api.post("/predict/batch", {"texts": texts})).json()

    assert [item["label"] for item in body["predictions"]] == ["positive", "negative", "neutral"] * 50


async def test_a_text_the_engine_fails_on_fails_alone(api: Api) -> None:
    body = (await api.post("/predict/batch", {"texts": ["love", HATED, "fine"]})).json()
    good, failed, fine = body["predictions"]

    assert (good["label"], fine["label"]) == ("positive", "neutral")
    assert failed["error"]["code"] == "engine"
    assert_problem(await api.post("/predict", {"text": HATED}), 500, "engine")


async def test_texts_at_their_limits_are_taken(api: Api) -> None:
    assert (await api.post("/predict", {"text": "x" * MAX_TEXT_CHARS})).status_code == 200
    many = await api.post("/predict/batch", {"texts": ["love"] * MAX_BATCH_TEXTS})
    assert len(many.json()["predictions"]) == MAX_BATCH_TEXTS


async def test_another_bundle_is_taken_in_without_losing_a_request(api: Api, bundle_files: Any) -> None:
    version = api.service.classifier.bundle.version
    before = [asyncio.create_task(api.post("/predict/batch", {"texts": ["love"] * 500})) for _ in range(4)]
    with pytest.raises(errors.BundleError):
        await api.service.classifier.load(bundle_files.parent / "nowhere")

    assert api.service.classifier.bundle.version == version
    assert {response.status_code for response in await asyncio.gather(*before)} == {200}


# --- hostile bodies

LONG = "x" * (MAX_TEXT_CHARS + 1)


@pytest.mark.parametrize(
    ("path", "body", "kind", "first"),
    [
        ("/predict", b'{"text": ', (400, "malformed"), ("body", None, None)),
        ("/predict", b"", (400, "malformed"), ("body", None, None)),
        ("/predict", b'{"text": "\xff\xfe"}', (400, "malformed"), ("body", None, None)),
        ("/predict", b"[" * 100_000, (400, "malformed"), ("body", None, None)),
        ("/predict", b'["love"]', (422, "invalid_input"), ("body", None, None)),
        ("/predict", {}, (422, "invalid_input"), ("text", None, None)),
        ("/predict", {"text": None}, (422, "invalid_input"), ("text", None, None)),
        ("/predict", {"text": 7}, (422, "invalid_input"), ("text", None, None)),
        ("/predict", {"text": ["love"]}, (422, "invalid_input"), ("text", None, None)),
        ("/predict", {"text": ""}, (422, "invalid_input"), ("text", 1, 0)),
        ("/predict", {"text": " \n\t "}, (422, "invalid_input"), ("text", 1, 0)),
        ("/predict", {"text": "a\0b"}, (422, "invalid_input"), ("text", 0, 1)),
        ("/predict", b'{"text": "a\\ud800b"}', (422, "invalid_input"), ("text", 0, 1)),
        ("/predict", {"text": LONG}, (422, "invalid_input"), ("text", MAX_TEXT_CHARS, MAX_TEXT_CHARS + 1)),
        ("/predict", {"text": "love", "txet": 1}, (422, "invalid_input"), ("txet", None, None)),
        ("/predict", {"text": "love", "<script>": 1}, (422, "invalid_input"), ("body", None, None)),
        ("/predict/batch", {"texts": "love"}, (422, "invalid_input"), ("texts", None, None)),
        ("/predict/batch", {"texts": []}, (422, "invalid_input"), ("texts", 1, 0)),
        (
            "/predict/batch",
            {"texts": ["a"] * (MAX_BATCH_TEXTS + 1)},
            (422, "invalid_input"),
            ("texts", MAX_BATCH_TEXTS, MAX_BATCH_TEXTS + 1),
        ),
        ("/predict/batch", {"texts": ["a", "b", "c", ""]}, (422, "invalid_input"), ("texts[3]", 1, 0)),
        ("/predict/batch", {"texts": ["a", 3]}, (422, "invalid_input"), ("texts[1]", None, None)),
        ("/predict/batch", b'{"texts": ["a", "\\udfff"]}', (422, "invalid_input"), ("texts[1]", 0, 1)),
    ],
)
async def test_hostile_bodies_are_refused_by_field_and_limit(
    api: Api, path: str, body: Any, kind: tuple[int, str], first: tuple[str, int | None, int | None]
) -> None:
    named = assert_problem(await api.post(path, body), *kind)["errors"][0]

    assert (named["field"], named["limit"], named["size"]) == first
    assert (await api.post("/predict", {"text": "love"})).status_code == 200


async def test_a_refusal_never_repeats_the_text(api: Api) -> None:
    response = await api.post("/predict/batch", {"texts": ["my secret\0", "my secret" + " " * MAX_TEXT_CHARS]})

    assert response.status_code == 422
    assert "my secret" not in response.text
    assert len(response.json()["errors"]) == 2


async def test_a_body_over_the_limit_is_refused_announced_or_not(api: Api) -> None:
    announced = await api.post("/predict", b"{}", content_length=str(2**40))
    assert assert_problem(announced, 413, "too_large")["errors"][0]["limit"] == 64 * 2**20

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 2**20

    streamed = await api.client.post("/predict", content=endless(), headers={"content-type": "application/json"})
    assert_problem(streamed, 413, "too_large")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"]
)
async def test_other_content_types_are_refused(api: Api, kind: str) -> None:
    assert_problem(await api.post("/predict", {"text": "love"}, content_type=kind), 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=UTF-8", "Application/vnd.x+json"])
async def test_json_by_any_name_is_taken(api: Api, kind: str) -> None:
    assert (await api.post("/predict", {"text": "love"}, content_type=kind)).status_code == 200


# --- callers


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"x_api_key": ""}, 401, "unauthorized"),
        ({"x_api_key": "ovt_nobody's"}, 401, "unauthorized"),
        ({"x_api_key": "ü\x80"}, 401, "unauthorized"),
        ({"x_api_key": READ_ONLY}, 403, "forbidden"),
    ],
)
async def test_callers_without_the_right_key_are_refused(
    api: Api, headers: dict[str, str], status: int, code: str
) -> None:
    response = await api.client.post(
        "/predict",
        content=b'{"text": "love"}',
        headers={"content-type": "application/json", "x-api-key": headers["x_api_key"].encode("utf-8")},
    )
    assert_problem(response, status, code)
    assert ("www-authenticate" in response.headers) == (status == 401)


async def test_a_bearer_token_is_a_key(api: Api) -> None:
    del api.client.headers["x-api-key"]
    assert (await api.post("/predict", {"text": "love"}, authorization=f"Bearer {SECRET}")).status_code == 200


async def test_known_keys_work_while_the_database_is_away(api: Api) -> None:
    api.records.is_down = True
    assert await api.service.gate.keys.refresh() is False
    assert (await api.post("/predict", {"text": "love"})).status_code == 200

    unknown = await api.post("/predict", {"text": "love"}, x_api_key="ovt_new")
    assert_problem(unknown, 503, "database_unavailable")
    assert unknown.headers["retry-after"] == "1"


async def test_signing_in_with_a_token_once(api: Api) -> None:
    del api.client.headers["x-api-key"]
    assert_problem(await api.get("/session"), 401, "unauthorized")

    response = await api.get("/sign-in?token=good-token")
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert (await api.get("/session")).status_code == 204
    assert (await api.post("/predict", {"text": "love"})).status_code == 200
    assert_problem(await api.get("/sign-in?token=good-token"), 401, "unauthorized")


async def test_signing_in_with_a_key_and_out_again(api: Api) -> None:
    del api.client.headers["x-api-key"]
    assert_problem(await api.post("/session", {"key": "wrong"}), 401, "unauthorized")
    assert (await api.post("/session", {"key": SECRET})).status_code == 204
    assert (await api.get("/stats")).status_code == 200

    assert (await api.client.delete("/session")).status_code == 204
    assert (await api.get("/session")).status_code == 401


async def test_signing_out_ends_sessions_alone(api: Api) -> None:
    del api.client.headers["x-api-key"]
    keys = len(api.records.keys)
    for cookie in (SECRET, PREDICT_ONLY, "ovt_se_nobody's"):
        response = await api.client.delete("/session", headers={"cookie": f"overtone_session={cookie}"})
        assert response.status_code == 204
        assert 'overtone_session=""' in response.headers["set-cookie"]
    assert len(api.records.keys) == keys

    await api.post("/session", {"key": SECRET})
    assert len(api.records.keys) == keys + 1
    for _ in range(2):
        assert (await api.client.delete("/session")).status_code == 204
        assert len(api.records.keys) == keys


async def test_a_session_that_cannot_be_ended_keeps_its_cookie(api: Api) -> None:
    del api.client.headers["x-api-key"]
    await api.post("/session", {"key": SECRET})
    api.records.is_down = True

    response = await api.client.delete("/session")
    assert_problem(response, 503, "database_unavailable")
    assert "set-cookie" not in response.headers


# --- everything else


async def test_every_answer_carries_the_request_id(api: Api) -> None:
    for path in ("/health", "/nowhere", "/static/nothing.js", "/metrics"):
        assert len((await api.get(path)).headers["x-request-id"]) == 32
    assert (await api.get("/health", x_request_id="abc-123")).headers["x-request-id"] == "abc-123"
    assert (await api.get("/health", x_request_id="a b\tc")).headers["x-request-id"] != "a b\tc"


async def test_unknown_paths_and_methods_are_problems(api: Api) -> None:
    assert_problem(await api.get("/nowhere"), 404, "not_found")
    response = await api.get("/predict")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_alive_before_ready() -> None:
    api = await opened(None)

    assert (await api.get("/health")).json() == {"status": "alive"}
    assert_problem(await api.get("/ready"), 503, "unavailable")
    assert_problem(await api.post("/predict", {"text": "love"}), 503, "unavailable")


async def test_stats_are_bounded_and_need_a_key(api: Api) -> None:
    assert (await api.get("/stats")).json() == {"posts": 2, "predictions": 1}
    assert (await api.get("/stats?minutes=5&newest=0")).status_code == 200
    assert api.records.asked == [(30, 50), (5, 0)]
    for query in ("minutes=0", "minutes=1441", "newest=201", "newest=-1", "newest=x", "newest=%D9%A1"):
        assert_problem(await api.get(f"/stats?{query}"), 422, "invalid_input")
    assert_problem(await api.get("/stats", x_api_key=PREDICT_ONLY), 403, "forbidden")


async def test_metrics_count_requests_by_route_not_by_path(api: Api) -> None:
    await api.post("/predict", {"text": "love"})
    await api.get("/nowhere/at/all")
    await api.get("/static/app.js")
    text = (await api.get("/metrics")).text

    assert 'http_requests_total{method="POST",route="/predict",status="200"}' in text
    assert 'http_request_duration_seconds_count{method="POST",route="/predict"}' in text
    assert 'sentiment_prediction_confidence_count{label="positive"}' in text
    assert 'route="/static/{path:path}"' in text
    assert "nowhere" not in text


async def test_pages_come_from_the_package_with_a_policy(api: Api) -> None:
    for path, kind in (("/", "text/html"), ("/docs", "text/html"), ("/static/app.js", "text/javascript")):
        response = await api.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in response.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["..%2Fhttp.py", "%2e%2e/app.py", "__init__.py", "vendor", "a" * 300 + ".js"])
async def test_no_other_file_is_served(api: Api, path: str) -> None:
    assert (await api.get(f"/static/{path}")).status_code == 404


async def test_openapi_tells_bodies_answers_and_errors(api: Api) -> None:
    schema = (await api.get("/openapi.json")).json()
    predict = schema["paths"]["/predict"]["post"]

    assert predict["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/PredictRequest")
    assert schema["components"]["schemas"]["PredictRequest"]["properties"]["text"]["maxLength"] == 25_000
    assert predict["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Prediction")
    assert set(predict["responses"]) >= {"400", "401", "403", "413", "415", "422", "429", "503", "504"}
    assert set(schema["components"]["securitySchemes"]) == {"key", "bearer", "session"}
    assert "FieldProblem" in schema["components"]["schemas"]
    assert {path for path in schema["paths"] if not path.startswith("/v2")} == {
        "/predict", "/predict/batch", "/models", "/stats", "/health", "/ready", "/metrics", "/sign-in", "/session",
        "/posts/{post_id}", "/authors/{author_id}", "/feedback",
        "/jobs", "/jobs/retention", "/jobs/erasure", "/jobs/rescoring", "/jobs/report",
        "/jobs/{job_id}", "/jobs/{job_id}/result",
        "/jobs/{job_id}/cancel", "/jobs/{job_id}/resume",
    }  # fmt: skip


async def test_browsers_of_named_origins_may_call(tiny_bundle: Bundle) -> None:
    api = await opened(tiny_bundle, cors_origins=("https://a.example",))
    preflight = {"origin": "https://a.example", "access_control_request_method": "POST"}
    names = {name.replace("_", "-"): value for name, value in preflight.items()}
    allowed = await api.client.options("/predict", headers=names)
    refused = await api.client.options("/predict", headers=names | {"origin": "https://b.example"})

    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in refused.headers
    answer = await api.post("/predict", {"text": "love"}, origin="https://a.example")
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


async def test_a_key_header_of_another_name(tiny_bundle: Bundle) -> None:
    api = await opened(tiny_bundle, api_key_header="X-Team-Key")

    assert (await api.post("/predict", {"text": "love"})).status_code == 200


async def test_a_full_queue_is_429_with_retry_after(tiny_bundle: Bundle) -> None:
    api = await opened(tiny_bundle, limits=Limits(budget_tokens=1, max_interactive_texts=1))
    answers = await asyncio.gather(*(api.post("/predict", {"text": "love"}) for _ in range(40)))
    refused = [answer for answer in answers if answer.status_code != 200]

    assert refused
    for answer in refused:
        assert_problem(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers[QUEUE_HEADER] == "full"


class HeldEngine:
    """The engine of a bundle, which waits while it may not go."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._engine = open_engine(bundle, threads)
        self.labels = self._engine.labels
        self.may_go = threading.Event()
        self.may_go.set()
        self.is_held = False

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        self.is_held = not self.may_go.is_set()
        self.may_go.wait()
        return self._engine.classify(token_ids)

    def close(self) -> None:
        self.may_go.set()
        self._engine.close()


async def test_refusals_come_while_the_engine_is_busy(tiny_bundle: Bundle) -> None:
    engines: list[HeldEngine] = []

    def engine_for(bundle: Bundle, threads: int) -> HeldEngine:
        engines.append(HeldEngine(bundle, threads))
        return engines[-1]

    async def until(condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110  (a condition of any kind)
            await asyncio.sleep(0.005)

    api = await opened(tiny_bundle, limits=Limits(budget_tokens=1, max_interactive_texts=1), engine_for=engine_for)
    ask = partial(api.post, "/predict", {"text": "love"})
    classifier, [engine] = api.service.classifier, engines
    engine.may_go.clear()
    try:
        async with asyncio.timeout(20):
            taken = [asyncio.create_task(ask())]
            await until(lambda: engine.is_held)
            taken.append(asyncio.create_task(ask()))
            await until(lambda: classifier.waiting)
            # The engine answers nothing from here on, so what is answered waited for nothing.
            full = [await ask() for _ in range(20)]
            closing = asyncio.create_task(classifier.close())
            while (stopping := await ask()).status_code == 429:  # noqa: ASYNC110  (until it closes)
                await asyncio.sleep(0.005)
    finally:
        engine.may_go.set()

    for answer in full:
        assert_problem(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    assert_problem(stopping, 503, "shutting_down")
    assert int(stopping.headers["retry-after"]) >= 1
    await closing
    assert [answer.status_code for answer in await asyncio.gather(*taken)] == [200, 200]


async def test_a_bug_is_answered_without_a_word_about_it(tiny_bundle: Bundle) -> None:
    api = await opened(tiny_bundle)

    async def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("my secret")

    api.records.figures = broken  # type: ignore[method-assign]
    transport = httpx.ASGITransport(create_app(api.service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/stats", headers={"x-api-key": SECRET})
    assert_problem(response, 500, "internal")
    assert "secret" not in response.text


def all_errors(cls: type[errors.OvertoneError] = errors.OvertoneError) -> list[type[errors.OvertoneError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in all_errors(child))]


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_status(cls: type[errors.OvertoneError]) -> None:
    assert 400 <= status_of(cls()) < 600


def test_statuses_are_assigned_to_known_errors_only() -> None:
    assert set(problems.STATUS) <= set(all_errors())


def test_the_engine_of_the_tests_is_an_engine(tiny_bundle: Bundle) -> None:
    engine: Engine = PickyEngine(tiny_bundle, 1)

    assert engine.classify([[0, 1]]).shape == (1, len(tiny_bundle.labels))


async def test_texts_of_a_client_that_left_are_given_up(tiny_bundle: Bundle) -> None:
    api = await opened(tiny_bundle)
    sent: list[Any] = []
    messages = [
        {"type": "http.request", "body": orjson.dumps({"texts": ["love"] * 10_000}), "more_body": False},
        {"type": "http.disconnect"},
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict/batch",
        "headers": [(b"content-type", b"application/json"), (b"x-api-key", SECRET.encode())],
    }

    async def receive() -> Any:
        if len(messages) == 1:
            while not api.service.classifier.waiting:  # noqa: ASYNC110  (state of the code under test)
                await asyncio.sleep(0)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(create_app(api.service)(scope, receive, send), 10)  # type: ignore[arg-type]

    assert sent == []
    assert api.service.classifier.waiting == 0


async def test_an_answer_tells_where_its_time_went(tiny_bundle: Bundle) -> None:
    api = await opened(tiny_bundle)

    for path, body in (("/predict", {"text": "love"}), ("/predict/batch", {"texts": ["love", "hate"]})):
        parts = (await api.post(path, body)).headers["server-timing"].split(", ")
        assert [part.split(";dur=")[0] for part in parts] == ["tokenise", "queue", "engine"]
        assert all(float(part.split(";dur=")[1]) >= 0 for part in parts)
    assert "server-timing" not in (await api.get("/health")).headers


async def test_requests_are_traced_and_logged_by_trace(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    exporter = InMemorySpanExporter()
    tracing = open_tracing(None, 1.0, exporter=exporter)
    assert tracing is not None
    logging.configure("serve", "DEBUG", "json")
    api = await opened(tiny_bundle, tracing=tracing)
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await api.post("/predict", {"text": "love"}, traceparent=caller)
    await api.get("/health")
    tracing.close()

    names = [span.name for span in exporter.get_finished_spans()]
    assert sorted(names) == ["GET /health", "POST /predict", "engine", "queue", "tokenise"]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "request.answered" in line]
    assert lines[0]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert set(lines[0]) == {
        *("timestamp", "level", "service", "message", "request_id", "request", "status"),
        *("duration_ms", "trace_id", "model_version", "confidence"),
    }
    assert len(lines) == 2
