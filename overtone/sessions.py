"""How ONNX Runtime runs a model on one kind of device: sessions, buffers on the device, captured graphs."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from overtone.bundle import Bundle
from overtone.denormals import flushed_denormals
from overtone.errors import BundleError, EngineError
from overtone.hardware import has_fast_int8, read_cpu_features
from overtone.logging import get_logger
from overtone.shapes import Bucket, bucket_for, fill, shape_buckets, shape_profile

SLOW_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")
"""What ONNX Runtime must not fuse for a CPU: its fused kernels are slower there than the parts they replace."""

Array = NDArray[Any]
Result = TypeVar("Result")

_TYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_REPLAY_TOLERANCE = 1e-2
_IDLE_SHARE = 0.2
"""Of the time that the last batch took. A text that waited for that batch comes sooner after it; one that comes later
found nothing else to do, and the core beside may well be idle too."""

# While a graph is captured no other thread may copy to the device, or allocate or free there: the capture would fail.
# So of the bundles a process has, one runs, captures or is freed at a time, and one is opened at a time.
_RUNNING = threading.Lock()
_OPENING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Device:
    """How ONNX Runtime runs a model on one kind of device."""

    provider: str
    """Name of the execution provider; what it has no kernel for runs on the CPU."""
    disabled_fusions: tuple[str, ...] = ()
    takes_turns: bool = False
    """Whether of the batches of a process one runs at a time."""
    memory: str = "cpu"
    """ONNX Runtime's name of the kind of memory that buffers are allocated in."""
    captures: bool = False
    """Whether small batches are padded to buckets, each of which is run as one captured CUDA graph."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the provider."""
    folder: Path | None = None
    """Where the provider keeps what it builds; one process at a time opens a model with it."""
    max_rows: int | None = None
    """Most rows it runs at once."""
    takes_all: bool = False
    """Whether a model of which it cannot run a part is refused, instead of that part running elsewhere."""


CPU = Device("CPUExecutionProvider", SLOW_FUSIONS)
CUDA = Device("CUDAExecutionProvider", takes_turns=True, memory="cuda", captures=True)
TENSORRT = Device("TensorrtExecutionProvider", takes_turns=True, memory="cuda", takes_all=True)
"""`tensorrt_for` says how it runs a given bundle."""


def tensorrt_for(bundle: Bundle, folder: Path | None) -> Device:
    """How TensorRT runs `bundle`; what it builds is kept under `folder`, if one is given.

    An engine fits one model, one version of ONNX Runtime and the shapes it was built for, so each has a folder.
    The kind of GPU is in the names of the files in it.

    Raises:
        BundleError: the file is no ONNX model, or not one of the shape a bundle has.
    """
    import onnxruntime

    profile = shape_profile(bundle.max_length)
    options = {
        "trt_fp16_enable": "True",
        # Sums of squares in layer norms do not fit into fp16.
        "trt_layer_norm_fp32_fallback": "True",
        **profile.options(_read_signature(bundle).inputs),
    }
    kept = None
    if folder is not None:
        most = profile.most
        kept = folder / f"{bundle.version}-{onnxruntime.__version__}-{most.rows}x{most.length}"
        options |= {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(kept),
            "trt_timing_cache_enable": "True",
            # What kernels cost is the same for every model.
            "trt_timing_cache_path": str(folder),
        }
    return replace(TENSORRT, options=options, folder=kept, max_rows=profile.most.rows)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives."""

    ids: Any
    """Number type of token ids."""
    has_mask: bool
    has_types: bool
    output: str
    logits: Any
    """Number type of the logits."""

    @classmethod
    def of(cls, session: Any, bundle: Bundle) -> "Signature":
        """That of the model in `session`.

        Raises:
            BundleError: it takes something else than a bundle's model may.
        """
        inputs = {node.name: node for node in session.get_inputs()}
        unknown = inputs.keys() - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown or "input_ids" not in inputs:
            raise BundleError(
                f"{bundle.model_path}: inputs are {sorted(inputs)}; input_ids is needed and none beside "
                "attention_mask and token_type_ids can be given"
            )
        output = session.get_outputs()[0]
        return cls(
            ids=np.int32 if inputs["input_ids"].type == "tensor(int32)" else np.int64,
            has_mask="attention_mask" in inputs,
            has_types="token_type_ids" in inputs,
            output=output.name,
            logits=_TYPES.get(output.type, np.float32),
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what it takes."""
        empty = np.zeros((1, 1), dtype=self.ids)
        return tuple(self.feed(empty, empty))

    def feed(self, ids: Array, mask: Array) -> dict[str, Array]:
        """The inputs of the model for a padded batch."""
        found = {"input_ids": ids}
        if self.has_mask:
            found["attention_mask"] = mask
        if self.has_types:
            found["token_type_ids"] = np.zeros_like(ids)
        return found


