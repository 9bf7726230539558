"""The engine on torch: packed rows of any lengths, no padding. For bundles that were exported with their torch form.

The only module of the floor that uses torch, and it is imported when an engine is opened: nothing else needs it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from overtone.bundle import Bundle, probabilities
from overtone.errors import BundleError, ConfigurationError, EngineError
from overtone.hardware import has_fast_bf16, read_cpu_features
from overtone.logging import get_logger
from overtone.packed import Packed, PackedBucket, fill_packed, pack, packed_bucket_for, packed_buckets
from overtone.torch_form import TorchForm

Tensor = Any
Turn = Callable[[], AbstractContextManager[None]]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes work that always reads and writes the same tensors; what it gives does that work again."""

NO_FORM = (
    "ENGINE is torch, but this bundle has no torch weights; export it with `export.torch: true`, or set ENGINE=auto"
)

_REPLAY_TOLERANCE = 1e-2
_HEAD = 8
"""Kernels for rows of several lengths take heads whose width is a multiple of this, and no wider than `_MAX_HEAD`."""
_MAX_HEAD = 256

# While a graph is captured no other thread may use the device, so the bundles of a process take turns.
_DEVICE = threading.Lock()


@dataclass(frozen=True, slots=True)
class Target:
    """Where the matrix products of a model run, and how."""

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "fp16"]
    """Of matrix products and attention; what layers add up to and norms are float32 always."""
    varlen: bool
    """Whether one kernel attends within rows of all lengths; else each length is a call."""
    reason: str

    @property
    def captures(self) -> bool:
        """Whether small batches run as captured graphs: the calls of a batch must not depend on its lengths."""
        return self.device == "cuda" and self.varlen


def choose_target(features: frozenset[str] | None, capability: tuple[int, int] | None) -> Target:
    """The target for a processor with `features` and, if any, a GPU of NVIDIA's compute `capability`."""
    if capability is not None:
        name = f"a CUDA device of compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return Target("cuda", "bf16", varlen=True, reason=name)
        if capability >= (7, 0):
            return Target("cuda", "fp16", varlen=False, reason=f"{name}, which has no bf16")
        return Target("cuda", "fp32", varlen=False, reason=f"{name}, which has no fast half precision")
    if has_fast_bf16(features):
        return Target("cpu", "bf16", varlen=False, reason="the processor multiplies bf16, and there is no CUDA device")
    return Target("cpu", "fp32", varlen=False, reason="there is no CUDA device, and no bf16 in the processor")


def is_installed() -> bool:
    """Whether torch and what reads its weights can be imported."""
    return all(find_spec(name) is not None for name in ("torch", "safetensors"))


def require_installed() -> None:
    """Refuse to go on without what `is_installed` looks for.

    Raises:
        ConfigurationError: it is not there.
    """
    if not is_installed():
        raise ConfigurationError(
            "ENGINE is torch, but torch is not installed here. Install the extra `torch` "
            "(pip install 'overtone[torch]'), or set ENGINE=auto."
        )


def import_torch() -> Any:
    """The module `torch`.

    Raises:
        ConfigurationError: it is not installed.
    """
    require_installed()
    import torch

    return torch


def usable_target() -> Target:
    """The target on this machine.

    Raises:
        ConfigurationError: torch is not installed.
    """
    cuda = import_torch().cuda
    return choose_target(read_cpu_features(), cuda.get_device_capability() if cuda.is_available() else None)


