"""A challenger beside the champion: canary, shadow, refused bundles, and fair turns on one engine thread."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from overtone.bundle import Bundle, BundleSpec, Golden, TextEncoder, write_bundle
from overtone.engine import OnnxEngine, Probabilities
from overtone.errors import BundleError, EngineError
from serve.classifier import Classifier
from serve.model import Turns
from serve.models import models_of
from serve.rollout import Canary, CanaryLimits, LiveOptions

LIMITS = CanaryLimits(min_requests=20, max_error_rate=0.1, max_p99_ratio=2.0)
WHATEVER_THE_CLOCK = LIMITS.model_copy(update={"max_p99_ratio": 100.0})
"""For engines that run: how long they take here is chance."""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (a condition of any kind)
            await asyncio.sleep(0.005)


class BreakableEngine:
    """A bundle's engine that can be told to fail."""

    broken: ClassVar[set[str]] = set()

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._engine = OnnxEngine(bundle, threads)
        self._version = bundle.version
        self.labels = self._engine.labels

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        if self._version in self.broken:
            raise EngineError("The model failed.")
        return self._engine.classify(token_ids)

    def close(self) -> None:
        self._engine.close()


@pytest.fixture
def challenger(tiny_bundle: Bundle, bundle_spec: BundleSpec, tmp_path: Path) -> Bundle:
    """The tiny bundle, surer of itself."""
    folder = tmp_path / "challenger"
    copytree(tiny_bundle.path, folder)
    spec = replace(bundle_spec, name="other", temperature=1.0)
    draft = write_bundle(folder, spec=spec)
    scores = OnnxEngine(draft).classify(TextEncoder(draft).encode(["love"]))[0]
    return write_bundle(folder, spec=replace(spec, golden=(Golden("love", tuple(map(float, scores))),)))


@pytest.fixture
async def classifier() -> AsyncIterator[Classifier]:
    classifier = Classifier(engine_for=BreakableEngine)
    yield classifier
    BreakableEngine.broken.clear()
    await classifier.close()


def options(champion: Bundle, challenger: Bundle | None = None, **more: Any) -> LiveOptions:
    return LiveOptions(
        bundle=str(champion.path),
        challenger=str(challenger.path) if challenger else None,
        limits=WHATEVER_THE_CLOCK,
        **more,
    )


async def test_a_canary_answers_its_share_and_says_so(
    classifier: Classifier, tiny_bundle: Bundle, challenger: Bundle
) -> None:
    await classifier.apply(options(tiny_bundle, challenger, canary=0.5), None)

    answers = await asyncio.gather(*(classifier.classify(["love"], request_id=b"%d" % n) for n in range(200)))
    again = await asyncio.gather(*(classifier.classify(["fine"], request_id=b"%d" % n) for n in range(200)))

    by_version = {answer.bundle.version: answer.rows[0] for answer in answers}
    assert set(by_version) == {tiny_bundle.version, challenger.version}
    assert by_version[tiny_bundle.version] != by_version[challenger.version]
    assert all(answer.rows[0] == by_version[answer.bundle.version] for answer in answers)
    assert 60 < sum(answer.bundle.version == challenger.version for answer in answers) < 140
    assert [answer.bundle.version for answer in answers] == [answer.bundle.version for answer in again]


async def test_a_failing_canary_is_taken_back_and_its_requests_are_answered_by_the_champion(
    classifier: Classifier, tiny_bundle: Bundle, challenger: Bundle
) -> None:
    await classifier.apply(options(tiny_bundle, challenger, canary=1.0), None)
    BreakableEngine.broken.add(challenger.version)

    answers = [await classifier.classify(["love"]) for _ in range(10)]

    assert {answer.bundle.version for answer in answers} == {tiny_bundle.version}
    assert all(isinstance(answer.rows[0], list) for answer in answers)
    trial = classifier.trial
    assert trial is not None
    assert (trial.canary.share, trial.canary.configured) == (0.0, 1.0)
    assert trial.canary.reason is not None
    shown = models_of(classifier, "r1")["challenger"]["canary"]
    assert (shown["share"], shown["rollback_reason"]) == (0.0, trial.canary.reason)

    BreakableEngine.broken.clear()
    await classifier.apply(options(tiny_bundle, challenger, canary=1.0), None)
    assert (await classifier.classify(["love"])).bundle.version == tiny_bundle.version
    await classifier.apply(options(tiny_bundle, challenger, canary=1.0, revision=1), None)
    assert (await classifier.classify(["love"])).bundle.version == challenger.version


async def test_a_shadow_compares_and_never_answers(
    classifier: Classifier, tiny_bundle: Bundle, challenger: Bundle
) -> None:
    await classifier.apply(options(tiny_bundle, challenger, shadow=1.0), None)

    answer = await classifier.classify(["love", "hate", "fine"])
    trial = classifier.trial
    assert trial is not None
    await until(lambda: trial.shadow.agreement.total() == 3)

    assert answer.bundle.version == tiny_bundle.version
    assert trial.shadow.agreement[("positive", "positive")] == 1
    shown = models_of(classifier, "r1")["challenger"]["shadow"]
    assert (shown["compared"], shown["agreement"], shown["failed"]) == (3, 1.0, 0)

    BreakableEngine.broken.add(challenger.version)
    answer = await classifier.classify(["love"])
    await until(lambda: trial.shadow.failed == 1)
    assert isinstance(answer.rows[0], list)