class Runner(Protocol):
    """A model that is ready to run."""

    signature: Signature

    def run(self, ids: Array, mask: Array) -> Array:
        """The logits [n, labels] of a padded batch; raises whatever the runtime raises."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class PlainRunner:
    """Inputs and outputs are the caller's arrays. Threads may run one at the same time."""

    def __init__(self, session: Any, signature: Signature, wide: Any = None) -> None:
        """Use `session` from now on, and `wide`, the same with more threads, for a text that finds it idle."""
        self.signature = signature
        self._session = session
        self._wide = wide
        self._began = self._ended = 0.0

    def run(self, ids: Array, mask: Array) -> Array:
        """See `Runner.run`."""
        now = time.monotonic()
        is_idle = now - self._ended > _IDLE_SHARE * (self._ended - self._began)
        session = self._wide if self._wide is not None and is_idle and len(ids) == 1 else self._session
        with flushed_denormals():
            logits: Array = session.run([self.signature.output], self.signature.feed(ids, mask))[0]
        self._began, self._ended = now, time.monotonic()
        return logits

    def close(self) -> None:
        """See `Runner.close`."""
        self._session = self._wide = None


class DeviceRunner:
    """A model on a device that others of the process use too."""

    def __init__(self, session: Any, signature: Signature, max_rows: int | None = None) -> None:
        """Use `session` from now on, for at most `max_rows` rows at once."""
        self.signature = signature
        self._session = session
        self._max_rows = max_rows

    def run(self, ids: Array, mask: Array) -> Array:
        """See `Runner.run`."""
        step = self._max_rows or len(ids)
        parts = [slice(start, start + step) for start in range(0, len(ids), step)]
        with _RUNNING:
            return np.concatenate([run_ungraphed(self._session, self.signature, ids[one], mask[one]) for one in parts])

    def close(self) -> None:
        """See `Runner.close`."""
        with _RUNNING:
            self._session = None


class GraphRunner:
    """Batches that fit a bucket are padded to it and run as a captured graph; others as by `DeviceRunner`.

    ONNX Runtime keeps a captured graph with the thread that captured it, so everything runs on one thread of this
    runner's own. A graph reads and writes the addresses it was captured with, so each bucket keeps its buffers.
    """

    def __init__(self, session: Any, signature: Signature, labels: int, buckets: Sequence[Bucket], memory: str) -> None:
        """Capture a graph for each of `buckets`, and check that running it gives what the model gives.

        Raises:
            EngineError: a graph gives something else.
            Exception: whatever the runtime raises.
        """
        self.signature = signature
        self._session = session
        self._slots: dict[Bucket, _Slot] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        try:
            # The largest first: the memory that the others need is there then.
            for number, bucket in enumerate(reversed(buckets), start=1):
                make = partial(_Slot, number, bucket, session, signature, labels=labels, memory=memory)
                self._slots[bucket] = self._on_thread(partial(self._captured, make))
        except BaseException:
            self.close()
            raise

    def run(self, ids: Array, mask: Array) -> Array:
        """See `Runner.run`. The result has the rows of `ids` and no others."""
        rows, length = ids.shape
        bucket = bucket_for(tuple(self._slots), rows, length)
        if bucket is None:
            return self._on_thread(lambda: run_ungraphed(self._session, self.signature, ids, mask))
        slot = self._slots[bucket]
        return self._on_thread(lambda: slot.run(*fill(bucket, ids, mask))[:rows])

    def close(self) -> None:
        """See `Runner.close`."""
        if self._session is not None:
            self._on_thread(self._forget)
            self._thread.shutdown()

    def _forget(self) -> None:
        self._slots.clear()
        self._session = None

    def _captured(self, make: Callable[[], "_Slot"]) -> "_Slot":
        slot = make()
        first, second = (_sample(slot.bucket, self.signature.ids, seed) for seed in (0, 1))
        slot.run(*first)
        given = slot.run(*second)
        expected = run_ungraphed(self._session, self.signature, *second)
        if not np.allclose(given, expected, rtol=_REPLAY_TOLERANCE, atol=_REPLAY_TOLERANCE):
            shape = f"{slot.bucket.rows} x {slot.bucket.length}"
            raise EngineError(f"The graph captured for {shape} does not give what the model gives.")
        return slot

    def _on_thread(self, work: Callable[[], Result]) -> Result:
        def alone() -> Result:
            with _RUNNING:
                return work()

        return self._thread.submit(alone).result()


class _Slot:
    """A bucket's buffers on the device, at addresses that stay, and the number of its graph."""

    def __init__(
        self, number: int, bucket: Bucket, session: Any, signature: Signature, *, labels: int, memory: str
    ) -> None:
        from onnxruntime import OrtValue

        self.bucket = bucket
        self._session = session
        self._signature = signature
        self._options = run_options(number)
        shape = (bucket.rows, bucket.length)
        self._inputs = {
            name: OrtValue.ortvalue_from_shape_and_type(shape, signature.ids, memory, 0) for name in signature.inputs
        }
        self._output = OrtValue.ortvalue_from_shape_and_type((bucket.rows, labels), signature.logits, memory, 0)
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(signature.output, self._output)

    def run(self, ids: Array, mask: Array) -> Array:
        """The logits of all rows of the bucket. The first call captures the graph, each later one replays it."""
        for name, values in self._signature.feed(ids, mask).items():
            self._inputs[name].update_inplace(values)
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        # On a CPU it is the buffer itself, which the next batch overwrites.
        return np.array(self._output.numpy())


