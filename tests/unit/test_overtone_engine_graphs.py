"""Batches on a device: padded to buckets and run as captured graphs, without a trace of it in the results.

No device is needed: `CapturingSession` does with a model on the CPU what ONNX Runtime does with one on CUDA.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.bundle import Bundle
from overtone.engine import CPU, Device, OnnxEngine, pad
from overtone.errors import EngineError
from overtone.sessions import GraphRunner, Signature
from overtone.shapes import MAX_BUCKET_TOKENS, MAX_BUCKETS, Bucket, bucket_for, fill, shape_buckets

GRAPHS_ON_CPU = Device(CPU.provider, CPU.disabled_fusions, takes_turns=True, captures=True)
BUCKETS = (Bucket(1, 4), Bucket(2, 4), Bucket(4, 4), Bucket(2, 8))


class CapturingSession:
    """A session on the CPU that captures and replays as CUDA does.

    The first run of a number remembers its thread and its binding; each later one runs that binding, whichever it is
    given, and finds nothing on another thread.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._session: Any = onnxruntime.InferenceSession(bundle.model_path, providers=[CPU.provider])
        self._captured: dict[tuple[int, str], Any] = {}
        self.runs: list[str] = []
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs
        self.io_binding = self._session.io_binding

    def run(self, names: list[str], feed: dict[str, Any], options: Any) -> Any:
        self.runs.append(options.get_run_config_entry("gpu_graph_id"))
        assert self.runs[-1] == "-1"
        return self._session.run(names, feed)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        self.runs.append(number)
        if number != "-1":
            binding = self._captured.setdefault((threading.get_ident(), number), binding)
        self.replay(binding, number)

    def replay(self, binding: Any, number: str) -> None:
        self._session.run_with_iobinding(binding)

    @property
    def captures(self) -> int:
        return len(self._captured)


class StaleSession(CapturingSession):
    """Each graph gives again what it gave when it was captured."""

    def replay(self, binding: Any, number: str) -> None:
        if number == "-1" or self.runs.count(number) == 1:
            super().replay(binding, number)


def runner_of(session: CapturingSession, bundle: Bundle) -> GraphRunner:
    return GraphRunner(session, Signature.of(session, bundle), len(bundle.labels), BUCKETS, "cpu")


@pytest.fixture
def capturing(tiny_bundle: Bundle) -> Iterator[tuple[CapturingSession, GraphRunner]]:
    session = CapturingSession(tiny_bundle)
    runner = runner_of(session, tiny_bundle)
    session.runs.clear()
    yield session, runner
    runner.close()


@given(st.integers(3, 8192))
def test_buckets_are_few_small_and_no_longer_than_a_text(max_length: int) -> None:
    buckets = shape_buckets(max_length)
    assert 0 < len(buckets) <= MAX_BUCKETS
    assert len(set(buckets)) == len(buckets)
    assert all(one.length <= max_length and one.tokens <= MAX_BUCKET_TOKENS for one in buckets)
    assert list(buckets) == sorted(buckets, key=lambda one: (one.tokens, one.rows))
    assert bucket_for(buckets, 1, min(max_length, 16)) is not None


def test_the_buckets_of_the_default_length() -> None:
    assert [(one.rows, one.length) for one in shape_buckets(128)][:4] == [(1, 16), (1, 32), (2, 16), (1, 64)]
    assert len(shape_buckets(128)) == 26
    assert shape_buckets(128)[-1].tokens == MAX_BUCKET_TOKENS


@given(st.integers(1, 140), st.integers(1, 140))
def test_a_batch_gets_the_smallest_bucket_that_holds_it(rows: int, length: int) -> None:
    buckets = shape_buckets(128)
    bucket = bucket_for(buckets, rows, length)
    holding = [one for one in buckets if one.rows >= rows and one.length >= length]
    if bucket is None:
        assert not holding
        return
    assert bucket in holding
    assert bucket.tokens == min(one.tokens for one in holding)
    if length > 16:
        assert bucket.tokens < 4 * rows * length


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=8), min_size=1, max_size=4))
def test_filling_keeps_the_batch_and_leaves_no_row_without_a_token(token_ids: list[list[int]]) -> None:
    ids, mask = pad(token_ids, np.int64)
    rows, length = ids.shape
    filled_ids, filled_mask = fill(Bucket(5, 9), ids, mask)
    assert filled_ids.shape == filled_mask.shape == (5, 9)
    np.testing.assert_array_equal(filled_ids[:rows, :length], ids)
    np.testing.assert_array_equal(filled_mask[:rows, :length], mask)
    assert not filled_ids[filled_mask == 0].any()
    assert filled_mask.sum(axis=1).tolist() == [*mask.sum(axis=1).tolist(), *[1] * (5 - rows)]


