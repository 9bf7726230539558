"""Engines: what runs the model of a bundle.

An engine takes lists of token ids of any lengths and gives calibrated probabilities; padding, data types and the
runtime are its own business. `classify` blocks, so asynchronous callers give it a thread of its own.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from overtone.bundle import Bundle, Precision, TextEncoder, probabilities
from overtone.errors import BundleError, ConfigurationError, EngineError
from overtone.hardware import has_fast_int8, has_nvidia_driver, read_cpu_features
from overtone.logging import get_logger
from overtone.sessions import CPU, CUDA, TENSORRT, Device, Runner, open_runner, tensorrt_for
from overtone.settings import WantedEngine
from overtone.torch_engine import NO_FORM, TorchEngine, require_installed

Probabilities = NDArray[np.float32]
EngineName = Literal["onnx-cpu", "onnx-cuda", "onnx-tensorrt", "torch"]


class Engine(Protocol):
    """Runs one bundle."""

    labels: int

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        """Calibrated probabilities, float32 [n, labels], of `n` >= 1 texts given as token ids, in their order.

        All texts are run at once. Blocks; does not hold the GIL while the model runs.

        Raises:
            EngineError: the model failed, on at least one of the texts.
        """
        ...

    def close(self) -> None:
        """Free the model. The engine cannot be used after."""
        ...


class OnnxEngine:
    """ONNX Runtime on one device. Threads may share one; each call runs on the same pool of `threads`.

    On a CPU a text that comes alone, while nothing runs, is run by `lone_threads` if those are more and pay.
    `TENSORRT` has not been run on a device yet; what it does otherwise than `CPU` was run on a CPU alone.
    """

    def __init__(self, bundle: Bundle, threads: int = 1, device: Device = CPU, *, lone_threads: int = 0) -> None:
        """Load the model of `bundle`.

        Raises:
            BundleError: the file is no ONNX model, or not one of the shape a bundle has, or the device cannot run it.
        """
        self.labels = len(bundle.labels)
        self._temperature = bundle.temperature
        self._runner: Runner | None = open_runner(bundle, threads, device, lone_threads)
        try:
            shape = self.classify([[0, 0]]).shape
        except EngineError as error:
            self.close()
            reason = error.__cause__ or error
            raise BundleError(f"{bundle.model_path}: fails on {device.provider} ({reason})") from error
        if shape != (1, self.labels):
            self.close()
            raise BundleError(f"{bundle.model_path}: gives {shape} for one text and {self.labels} labels")

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        """See `Engine.classify`."""
        runner = self._runner
        if runner is None:
            raise EngineError("The engine is closed.")
        ids, mask = pad(token_ids, runner.signature.ids)
        try:
            logits = runner.run(ids, mask)
        except Exception as error:
            raise EngineError(f"The model failed on a batch of {ids.shape[0]} texts, {ids.shape[1]} tokens.") from error
        if not np.isfinite(logits).all():
            raise EngineError(f"The model gave no finite number for a text in a batch of {ids.shape[0]}.")
        return probabilities(logits.astype(np.float32, copy=False), self._temperature)

    def close(self) -> None:
        """See `Engine.close`."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()


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


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine, and why it was chosen."""

    name: EngineName
    reason: str


def choose_engine(
    wanted: WantedEngine, providers: Collection[str], precision: Precision, *, has_torch_form: bool = False
) -> Choice:
    """The engine for a bundle of `precision` where ONNX Runtime can use `providers`.

    Raises:
        BundleError: `wanted` cannot run a bundle of that precision, or without a torch form.
        ConfigurationError: `wanted` needs a provider or a package that is not there.
    """
    if wanted == "torch":
        require_installed()
        if not has_torch_form:
            raise BundleError(NO_FORM)
        return Choice("torch", "ENGINE asks for it")
    has_cuda = CUDA.provider in providers
    if wanted == "onnx-cpu":
        return Choice("onnx-cpu", "ENGINE asks for it")
    if wanted != "auto":
        if not has_cuda or (wanted == "onnx-tensorrt" and TENSORRT.provider not in providers):
            device = "TensorRT" if has_cuda else "CUDA device"
            raise ConfigurationError(
                f"ENGINE is {wanted}, but ONNX Runtime finds no {device} here. Install the extra `gpu` in place of "
                "the package onnxruntime, check that nvidia-smi shows a GPU, or set ENGINE=auto."
            )
        if precision == "int8":
            raise BundleError(
                f"ENGINE is {wanted}, but this bundle is int8, whose operators have kernels for CPUs alone; "
                "export it with `export.precision: fp16` or fp32, or set ENGINE=auto"
            )
        return Choice(wanted, "ENGINE asks for it")
    if not has_cuda:
        return Choice("onnx-cpu", "ONNX Runtime finds no CUDA device here")
    if precision == "int8":
        return Choice("onnx-cpu", "the bundle is int8, whose operators have kernels for CPUs alone")
    return Choice("onnx-cuda", f"ONNX Runtime finds a CUDA device, and the bundle is {precision}")


def is_slow(precision: Precision, features: frozenset[str] | None) -> bool:
    """Whether a processor with `features` is known to lack what a bundle of `precision` is made for."""
    return precision == "int8" and has_fast_int8(features) is False


def usable_providers() -> list[str]:
    """The execution providers of the installed ONNX Runtime, less those for GPUs where no driver is loaded."""
    import onnxruntime

    providers: list[str] = onnxruntime.get_available_providers()
    on_gpu = {CUDA.provider, TENSORRT.provider}
    return [name for name in providers if name not in on_gpu or has_nvidia_driver()]


def open_engine(
    bundle: Bundle,
    threads: int = 1,
    *,
    wanted: WantedEngine = "auto",
    providers: Collection[str] | None = None,
    built: Path | None = None,
    lone_threads: int = 0,
) -> Engine:
    """The engine for `bundle` on this machine, with `threads` threads. `providers` default to `usable_providers()`.

    `lone_threads`: see `OnnxEngine`.
    TensorRT keeps what it builds in the folder `built`; without, it builds anew at each load, for minutes.

    Raises:
        BundleError: the model cannot be loaded, or the device that `wanted` names cannot run it.
        ConfigurationError: this machine has not what `wanted` needs.
    """
    found = usable_providers() if providers is None else providers
    choice = choose_engine(wanted, found, bundle.precision, has_torch_form=bundle.torch is not None)
    if choice.name == "torch":
        return TorchEngine(bundle, threads)
    if choice.name == "onnx-cpu" and is_slow(bundle.precision, read_cpu_features()):
        get_logger().warning("engine.int8_is_slow", reason="the processor has no VNNI, AMX or dot product")
    try:
        return OnnxEngine(bundle, threads, _device(choice.name, bundle, built), lone_threads=lone_threads)
    except BundleError as error:
        # Drivers that are too old, and devices that Ray keeps from this replica, show only here.
        if wanted != "auto" or choice.name == "onnx-cpu":
            raise
        get_logger().warning("engine.device_refused", reason=error.message)
        return OnnxEngine(bundle, threads, lone_threads=lone_threads)


def _device(name: EngineName, bundle: Bundle, built: Path | None) -> Device:
    if name == "onnx-tensorrt":
        return tensorrt_for(bundle, built)
    return CUDA if name == "onnx-cuda" else CPU


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
    """Classify the golden texts of `bundle` and compare with what this form of the model must give them.

    Raises:
        BundleError: a score is further than `tolerance` from the one written down when the bundle was made.
    """
    encoded = TextEncoder(bundle).encode([golden.text for golden in bundle.golden])
    scores = classify_sorted(engine, encoded)
    on_torch = bundle.torch if isinstance(engine, TorchEngine) else None
    golden = on_torch.golden if on_torch else tuple(golden.scores for golden in bundle.golden)
    expected = np.array(golden, dtype=np.float32)
    distance = np.abs(scores - expected).max(axis=1)
    worst = int(distance.argmax())
    if not distance[worst] <= tolerance:
        raise BundleError(
            f"{bundle.path}: golden text {worst} is scored {distance[worst]:.4f} away from what the bundle says "
            f"(at most {tolerance} is allowed); this processor or runtime does not run the model as it was measured"
        )


def pad(token_ids: Sequence[Sequence[int]], dtype: type[np.integer[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids and mask, each [n, longest], filled with zeros on the right."""
    lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=dtype)
    ids[mask] = np.fromiter(chain.from_iterable(token_ids), dtype, lengths.sum())
    return ids, mask.astype(dtype)
