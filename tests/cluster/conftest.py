"""One serving stack for all tests of it, since a start takes half a minute. Each test deploys what it needs there."""

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

from live_stack import LIKED, Stack, started
from overtone.bundle import Bundle, BundleSpec, Golden, TextEncoder, load_bundle, write_bundle
from overtone.engine import open_engine
from overtone.settings import load_settings


@pytest.fixture(scope="session")
def serving_bundle() -> Bundle:
    """The bundle in the package, or the one the setting BUNDLE names."""
    return load_bundle(load_settings().bundle)


@pytest.fixture(scope="session")
def other_bundle(serving_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model, less sure of itself."""
    folder = tmp_path_factory.mktemp("other")
    for path in (serving_bundle.model_path, serving_bundle.tokenizer_path):
        shutil.copy(path, folder)
    spec = BundleSpec(
        name="other",
        labels=serving_bundle.labels,
        max_length=serving_bundle.max_length,
        temperature=serving_bundle.temperature * 1.5,
        precision=serving_bundle.precision,
        golden=serving_bundle.golden,
    )
    draft = write_bundle(folder, spec=spec)
    scores = open_engine(draft).classify(TextEncoder(draft).encode([LIKED]))
    return write_bundle(folder, spec=replace(spec, golden=(Golden(LIKED, tuple(map(float, scores[0]))),)))


@pytest.fixture(scope="session")
def stack(session_postgres_url: str, serving_bundle: Bundle) -> Iterator[Stack]:
    """Ray, HAProxy and two replicas on the default bundle; `test_serve_stop.py` stops it."""
    with started(session_postgres_url, serving_bundle) as stack:
        stack.deploy(replicas=2)
        yield stack