def run_ungraphed(session: Any, signature: Signature, ids: Array, mask: Array) -> Array:
    """The logits of a padded batch of any shape, without a graph."""
    logits: Array = session.run([signature.output], signature.feed(ids, mask), run_options(-1))[0]
    return logits


@cache
def run_options(graph: int) -> Any:
    """Options of a run that captures or replays the graph numbered `graph`, from 1; -1: neither."""
    from onnxruntime import RunOptions

    options = RunOptions()
    # 0 is the runtime's own.
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def open_runner(bundle: Bundle, threads: int, device: Device, lone_threads: int = 0) -> Runner:
    """Load the model of `bundle`. Where its graph cannot be captured, it runs without, with a warning.

    A text that finds a CPU idle is run by `lone_threads` if those are more and pay; a device shares work out itself.

    Raises:
        BundleError: the file is no ONNX model, or not one of the shape a bundle has, or the device cannot be started.
    """
    if not device.takes_turns:
        session = _open_session(bundle, threads, device)
        is_wide = lone_threads > threads and has_slow_products(bundle.precision, read_cpu_features())
        wide = _open_session(bundle, lone_threads, device) if is_wide else None
        return PlainRunner(session, Signature.of(session, bundle), wide)
    with _OPENING:
        reason = ""
        if device.captures:
            try:
                return _open_graphs(bundle, threads, device)
            except Exception as error:
                reason = str(error)
        with _alone_in(device.folder):
            session = _open_session(bundle, threads, device)
    if reason:
        get_logger().warning("engine.graphs_refused", reason=reason)
    return DeviceRunner(session, Signature.of(session, bundle), device.max_rows)


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """No other process is within this for `folder`, which is made: a second one would read what is half written."""
    if folder is None:
        yield
        return
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot be written ({error.strerror}); TensorRT keeps its engines there"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open_graphs(bundle: Bundle, threads: int, device: Device) -> GraphRunner:
    options = {**device.options, "enable_cuda_graph": "True"} if device.memory == CUDA.memory else device.options
    session = _open_session(bundle, threads, replace(device, options=options))
    signature = Signature.of(session, bundle)
    return GraphRunner(session, signature, len(bundle.labels), shape_buckets(bundle.max_length), device.memory)


def _sample(bucket: Bucket, dtype: Any, seed: int) -> tuple[Array, Array]:
    """A batch of the shape of `bucket`; ids are 0 and 1, which every vocabulary has."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, bucket.length + 1, size=bucket.rows)
    mask = (np.arange(bucket.length) < lengths[:, None]).astype(dtype)
    return (random.integers(0, 2, size=mask.shape) * mask).astype(dtype), mask


def _read_signature(bundle: Bundle) -> Signature:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(bundle.model_path), options, providers=[CPU.provider])
    except Exception as error:
        raise BundleError(f"{bundle.model_path}: ONNX Runtime cannot load it ({error})") from error
    return Signature.of(session, bundle)


def has_slow_products(precision: str, features: frozenset[str] | None) -> bool:
    """Whether the matrix products of a short text take longer than waking a second thread for each of them.

    Those of int8 do not on a processor whose `features` (`read_cpu_features`) name a fast int8 (decision 2).
    """
    return precision != "int8" or not has_fast_int8(features)


def forbid_saturation(options: Any, features: frozenset[str] | None) -> None:
    """Have a session with `options` give int8 models the same scores on every processor.

    On x86 without VNNI sums of products of uint8 and int8 saturate at 16 bits. There ONNX Runtime is told to shift the
    weights to uint8, whose kernel does not. On a processor with AMX it would shift them too, for a kernel that takes
    four times as long, so only processors whose `features` (`read_cpu_features`) name no fast int8 are told.
    """
    if not has_fast_int8(features):
        options.add_session_config_entry("session.x64quantprecision", "1")


def _open_session(bundle: Bundle, threads: int, device: Device) -> Any:
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
    forbid_saturation(options, read_cpu_features())
    if device.memory == CUDA.memory:
        # CUDA and cuDNN that came as Python packages are on no path the system searches.
        onnxruntime.preload_dlls()
    providers = {device.provider: dict(device.options)}
    if device.takes_all:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    else:
        providers.setdefault(CPU.provider, {})
    try:
        # A process's first session would flush denormals on the thread that opens it for good.
        with flushed_denormals():
            session = onnxruntime.InferenceSession(
                str(bundle.model_path),
                options,
                providers=list(providers.items()),
                disabled_optimizers=list(device.disabled_fusions),
                # It would print, and go on with another provider than the one that was chosen.
                enable_fallback=0,
            )
    except Exception as error:
        hint = "; it may need a bundle exported with `export.operators: standard`" if device.takes_all else ""
        raise BundleError(
            f"{bundle.model_path}: ONNX Runtime cannot load it for {device.provider} ({error}){hint}"
        ) from error
    # Some providers that fail to start are left out without an error.
    if device.provider not in session.get_providers():
        raise BundleError(f"{bundle.model_path}: ONNX Runtime cannot start {device.provider}")
    return session
