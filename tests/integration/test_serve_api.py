"""The API over a real socket: a client of Triton, the calls schemathesis makes up, and bodies meant to do harm."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from hostile import hostile_calls
from overtone.db import Database
from overtone.db.feedback import Feedback, Written
from overtone.engine import open_engine
from serve.auth import Gate, Identity, KeyRing
from serve.classifier import Classifier
from serve.http import create_app
from serve.service import JobDesk, Service

SECRET = "ovt_a-key"
KEY = {"X-API-Key": SECRET}
CHIEF_SECRET = "ovt_the-chief's"
CHIEF = {"X-API-Key": CHIEF_SECRET}


class OneKey:
    """The store of one key and an administrator's, and what the other routes ask of the database."""

    async def active(self) -> Mapping[bytes, Identity]:
        return {
            sha256(SECRET.encode()).digest(): Identity("key", frozenset({"predict", "read", "feedback"})),
            sha256(CHIEF_SECRET.encode()).digest(): Identity("chief", frozenset({"admin"})),
        }

    async def find(self, digest: bytes) -> Identity | None:
        return None

    async def exchange_sign_in(self, token: str) -> str | None:
        return None

    async def create_session(self, key_id: str, until: Any = None) -> str | None:
        return None

    async def revoke(self, key_id: str) -> bool:
        return True

    async def give_feedback(self, item: Feedback, *, key_id: str) -> Written | None:
        return Written(1, "created")

    async def figures(self, *, minutes: int, newest: int) -> dict[str, Any]:
        rates = {"posts": 0.0, "predictions": 0.0}
        stored = {"posts": 0, "predictions": 0, "labels": {}, "per_second": rates, "series": [], "newest": []}
        return stored | {"model_version": None, "source": None}


@asynccontextmanager
async def listening(postgres_url: str, jobs: Path) -> AsyncIterator[int]:
    """The port of a server with the default bundle, which takes jobs that nobody works on."""
    database = await Database.open(postgres_url, max_size=2)

    async def open_database() -> Database:
        return database

    classifier = Classifier(engine_for=open_engine)
    await classifier.load(None)
    store = OneKey()
    keys = KeyRing(store)
    await keys.refresh()
    desk = JobDesk(open_database, jobs, max_open=1_000)
    app = create_app(Service(classifier=classifier, gate=Gate(keys), records=store, jobs=desk))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task
    await classifier.close()
    await database.close()


@pytest.fixture(scope="module")
def address(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    jobs = tmp_path_factory.mktemp("jobs")
    found: list[int] = []
    is_up, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with listening(postgres_url, jobs) as port:
            found.append(port)
            is_up.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_up.wait(120)
    yield f"127.0.0.1:{found[0]}"
    is_over.set()
    thread.join()


@pytest.mark.parametrize("is_binary", [True, False])
def test_a_client_of_triton_gets_predictions(address: str, is_binary: bool) -> None:
    client = triton.InferenceServerClient(address)
    tensor = triton.InferInput("text", [2], "BYTES")
    tensor.set_data_from_numpy(np.array(["I love this", "worst service ever"], dtype=object), binary_data=is_binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in ("label", "scores")]

    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("overtone")
    assert client.get_model_metadata("overtone", headers=dict(KEY))["inputs"][0]["datatype"] == "BYTES"
    asked = client.infer("overtone", [tensor], outputs=outputs, headers=dict(KEY), request_id="7")
    packed = client.infer("overtone", [tensor], headers=dict(KEY), request_compression_algorithm="gzip")

    labels = [label.decode() if isinstance(label, bytes) else label for label in asked.as_numpy("label")]
    assert labels == ["positive", "negative"]
    assert asked.get_response()["id"] == "7"
    assert asked.as_numpy("scores").shape == (2, 3)
    assert packed.as_numpy("confidence").dtype == np.float32
    with pytest.raises(InferenceServerException, match="no model of that name"):
        client.infer("other", [tensor], headers=dict(KEY))
    client.close()


def test_schemathesis_finds_no_failure(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"http://{address}/openapi.json")
    for operation in schema.get_all_operations():
        _try(operation.ok(), address, KEY)


@pytest.mark.parametrize("path", ["/jobs/retention", "/jobs/erasure", "/jobs/rescoring", "/jobs/report"])
def test_schemathesis_finds_no_failure_in_what_administrators_ask_for(address: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"http://{address}/openapi.json")
    _try(schema[path]["POST"], address, CHIEF)
    answer = httpx.post(
        f"http://{address}{path}", json={"kind": "post", "id": "7"} if "erasure" in path else {}, headers=CHIEF
    )
    assert answer.status_code == 202


# Some rules cannot be said in a schema: no text of white space alone, no NUL, no more labels than the model has.
NOT_MEANT = [positive_data_acceptance]


def _try(operation: Any, address: str, key: Mapping[str, str]) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def once(case: Any) -> None:
        case.call_and_validate(base_url=f"http://{address}", headers=dict(key), excluded_checks=NOT_MEANT)

    once()


def test_no_body_does_harm(address: str) -> None:
    calls = hostile_calls()
    assert len(calls) >= 500

    async def play() -> list[tuple[int, str]]:
        async with httpx.AsyncClient(base_url=f"http://{address}", headers=dict(KEY), timeout=60) as client:
            failed = []
            for path, headers, body in calls:
                response = await client.post(path, content=body, headers=headers)
                if response.status_code >= 500:
                    failed.append((response.status_code, f"{path} {headers} {body[:80]!r}"))
            assert (await client.post("/predict", json={"text": "love"})).status_code == 200
            return failed

    process = psutil.Process()
    used: list[int] = []
    for _ in range(4):
        assert asyncio.run(play()) == []
        used.append(process.memory_info().rss)
    assert used[-1] - used[1] < 64 * 2**20