class TorchEngine:
    """A bundle's torch form. Threads may share one.

    On a CPU each call uses `threads` threads.
    """

    def __init__(self, bundle: Bundle, threads: int = 1, target: Target | None = None) -> None:
        """Load the weights of `bundle` for `target`, by default that of this machine.

        Raises:
            BundleError: the bundle has no torch form, or the weights are not those of a model of its shape.
            ConfigurationError: torch is not installed.
        """
        if bundle.torch is None:
            raise BundleError(f"{bundle.path}: {NO_FORM}")
        self._torch = import_torch()
        self.labels = len(bundle.labels)
        self.target = target or usable_target()
        self._temperature = bundle.torch.temperature
        self._threads = threads
        self._model: _Model | None = None
        self._graphs: _Graphs | None = None
        try:
            with self._turn():
                self._model = _Model(bundle.torch, _read_weights(bundle), self.target)
            self._model.require_positions(bundle.max_length)
            self._graphs = _open_graphs(self._model, self.target, bundle.max_length, self._turn)
            shape = self.classify([[0, 0]]).shape
        except (EngineError, KeyError, ValueError, RuntimeError) as error:
            self.close()
            reason = repr(error.__cause__ or error)
            raise BundleError(f"{bundle.torch_weights_path}: fails on {self.target.device} ({reason})") from error
        if shape != (1, self.labels):
            self.close()
            raise BundleError(f"{bundle.torch_weights_path}: gives {shape} for one text and {self.labels} labels")

    def classify(self, token_ids: list[list[int]]) -> NDArray[np.float32]:
        """See `overtone.engine.Engine.classify`; nothing is padded."""
        model = self._model
        if model is None:
            raise EngineError("The engine is closed.")
        try:
            batch = pack(token_ids)
            model.require_known(batch)
            with self._turn():
                logits = (self._graphs or model).run(batch)
        except Exception as error:
            raise EngineError(f"The model failed on a batch of {len(token_ids)} texts.") from error
        if not np.isfinite(logits).all():
            raise EngineError(f"The model gave no finite number for a text in a batch of {len(token_ids)}.")
        result = np.empty_like(logits)
        result[batch.order] = probabilities(logits, self._temperature)
        return result

    def close(self) -> None:
        """See `overtone.engine.Engine.close`."""
        with _DEVICE if self.target.device == "cuda" else nullcontext():
            self._model = self._graphs = None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Within it the model may run: on a device nothing else does, on a CPU torch has this engine's threads."""
        torch = self._torch
        if self.target.device == "cuda":
            with _DEVICE, torch.inference_mode():
                yield
            return
        # The number is the process's, and each thread takes it over when it first computes.
        before = torch.get_num_threads()
        if before != self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            if before != self._threads:
                torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class _Batch:
    """A packed batch on the device."""

    tokens: Tensor
    """Ids, positions and rows, int64 [3, tokens]."""
    starts: Tensor
    """int32 [rows + 1]."""
    longest: int
    groups: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Linear
    out: _Linear
    first_norm: _Linear
    up: _Linear
    down: _Linear
    second_norm: _Linear


