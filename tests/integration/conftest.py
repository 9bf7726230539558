"""What files share: the default bundle at work and a world of jobs; and which files go first."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from job_world import World, open_world
from overtone.db import Database
from overtone.engine import open_engine
from serve.classifier import Classifier


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first, so that none of several workers ends long after the others."""
    longest: dict[object, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, 0.0), mark.args[0] if mark else 0.0)
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(scope="module")
async def classifier() -> AsyncIterator[Classifier]:
    classifier = Classifier(engine_for=open_engine)
    await classifier.load(None)
    yield classifier
    await classifier.close()


@pytest.fixture
async def world(
    fresh_database: Database, fresh_postgres_url: str, classifier: Classifier, tmp_path: Path
) -> AsyncIterator[World]:
    async with open_world(fresh_database, fresh_postgres_url, classifier, tmp_path / "jobs") as world:
        yield world
