"""Texts in, predictions out: one bundle's tokenizer, batcher and engine, and the change to another bundle.

The engine runs on one thread of its own and large requests are tokenised on another, so the event loop never blocks
for long. Knows no HTTP and no Ray.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from overtone import metrics
from overtone.bundle import Bundle, TextEncoder, load_bundle
from overtone.engine import Engine, check_golden, open_engine
from overtone.errors import ShuttingDownError, UnavailableError
from overtone.logging import get_logger
from serve.batcher import BatchReport, Limits, Priority, TokenBatcher, TokenIds

Scores = list[float]
"""Calibrated probability of each label, in the order of the bundle's labels."""

INTERACTIVE_TEXTS = 16
"""A request of more texts is bulk."""

_INLINE_CHARS = 4_000
_SLICE_TEXTS = 128


@dataclass(frozen=True, slots=True)
class Answer:
    """The scores of each text, or why it has none, and the bundle that gave them."""

    bundle: Bundle
    rows: list[Scores | Exception]


@dataclass(frozen=True, slots=True)
class _Loaded:
    bundle: Bundle
    encoder: TextEncoder
    engine: Engine
    batcher: TokenBatcher[Scores]


class Classifier:
    """Classifies with the bundle that was loaded last."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        threads: int = 1,
        engine_for: Callable[[Bundle, int], Engine] = open_engine,
    ) -> None:
        """Nothing is loaded yet: `load` does."""
        self._limits = limits or Limits()
        self._threads = threads
        self._engine_for = engine_for
        self._loaded: _Loaded | None = None
        self._loading = asyncio.Lock()
        self._engine_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._other_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def is_ready(self) -> bool:
        """Whether a bundle is loaded, warm and checked."""
        return self._loaded is not None

    @property
    def bundle(self) -> Bundle:
        """The bundle in use.

        Raises:
            UnavailableError: none is loaded yet.
        """
        return self._current().bundle

    @property
    def waiting(self) -> int:
        """Texts that wait for the engine."""
        return self._loaded.batcher.waiting if self._loaded else 0

    @property
    def is_failing(self) -> bool:
        """Whether the engine has failed on so many texts in a row that the texts are not to blame."""
        return self._loaded is not None and self._loaded.batcher.failures_in_a_row >= 32

    async def load(self, path: Path | None) -> Bundle:
        """Load the bundle at `path` (default: the one in the package) beside the one in use, then change to it.

        The new one is warmed and its golden texts are checked first; requests that the old one took are answered
        by it.

        Raises:
            BundleError: the bundle is not fit for use; the old one stays.
        """
        async with self._loading:
            loop = asyncio.get_running_loop()
            bundle = await loop.run_in_executor(self._other_thread, load_bundle, path)
            old = self._loaded
            if old is not None and old.bundle.version == bundle.version:
                return old.bundle
            self._loaded = await loop.run_in_executor(self._other_thread, self._open, bundle)
        if old is not None:
            task = loop.create_task(self._retire(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        get_logger().info("bundle.loaded", model_version=bundle.version, replaced=old.bundle.version if old else None)
        return bundle

    async def classify(self, texts: Sequence[str], *, deadline_s: float | None = None) -> Answer:
        """Classify valid `texts`, all with one bundle.

        Raises:
            OverloadedError, DeadlineExceededError, ShuttingDownError: see `TokenBatcher.submit`.
            UnavailableError: no bundle is loaded yet.
        """
        priority: Priority = "interactive" if len(texts) <= INTERACTIVE_TEXTS else "bulk"
        while True:
            loaded = self._current()
            try:
                loaded.batcher.admit(len(texts), priority)
                token_ids = await self._encode(loaded.encoder, texts)
                rows = await loaded.batcher.submit(token_ids, priority=priority, deadline_s=deadline_s)
            except ShuttingDownError:
                if loaded is self._loaded:
                    raise
                continue  # the bundle was changed while the texts were prepared for the old one
            _TEXTS[priority].inc(len(texts))
            return Answer(loaded.bundle, rows)

    async def close(self) -> None:
        """Answer what was taken, refuse what comes, free the engine."""
        if self._loaded is not None:
            await self._loaded.batcher.drain()
        await asyncio.gather(*self._retiring)
        if self._loaded is not None:
            self._loaded.engine.close()
        self._engine_thread.shutdown(wait=False)
        self._other_thread.shutdown(wait=False)

    def _current(self) -> _Loaded:
        if self._loaded is None:
            raise UnavailableError("The model is not loaded yet; try again in a moment.")
        return self._loaded

    def _open(self, bundle: Bundle) -> _Loaded:
        engine = self._engine_for(bundle, self._threads)
        check_golden(bundle, engine)  # runs the engine, so it is warm too

        def run(token_ids: list[TokenIds]) -> list[Scores]:
            # Six digits are more than the model knows, and half the bytes of the answer.
            scores: list[Scores] = engine.classify(token_ids).astype("float64").round(6).tolist()
            return scores

        async def classify(token_ids: list[TokenIds]) -> list[Scores]:
            return await asyncio.get_running_loop().run_in_executor(self._engine_thread, run, token_ids)

        batcher = TokenBatcher[Scores](classify, limits=self._limits, observe=_observe)
        return _Loaded(bundle, TextEncoder(bundle), engine, batcher)

    async def _encode(self, encoder: TextEncoder, texts: Sequence[str]) -> list[TokenIds]:
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return encoder.encode(texts)
        loop = asyncio.get_running_loop()
        token_ids: list[TokenIds] = []
        # By the slice, so that a small request does not wait for the whole of a large one.
        for start in range(0, len(texts), _SLICE_TEXTS):
            part = texts[start : start + _SLICE_TEXTS]
            token_ids += await loop.run_in_executor(self._other_thread, encoder.encode, part)
        return token_ids

    async def _retire(self, old: _Loaded) -> None:
        await old.batcher.drain()
        old.engine.close()


_TEXTS = {name: metrics.TEXTS.labels(name) for name in ("interactive", "bulk")}
_REAL, _PADDING = metrics.BATCH_TOKENS.labels("real"), metrics.BATCH_TOKENS.labels("padding")


def _observe(report: BatchReport) -> None:
    metrics.BATCH_TEXTS.observe(report.texts)
    metrics.QUEUE_SECONDS.observe(report.queue_s)
    metrics.ENGINE_SECONDS.observe(report.engine_s)
    metrics.QUEUE_TEXTS.set(report.waiting)
    _REAL.inc(report.tokens)
    _PADDING.inc(report.padded_tokens - report.tokens)
