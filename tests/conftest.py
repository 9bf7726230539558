"""What every suite shares: a real PostgreSQL, started when the first test asks for one, and a patient hypothesis."""

import asyncio
import itertools
import os
import random
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import psutil
import pytest
import structlog
from hypothesis import HealthCheck, settings

from overtone.db import Database
from overtone.db.embedded import EmbeddedPostgres
from overtone.db.migrate import upgrade

WORDS = {
    "negative": ["awful", "hate", "worst", "sad", "broken"],
    "neutral": ["table", "monday", "train", "paper", "river"],
    "positive": ["love", "great", "best", "happy", "lovely"],
}

_PREFIX = "overtone-test-"
_TEMPLATE = "overtone_template"
_numbers = itertools.count()

MakeMoods: TypeAlias = Callable[..., None]

# How fast this machine is says nothing about the code.
settings.register_profile("overtone", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("overtone")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands send the log to the standard error they find, which the capture of their test closes."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def embedded_postgres() -> Iterator[EmbeddedPostgres]:
    """A server of this test session, which forgets its data at a power cut for the sake of speed."""
    _stop_servers_of_dead_sessions()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/tmp"))
    server = EmbeddedPostgres(folder / "data", folder / "s", durable=False)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def _migrated_template(embedded_postgres: EmbeddedPostgres) -> str:
    _finish(_execute(embedded_postgres.url, f'CREATE DATABASE "{_TEMPLATE}"'))
    _finish(upgrade(_address(embedded_postgres, _TEMPLATE)))
    return _TEMPLATE


@pytest.fixture
def empty_postgres_url(embedded_postgres: EmbeddedPostgres) -> Iterator[str]:
    """The address of a database without any tables, fresh for every test."""
    yield from _fresh_database(embedded_postgres, "template1")


@pytest.fixture(scope="module")
def postgres_url(embedded_postgres: EmbeddedPostgres, _migrated_template: str) -> Iterator[str]:
    """The address of a migrated database, fresh for every test module."""
    yield from _fresh_database(embedded_postgres, _migrated_template)


@pytest.fixture(scope="session")
def session_postgres_url(embedded_postgres: EmbeddedPostgres, _migrated_template: str) -> Iterator[str]:
    """The address of a migrated database that the tests of a session share."""
    yield from _fresh_database(embedded_postgres, _migrated_template)


@pytest.fixture
def fresh_postgres_url(embedded_postgres: EmbeddedPostgres, _migrated_template: str) -> Iterator[str]:
    """The address of a migrated database, fresh for every test."""
    yield from _fresh_database(embedded_postgres, _migrated_template)


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[Database]:
    """A pool on `postgres_url`; what earlier tests of the module stored is still there."""
    db = await Database.open(postgres_url)
    yield db
    await db.close()


@pytest.fixture
async def fresh_database(fresh_postgres_url: str) -> AsyncIterator[Database]:
    """A pool on a database of this test alone."""
    db = await Database.open(fresh_postgres_url)
    yield db
    await db.close()


def _fresh_database(server: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    _finish(_execute(server.url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    yield _address(server, name)
    _finish(_execute(server.url, f'DROP DATABASE "{name}" WITH (FORCE)'))


def _address(server: EmbeddedPostgres, name: str) -> str:
    return server.url.replace("@/overtone?", f"@/{name}?")


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def _finish(work: Coroutine[Any, Any, None]) -> None:
    # A thread of its own has no event loop yet, whatever runs in this one.
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _stop_servers_of_dead_sessions() -> None:
    for folder in Path("/tmp").glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)) and os.access(folder, os.W_OK):
            EmbeddedPostgres(folder / "data", folder / "s").stop()
            shutil.rmtree(folder, ignore_errors=True)


def make_encoder(folder: Path, **shape: Any) -> None:
    """Layers of two heads and of this shape, with fresh weights and the tokenizer of the offline encoder."""
    # Not every suite has what training needs.
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from train.encoder import locate

    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))
    config = BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_tiny_encoder() -> Callable[..., None]:
    """Puts an encoder of one layer, 8 wide, with weights that follow from a seed into a folder."""

    def make(folder: Path, seed: int, **shape: Any) -> None:
        import torch

        torch.manual_seed(seed)
        make_encoder(folder, hidden_size=8, num_hidden_layers=1, intermediate_size=16, **shape)

    return make


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, make_tiny_encoder: Callable[..., None]) -> Path:
    """An encoder to train in this process."""
    folder = tmp_path_factory.mktemp("encoder")
    make_tiny_encoder(folder, 0)
    return folder


def make_texts(path: Path, rows: int, seed: int, words: Mapping[str, Sequence[str]]) -> None:
    rng = random.Random(seed)
    lines = ["label\ttext"]
    for number in range(rows):
        label = list(words)[number % 3]
        chosen = rng.choices(words[label], k=rng.randint(2, 6))
        lines.append(f"{label}\t{' '.join(chosen)} {seed * 1000 + number} @someone")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def make_moods() -> MakeMoods:
    """Puts an encoder small enough to train in seconds, so many texts of a made-up language of three moods, 60 to
    validate on and 300 to judge by into a folder: `encoder`, `train.tsv`, `validation.tsv` and `apart.tsv`."""

    def make(folder: Path, rows: int, words: Mapping[str, Sequence[str]] = WORDS) -> None:
        encoder = folder / "encoder"
        make_encoder(encoder, hidden_size=32, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=64)
        for seed, (name, count) in enumerate((("train", rows), ("validation", 60), ("apart", 300)), start=1):
            make_texts(folder / f"{name}.tsv", count, seed, words)

    return make


@pytest.fixture(scope="module")
def mlflow_as_before() -> Iterator[None]:
    """MLflow writes the store it is set to into the environment, where settings and child processes of later tests
    would find it."""
    import mlflow

    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ.update(before)