def test_every_bucket_is_captured_once_at_load(tiny_bundle: Bundle) -> None:
    session = CapturingSession(tiny_bundle)
    runner = runner_of(session, tiny_bundle)
    assert session.captures == len(BUCKETS)
    # Captured, replayed, and compared with a run without a graph; 0 is the runtime's own number.
    assert session.runs == [part for number in "1234" for part in (number, number, "-1")]
    runner.close()


@pytest.mark.parametrize(
    ("rows", "length", "numbers"),
    [(1, 4, ["4"]), (1, 2, ["4"]), (2, 3, ["3"]), (3, 4, ["2"]), (1, 5, ["1"]), (3, 5, ["-1"]), (5, 2, ["-1"])],
)
def test_batches_run_as_the_graph_of_their_bucket_or_as_none(
    capturing: tuple[CapturingSession, GraphRunner], rows: int, length: int, numbers: list[str]
) -> None:
    session, runner = capturing
    ids, mask = pad([[1] * length] * rows, np.int64)
    assert runner.run(ids, mask).shape == (rows, 3)
    assert session.runs == numbers


def test_graphs_give_what_the_model_gives_and_no_row_more(
    capturing: tuple[CapturingSession, GraphRunner], tiny_bundle: Bundle
) -> None:
    session, runner = capturing
    plain: Any = onnxruntime.InferenceSession(tiny_bundle.model_path, providers=[CPU.provider])
    random = np.random.default_rng(1)
    kept = []
    for _ in range(60):
        rows = [random.integers(0, 12, size=random.integers(1, 9)).tolist() for _ in range(random.integers(1, 6))]
        ids, mask = pad(rows, np.int64)
        expected = plain.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        kept.append((runner.run(ids, mask), expected))
    # Only now: a later batch must not write into an earlier result.
    for given_, expected in kept:
        np.testing.assert_allclose(given_, expected, atol=1e-6)
    assert {"1", "2", "3", "4", "-1"} == set(session.runs)


def test_threads_share_the_thread_that_captured(capturing: tuple[CapturingSession, GraphRunner]) -> None:
    session, runner = capturing
    batches = [pad([[word, 2], [word]], np.int64) for word in range(3, 9)] * 10
    expected = [runner.run(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for scores, wanted in zip(pool.map(lambda batch: runner.run(*batch), batches), expected, strict=True):
            np.testing.assert_array_equal(scores, wanted)
    assert session.captures == len(BUCKETS)


def test_a_graph_that_gives_something_else_is_refused(tiny_bundle: Bundle) -> None:
    before = threading.active_count()
    with pytest.raises(EngineError, match="captured for 2 x 8"):
        runner_of(StaleSession(tiny_bundle), tiny_bundle)
    assert threading.active_count() == before, "the runner's thread was left running"


def test_an_engine_with_buckets_gives_what_one_without_gives(tiny_bundle: Bundle) -> None:
    texts = [[1, 4, 2], [1, 8, 8, 9, 2], [1, 2], [1, 6, 4, 5, 5, 5, 2], [1, 7, 2]]
    engine, plain = OnnxEngine(tiny_bundle, device=GRAPHS_ON_CPU), OnnxEngine(tiny_bundle)
    for count in range(1, 6):
        np.testing.assert_allclose(engine.classify(texts[:count]), plain.classify(texts[:count]), atol=1e-6)
    np.testing.assert_allclose(engine.classify(texts * 9), plain.classify(texts * 9), atol=1e-6)
    with pytest.raises(EngineError, match="batch of"):
        engine.classify([[1, 99, 2]])
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.classify(texts)


def test_a_device_without_graphs_runs_without(tiny_bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    # A kind of memory that this build of the runtime cannot allocate stands for a graph that cannot be captured.
    device = Device(CPU.provider, CPU.disabled_fusions, takes_turns=True, captures=True, memory="cann")
    engine = OnnxEngine(tiny_bundle, device=device)
    assert "engine.graphs_refused" in "".join(capfd.readouterr())
    np.testing.assert_array_equal(engine.classify([[1, 4, 2]]), OnnxEngine(tiny_bundle).classify([[1, 4, 2]]))
    engine.close()
