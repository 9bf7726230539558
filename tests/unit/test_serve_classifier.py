"""The threads of a classifier, and what it does to load a bundle."""

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from overtone.bundle import Bundle, BundleSpec, write_bundle
from overtone.engine import OnnxEngine, Probabilities
from serve.classifier import Classifier


class NotingEngine(OnnxEngine):
    """Notes how nice the thread is that it runs on."""

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return super().classify(token_ids)


class CountingEngine(OnnxEngine):
    """Counts the batches it runs."""

    batches = 0

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        self.batches += 1
        return super().classify(token_ids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
async def test_the_engine_lets_the_event_loop_go_first(tiny_bundle: Bundle) -> None:
    engine = NotingEngine(tiny_bundle)
    classifier = Classifier(engine_for=lambda _bundle, _threads: engine)
    await classifier.load(tiny_bundle.path)
    await classifier.classify(["a text"])
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert engine.niceness == min(mine + 5, 19)
    await classifier.close()


async def test_a_bundle_that_is_returned_to_is_checked_but_not_measured_again(
    tiny_bundle: Bundle, bundle_spec: BundleSpec, tmp_path: Path
) -> None:
    folder = copytree(tiny_bundle.path, tmp_path / "renamed")
    renamed = write_bundle(folder, spec=replace(bundle_spec, name="renamed", golden=tiny_bundle.golden))
    engines: list[CountingEngine] = []

    def engine_for(bundle: Bundle, _threads: int) -> CountingEngine:
        engines.append(CountingEngine(bundle))
        return engines[-1]

    classifier = Classifier(engine_for=engine_for)
    for bundle in (tiny_bundle, renamed, tiny_bundle):
        await classifier.load(bundle.path)
    await classifier.close()

    first, other, again = (engine.batches for engine in engines)
    assert min(first, other) > again >= 1
