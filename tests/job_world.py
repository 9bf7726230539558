"""The API over a real socket and PostgreSQL, a consumer of jobs, and a broker that loses what it is told to."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import orjson
import uvicorn

from overtone.db import Database
from overtone.db.jobs import ChunkName
from overtone.db.keys import create_key
from overtone.errors import UnavailableError
from serve.auth import Gate, KeyRing
from serve.chores import CHORE
from serve.classifier import Classifier
from serve.http import create_app
from serve.scoring import SCORE, ApiClassifier, Dispatcher, Scorer
from serve.service import JobDesk, Service
from serve.store import Store

NDJSON = {"content-type": "application/x-ndjson"}


async def until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  (what it waits for has no event)
            await asyncio.sleep(0.01)


class MemoryQueue:
    """A broker that loses what it is told to."""

    def __init__(self) -> None:
        self.tasks: deque[ChunkName] = deque()
        self.chores: deque[ChunkName] = deque()
        self.is_away = False

    def send(self, task: str, arguments: Sequence[Any]) -> None:
        if self.is_away:
            raise UnavailableError("away")
        assert task in {SCORE, CHORE}
        (self.tasks if task == SCORE else self.chores).append(ChunkName(UUID(arguments[0]), arguments[1]))

    def lengths(self) -> Mapping[str, int]:
        if self.is_away:
            raise UnavailableError("away")
        return {"q": len(self.tasks)}


class World:
    """The API, a consumer and what is between them."""

    def __init__(self, db: Database, root: Path, port: int, secret: str) -> None:
        self.db = db
        self.root = root
        self.queue = MemoryQueue()
        self.secret = secret
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers={"x-api-key": secret}, timeout=60, trust_env=False
        )
        self.api = ApiClassifier(f"http://127.0.0.1:{port}", "X-API-Key", lambda: secret)
        self.scorer = Scorer(db, root, self.api, patience_s=0.0)
        self.dispatcher = Dispatcher(db, self.queue, root, "q", lost_after_s=0.0)

    async def submit(self, body: bytes, *, status: int = 202, headers: dict[str, str] = NDJSON, **query: str) -> Any:
        answer = await self.client.post("/jobs", content=body, params=query, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def work(self) -> None:
        """Do all that waits or is due."""
        while self.queue.tasks or await self.dispatcher.step():
            while self.queue.tasks:
                await self.scorer.score(self.queue.tasks.popleft())

    async def job(self, job_id: str) -> Any:
        return (await self.client.get(f"/jobs/{job_id}")).json()

    async def result(self, job_id: str) -> list[dict[str, Any]]:
        answer = await self.client.get(f"/jobs/{job_id}/result")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson"), answer.text
        return [orjson.loads(line) for line in answer.content.splitlines()]

    def files(self, job_id: str) -> set[str]:
        return {path.parent.name for path in (self.root / job_id).rglob("*") if path.is_file()}


@asynccontextmanager
async def open_world(db: Database, url: str, classifier: Classifier, root: Path) -> AsyncIterator[World]:
    """A world on the database `db` at `url`, whose jobs have their files in `root`."""
    store = Store(url)
    desk = JobDesk(store.database, root, max_bytes=2**21, max_texts=20_000, max_open=3)
    service = Service(classifier=classifier, gate=Gate(KeyRing(store)), records=store, jobs=desk)
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="warning"))
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    _, secret = await create_key(db, "people", ["predict"])
    world = World(db, root, server.servers[0].sockets[0].getsockname()[1], secret)
    yield world
    await world.client.aclose()
    await world.api.close()
    server.should_exit = True
    await running
    await store.close()
