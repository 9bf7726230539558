"""Engines: what runs the model of a bundle.

An engine takes lists of token ids of any lengths and gives calibrated probabilities; padding, data types and the
runtime are its own business. `classify` blocks, so asynchronous callers give it a thread of its own.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from overtone.bundle import Bundle, TextEncoder, probabilities
from overtone.errors import BundleError, EngineError

Probabilities = NDArray[np.float32]

SLOW_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")
"""What ONNX Runtime must not fuse for a CPU: its fused kernels are slower there than the parts they replace."""


class Engine(Protocol):
    """Runs one bundle."""

    labels: int

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        """Calibrated probabilities, float32 [n, labels], of `n` >= 1 texts given as token ids, in their order.

        All texts are run at once, padded to the longest. Blocks; does not hold the GIL while the model runs.

        Raises:
            EngineError: the model failed, on at least one of the texts.
        """
        ...

    def close(self) -> None:
        """Free the model. The engine cannot be used after."""
        ...


class OnnxEngine:
    """ONNX Runtime on CPU. Threads may share one; each call runs on the same pool of `threads`."""

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        """Load the model of `bundle`.

        Raises:
            BundleError: the file is no ONNX model, or not one of the shape a bundle has.
        """
        self.labels = len(bundle.labels)
        self._temperature = bundle.temperature
        self._session: Any = _open_session(bundle, threads)
        inputs = {node.name: node for node in self._session.get_inputs()}
        unknown = inputs.keys() - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown or "input_ids" not in inputs:
            raise BundleError(
                f"{bundle.model_path}: inputs are {sorted(inputs)}; input_ids is needed and none beside "
                "attention_mask and token_type_ids can be given"
            )
        self._dtype = np.int32 if inputs["input_ids"].type == "tensor(int32)" else np.int64
        self._has_mask = "attention_mask" in inputs
        self._has_types = "token_type_ids" in inputs
        self._outputs = [self._session.get_outputs()[0].name]
        shape = self.classify([[0, 0]]).shape
        if shape != (1, self.labels):
            raise BundleError(f"{bundle.model_path}: gives {shape} for one text and {self.labels} labels")

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        """See `Engine.classify`."""
        if self._session is None:
            raise EngineError("The engine is closed.")
        ids, mask = pad(token_ids, self._dtype)
        feed = {"input_ids": ids}
        if self._has_mask:
            feed["attention_mask"] = mask
        if self._has_types:
            feed["token_type_ids"] = np.zeros_like(ids)
        try:
            logits = self._session.run(self._outputs, feed)[0]
        except Exception as error:
            raise EngineError(f"The model failed on a batch of {ids.shape[0]} texts, {ids.shape[1]} tokens.") from error
        if not np.isfinite(logits).all():
            raise EngineError(f"The model gave no finite number for a text in a batch of {ids.shape[0]}.")
        return probabilities(logits, self._temperature)

    def close(self) -> None:
        """See `Engine.close`."""
        self._session = None


class FakeEngine:
    """An engine without a model: probabilities follow from the token ids alone. For tests and load studies."""

    def __init__(self, labels: int = 3, *, delay_s: float = 0.0, fail_on: int | None = None) -> None:
        """`delay_s` is slept for each padded token; a text with the token id `fail_on` fails its batch."""
        self.labels = labels
        self._delay_s = delay_s
        self._fail_on = fail_on

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        """See `Engine.classify`. A text gets the same probabilities in every batch."""
        if self._delay_s:
            time.sleep(self._delay_s * len(token_ids) * max(map(len, token_ids)))
        if self._fail_on is not None and any(self._fail_on in ids for ids in token_ids):
            raise EngineError("The batch holds a text that the engine was told to fail on.")
        seeds = np.array([hash(tuple(ids)) % 997 for ids in token_ids], dtype=np.float32)
        logits = np.sin(seeds[:, None] * np.arange(1, self.labels + 1, dtype=np.float32)) * 2
        return probabilities(logits, 1.0)

    def close(self) -> None:
        """See `Engine.close`."""


def open_engine(bundle: Bundle, threads: int = 1) -> Engine:
    """The engine for `bundle` on this machine, with `threads` threads.

    Raises:
        BundleError: the model cannot be loaded.
    """
    return OnnxEngine(bundle, threads)


BUDGET_TOKENS = 512
"""Padded tokens a batch; `python -m benchmarks` measures texts a second around it."""


def classify_sorted(
    engine: Engine, token_ids: Sequence[list[int]], budget_tokens: int = BUDGET_TOKENS
) -> Probabilities:
    """Classify any number of texts in batches of like length; float32 [n, labels] in the order given.

    Raises:
        EngineError: see `Engine.classify`.
    """
    result = np.empty((len(token_ids), engine.labels), dtype=np.float32)
    for rows in plan_batches([len(ids) for ids in token_ids], budget_tokens):
        result[rows] = engine.classify([token_ids[row] for row in rows])
    return result


def plan_batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Split rows into batches of like length, each of at most `budget_tokens` padded tokens or one row."""
    batches: list[list[int]] = []
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > budget_tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    if batch:
        batches.append(batch)
    return batches


def check_golden(bundle: Bundle, engine: Engine, tolerance: float = 0.02) -> None:
    """Classify the golden texts of `bundle` and compare.

    Raises:
        BundleError: a score is further than `tolerance` from the one written down when the bundle was made.
    """
    encoded = TextEncoder(bundle).encode([golden.text for golden in bundle.golden])
    scores = classify_sorted(engine, encoded)
    expected = np.array([golden.scores for golden in bundle.golden], dtype=np.float32)
    distance = np.abs(scores - expected).max(axis=1)
    worst = int(distance.argmax())
    if not distance[worst] <= tolerance:
        raise BundleError(
            f"{bundle.path}: golden text {worst} is scored {distance[worst]:.4f} away from what bundle.json says "
            f"(at most {tolerance} is allowed); this processor or runtime does not run the model as it was measured"
        )


def pad(token_ids: Sequence[Sequence[int]], dtype: type[np.integer[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids and mask, each [n, longest], filled with zeros on the right."""
    lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=dtype)
    ids[mask] = np.concatenate([np.asarray(row, dtype=dtype) for row in token_ids])
    return ids, mask.astype(dtype)


def _open_session(bundle: Bundle, threads: int) -> Any:
    # Half a second to import; callers that only use FakeEngine do not pay it.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A waiting thread that spins takes the core from the replica beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        return onnxruntime.InferenceSession(
            str(bundle.model_path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(SLOW_FUSIONS),
        )
    except Exception as error:
        raise BundleError(f"{bundle.model_path}: ONNX Runtime cannot load it ({error})") from error