class _Model:
    """The encoder and its head, over packed rows."""

    def __init__(self, form: TorchForm, weights: Mapping[str, Tensor], target: Target) -> None:
        """Put `weights` where `target` says.

        Raises:
            KeyError: a tensor of the form is missing.
            ValueError: the width of the model is not that of its heads.
        """
        import torch

        self._torch, self._form, self._target = torch, form, target
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[target.precision]

        def plain(name: str, dtype: Any = torch.float32) -> Tensor:
            return weights[name].to(target.device, dtype)

        def part(name: str, dtype: Any = torch.float32) -> _Linear:
            return _Linear(plain(f"{name}.weight", dtype), plain(f"{name}.bias", dtype))

        self._words = plain("embed.words.weight")
        self._positions = plain("embed.positions.weight")
        self._embed_norm = part("embed.norm")
        self._project = part("embed.project") if "embed.project.weight" in weights else None
        products = ("qkv", "out", "up", "down")
        types = dict.fromkeys(("first_norm", "second_norm"), torch.float32) | dict.fromkeys(products, self._dtype)
        self._layers = [
            _Layer(**{name: part(f"layers.{number}.{name}", dtype) for name, dtype in types.items()})
            for number in range(form.layers)
        ]
        self._dense = part("head.dense") if form.head else None
        self._last = part("head.last")
        width = self._layers[0].out.weight.shape[0]
        self._head_width, rest = divmod(width, form.heads)
        if rest:
            raise ValueError(f"{width} numbers a token cannot be shared out among {form.heads} heads")
        self.device = target.device
        self.labels = int(self._last.weight.shape[0])

    @property
    def attends_to_any_lengths(self) -> bool:
        """Whether one call attends within rows of all lengths."""
        return self._target.varlen and self._head_width % _HEAD == 0 and self._head_width <= _MAX_HEAD

    def require_known(self, batch: Packed) -> None:
        """Refuse what the tables have no row for: a GPU would fail for good.

        Raises:
            ValueError: a token id or a position is beyond its table.
        """
        if batch.ids.min() < 0 or batch.ids.max() >= len(self._words):
            raise ValueError(f"a token id is outside the vocabulary of {len(self._words)}")
        self.require_positions(batch.longest)

    def require_positions(self, tokens: int) -> None:
        """Refuse texts of so many tokens.

        Raises:
            ValueError: there are fewer positions.
        """
        if tokens > len(self._positions):
            raise ValueError(f"a text of {tokens} tokens is longer than {len(self._positions)}")

    def run(self, batch: Packed) -> NDArray[np.float32]:
        """The logits [rows, labels] of `batch`, in its own order."""
        tokens = np.stack([batch.ids, batch.positions, batch.rows])
        logits = self.logits(_Batch(self.put(tokens), self.put(batch.starts), batch.longest, batch.groups))
        found: NDArray[np.float32] = logits.cpu().numpy()
        return found

    def put(self, values: NDArray[Any]) -> Tensor:
        """A tensor of `values` on the device."""
        return self._torch.from_numpy(values).to(self.device)

    def logits(self, batch: _Batch) -> Tensor:
        """float32 [rows, labels]. What it does depends on the sizes of `batch` alone if `attends_to_any_lengths`."""
        functions = self._torch.nn.functional
        ids, positions, rows = batch.tokens.unbind(0)
        hidden = functions.embedding(ids, self._words) + functions.embedding(positions, self._positions)
        hidden = self._norm(hidden, self._embed_norm)
        if self._project is not None:
            hidden = self._linear(hidden, self._project)
        for layer in self._layers:
            qkv = self._linear(hidden.to(self._dtype), layer.qkv)
            attended = self._attend(qkv.view(len(ids), 3, self._form.heads, self._head_width), batch)
            hidden = self._norm(hidden + self._linear(attended.reshape(len(ids), -1), layer.out), layer.first_norm)
            inner = self._linear(hidden.to(self._dtype), layer.up)
            inner = self._linear(self._activate(self._form.activation, inner), layer.down)
            hidden = self._norm(hidden + inner, layer.second_norm)
        vectors = self._pool(hidden, rows, batch.starts)
        if self._dense is not None and self._form.head is not None:
            vectors = self._activate(self._form.head, self._linear(vectors, self._dense))
        return self._linear(vectors, self._last)

    def _attend(self, qkv: Tensor, batch: _Batch) -> Tensor:
        """[tokens, heads, width of a head] of [tokens, 3, heads, width of a head], each row within itself."""
        if self.attends_to_any_lengths:
            from torch.nn.attention.varlen import varlen_attn

            query, key, value = qkv.unbind(1)
            return varlen_attn(query, key, value, batch.starts, batch.starts, batch.longest, batch.longest)
        parts, start = [], 0
        for rows, length in batch.groups:
            part = qkv[start : start + rows * length].view(rows, length, *qkv.shape[1:])
            start += rows * length
            query, key, value = part.permute(2, 0, 3, 1, 4)
            found = self._torch.nn.functional.scaled_dot_product_attention(query, key, value)
            parts.append(found.transpose(1, 2).reshape(rows * length, *qkv.shape[2:]))
        return parts[0] if len(parts) == 1 else self._torch.cat(parts)

    def _pool(self, hidden: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        """The vector of each row. Tokens of the row after the last one are filling, and may hold no numbers."""
        count = len(starts) - 1
        if self._form.pooling == "first":
            return hidden[starts[:-1].long().clamp(max=len(hidden) - 1)]
        sums = hidden.new_zeros(count + 1, hidden.shape[1]).index_add_(0, rows, hidden)
        return sums[:count] / (starts[1:] - starts[:-1]).clamp(min=1).unsqueeze(1)

    def _norm(self, values: Tensor, norm: _Linear) -> Tensor:
        shape = (values.shape[-1],)
        return self._torch.nn.functional.layer_norm(values, shape, norm.weight, norm.bias, self._form.epsilon)

    def _linear(self, values: Tensor, part: _Linear) -> Tensor:
        return self._torch.nn.functional.linear(values, part.weight, part.bias)

    def _activate(self, name: str, values: Tensor) -> Tensor:
        functions = self._torch.nn.functional
        if name == "tanh":
            return self._torch.tanh(values)
        if name == "relu":
            return functions.relu(values)
        return functions.gelu(values, approximate="tanh" if name == "gelu_tanh" else "none")


class _Graphs:
    """Batches that fit a bucket are filled up to it and run as a captured graph; others as they are.

    A graph reads and writes the addresses it was captured with, so each bucket keeps its tensors.
    """

    def __init__(
        self, model: _Model, buckets: Sequence[PackedBucket], longest: int, capture: Capture, turn: Turn
    ) -> None:
        """Capture a graph for each of `buckets`, for rows of at most `longest` tokens, and check what it gives.

        Each takes a `turn` of its own, so that a bundle in use runs in between.

        Raises:
            EngineError: a graph does not give what the model gives.
            Exception: whatever torch raises.
        """
        self._model = model
        self._buckets = tuple(buckets)
        self._longest = longest
        self._slots: dict[PackedBucket, _Slot] = {}
        # The largest first: the memory that the others need is there then.
        for bucket in reversed(self._buckets):
            with turn():
                slot = _Slot(bucket, model, min(longest, bucket.tokens), capture)
                sample = _sample(bucket, min(longest, bucket.tokens))
                given, expected = slot.run(sample), model.run(sample)
            if not np.allclose(given, expected, rtol=_REPLAY_TOLERANCE, atol=_REPLAY_TOLERANCE):
                raise EngineError(f"The graph captured for {bucket.tokens} tokens does not give what the model gives.")
            self._slots[bucket] = slot

    def run(self, batch: Packed) -> NDArray[np.float32]:
        """See `_Model.run`."""
        # A graph attends no further than the longest row it was captured for.
        bucket = packed_bucket_for(self._buckets, batch) if batch.longest <= self._longest else None
        return self._slots[bucket].run(batch) if bucket else self._model.run(batch)


class _Slot:
    """The tensors of a bucket, at addresses that stay, and its graph."""

    def __init__(self, bucket: PackedBucket, model: _Model, longest: int, capture: Capture) -> None:
        self._bucket, self._model = bucket, model
        tokens, starts = fill_packed(bucket, pack([[0, 0]]))
        static = _Batch(model.put(tokens), model.put(starts), longest)
        self._tokens, self._starts = static.tokens, static.starts
        self._replay = capture(lambda: model.logits(static))

    def run(self, batch: Packed) -> NDArray[np.float32]:
        """The logits of the rows of `batch`, which fits."""
        tokens, starts = fill_packed(self._bucket, batch)
        self._tokens.copy_(self._model.put(tokens))
        self._starts.copy_(self._model.put(starts))
        logits: NDArray[np.float32] = self._replay()[: len(batch.order)].cpu().numpy()
        # On a CPU it is the tensor itself, which the next batch overwrites.
        return logits.copy()


def _open_graphs(model: _Model, target: Target, longest: int, turn: Turn) -> _Graphs | None:
    """Graphs for `model`, if `target` captures and its device agrees."""
    if not (target.captures and model.attends_to_any_lengths):
        return None
    try:
        return _Graphs(model, packed_buckets(), longest, _cuda_capture(), turn)
    except Exception as error:
        get_logger().warning("engine.graphs_refused", reason=str(error))
        return None


def _cuda_capture() -> Capture:
    """Captures on the CUDA device, all graphs with one pool of memory: no two of them run at a time."""
    import torch

    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # Libraries set themselves up in the first runs, which cannot be captured.
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = work()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return capture


def _sample(bucket: PackedBucket, longest: int) -> Packed:
    """A batch that fits `bucket` and does not fill it; ids are 0 and 1, which every vocabulary has."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, min(longest, bucket.tokens // bucket.rows) + 1, size=bucket.rows)
    lengths[-1] = min(longest, max(1, (bucket.tokens - lengths[:-1].sum()) // 2))
    return pack([random.integers(0, 2, size=length).tolist() for length in lengths])


def _read_weights(bundle: Bundle) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: Mapping[str, Tensor] = load_file(bundle.torch_weights_path)
    except SafetensorError as error:
        raise ValueError(f"no file of tensors: {error}") from error
    return weights