async def test_a_bundle_that_is_not_fit_changes_nothing_and_is_shown(
    classifier: Classifier, tiny_bundle: Bundle, challenger: Bundle
) -> None:
    await classifier.apply(options(tiny_bundle), None)
    challenger.model_path.write_bytes(b"not a model")

    await classifier.apply(LiveOptions(bundle=str(challenger.path), revision=1), None)
    await classifier.apply(options(tiny_bundle, challenger, canary=0.5, revision=2), None)

    assert classifier.bundle.version == tiny_bundle.version
    assert classifier.trial is None
    shown = models_of(classifier, "r1")
    assert [item["role"] for item in shown["refused"]] == ["champion", "challenger"]
    assert "sha256" in shown["refused"][0]["reason"]
    assert shown["revision"] == 2


async def test_a_model_that_fails_on_its_golden_texts_is_refused(classifier: Classifier, tiny_bundle: Bundle) -> None:
    BreakableEngine.broken.add(tiny_bundle.version)

    with pytest.raises(BundleError, match="golden"):
        await classifier.apply(options(tiny_bundle), None)


async def test_a_promoted_challenger_is_not_loaded_again(
    classifier: Classifier, tiny_bundle: Bundle, challenger: Bundle
) -> None:
    await classifier.apply(options(tiny_bundle, challenger, shadow=0.1), None)
    trial = classifier.trial
    assert trial is not None

    await classifier.apply(options(challenger, revision=1), None)

    assert classifier.encoder is trial.model.encoder
    assert classifier.trial is None
    assert (await classifier.classify(["love"])).bundle.version == challenger.version


async def test_swaps_under_load_lose_and_mix_up_nothing(
    classifier: Classifier, tiny_bundle: Bundle, challenger: Bundle
) -> None:
    await classifier.apply(options(tiny_bundle), None)
    known = {}
    for bundle in (challenger, tiny_bundle):
        await classifier.apply(options(bundle), None)
        known[bundle.version] = (await classifier.classify(["love", "hate it"])).rows
    done = asyncio.Event()
    answers = []

    async def ask() -> None:
        while not done.is_set():
            answers.append(await classifier.classify(["love", "hate it"]))

    clients = [asyncio.create_task(ask()) for _ in range(8)]
    for number in range(20):
        champion, other = (tiny_bundle, challenger) if number % 2 else (challenger, tiny_bundle)
        trial = {"challenger": str(other.path), "canary": 0.3, "shadow": 0.3} if number % 3 else {}
        await classifier.apply(LiveOptions(bundle=str(champion.path), revision=number, **trial), None)
    done.set()
    await asyncio.gather(*clients)

    assert {answer.bundle.version for answer in answers} == set(known)
    assert all(answer.rows == known[answer.bundle.version] for answer in answers)


async def test_tokens_that_are_given_are_classified_like_their_text(
    classifier: Classifier, tiny_bundle: Bundle
) -> None:
    await classifier.load(tiny_bundle.path)

    by_text = await classifier.classify(["love", "hate it"])
    by_tokens = await classifier.submit(classifier.encoder.encode(["love", "hate it"]))

    assert by_tokens == by_text


def test_a_slow_canary_is_taken_back() -> None:
    canary = Canary(0.5, LIMITS)
    for _ in range(30):
        assert not canary.note(by_challenger=False, seconds=0.010, failed=False)

    ended = [canary.note(by_challenger=True, seconds=0.030, failed=False) for _ in range(50)]

    assert sum(ended) == 1
    assert canary.share == 0
    assert "30.0 ms" in (canary.reason or "")


# Opening a session of ONNX Runtime leaves this thread without subnormal numbers.
@given(st.integers(0, 2**32), st.floats(0, 1, allow_subnormal=False))
def test_the_same_request_goes_to_the_same_bundle_and_a_larger_share_keeps_it(number: int, share: float) -> None:
    request_id = number.to_bytes(8, "big")

    assert Canary(share, LIMITS).takes(request_id) == Canary(share, LIMITS).takes(request_id)
    if Canary(share, LIMITS).takes(request_id):
        assert Canary(min(1.0, share + 0.1), LIMITS).takes(request_id)


@pytest.mark.parametrize("wrong", [{"canary": 0.5}, {"shadow": 0.1}, {"challenger": "x", "canary": 1.5}, {"other": 1}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LiveOptions(**wrong)


async def test_lanes_share_the_thread_by_weight_and_the_shadow_comes_last() -> None:
    thread = ThreadPoolExecutor(1)
    turns = Turns(thread)
    turns.weigh({"big": 0.75, "small": 0.25, "shadow": 0.0})
    order: list[str] = []

    def work(lane: str) -> Callable[[], list[list[float]]]:
        def run() -> list[list[float]]:
            order.append(lane)
            return []

        return run

    lanes = ["shadow"] * 4 + ["big"] * 60 + ["small"] * 60
    await asyncio.gather(*(turns.run(lane, work(lane), 8) for lane in lanes))
    thread.shutdown()

    assert len(order) == 124
    assert 12 <= order[:80].count("small") <= 28
    assert order[-3:] == ["shadow"] * 3
