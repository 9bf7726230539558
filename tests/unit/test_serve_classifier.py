"""The threads of a classifier."""

import os
import sys
import threading

import pytest

from overtone.bundle import Bundle
from overtone.engine import OnnxEngine, Probabilities
from serve.classifier import Classifier


class NotingEngine(OnnxEngine):
    """Notes how nice the thread is that it runs on."""

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
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
