"""A bundle that is loaded and checked, with its batcher, and the turns that several take on one engine thread."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from overtone import metrics
from overtone.bundle import Bundle, TextEncoder
from overtone.engine import Engine, check_golden
from overtone.errors import BundleError, EngineError
from serve.batcher import BatchReport, Begin, Limits, TokenBatcher, TokenIds
from serve.longtext import Encoded, LongText, encode
from serve.warmup import fitted

Scores = list[float]
"""Calibrated probability of each label, in the order of the bundle's labels."""

_INLINE_CHARS = 4_000
_SLICE_TEXTS = 128
_MIN_WEIGHT = 0.01
_SLOTS = 2
"""Batches that the engine thread is given at once: one runs, the next waits, so that it never idles between them."""


class Turns:
    """Batches of several lanes on one engine thread, each lane's tokens in proportion to its weight.

    Start-time fair queueing: a batch's virtual start is where its lane's last batch ended, and the earliest one runs
    next. A lane of weight zero runs when no other has anything.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._weights: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()
        self._now = 0.0
        self._running = 0
        self.done_tokens = 0
        """Padded tokens of the requests that the engine has done."""
        self.busy_s = 0.0
        """Seconds it took for them."""

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Give the lanes their weights. With none, batches go to the thread as they come."""
        self._weights = dict(weights)

    async def run(self, lane: str, work: Callable[[], list[Scores]], tokens: int) -> list[Scores]:
        """`work`, on about so many `tokens`, on the engine thread when it is the turn of `lane`."""
        loop = asyncio.get_running_loop()
        if not self._weights:
            return await loop.run_in_executor(self._thread, work)
        if self._running >= _SLOTS or (self._running and not self._weights.get(lane, 1.0)):
            await self._wait(lane, tokens)
        else:
            self._running += 1
        try:
            return await loop.run_in_executor(self._thread, work)
        finally:
            self._running -= 1
            self._call_next()

    async def _wait(self, lane: str, tokens: int) -> None:
        weight = self._weights.get(lane, 1.0)
        start = float("inf")
        if weight > 0:
            start = max(self._now, self._ends.get(lane, 0.0))
            self._ends[lane] = start + tokens / max(weight, _MIN_WEIGHT)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (start, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._running -= 1
                self._call_next()
            else:
                self._waiting = [entry for entry in self._waiting if entry[2] is not turn]
                heapify(self._waiting)
            raise

    def _call_next(self) -> None:
        while self._waiting and self._running < _SLOTS:
            start, _, turn = self._waiting[0]
            if start == float("inf") and self._running:
                return
            heappop(self._waiting)
            if not turn.done():
                self._now = max(self._now, start) if start != float("inf") else self._now
                self._running += 1
                turn.set_result(None)


@dataclass(frozen=True, slots=True)
class Model:
    """One bundle, ready for use."""

    bundle: Bundle
    encoder: TextEncoder
    engine: Engine
    batcher: TokenBatcher[Scores]
    classify_now: Callable[[list[TokenIds]], list[Scores]]
    """Runs the engine on this thread, whatever waits."""

    async def encode(self, texts: Sequence[str], long_text: LongText, thread: ThreadPoolExecutor) -> Encoded:
        """The rows of `texts`; many characters are tokenised on `thread`."""
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return encode(self.encoder, texts, long_text)
        loop = asyncio.get_running_loop()
        # By the slice, so that a small request does not wait for the whole of a large one.
        parts = [texts[start : start + _SLICE_TEXTS] for start in range(0, len(texts), _SLICE_TEXTS)]
        encoded = await loop.run_in_executor(thread, encode, self.encoder, parts[0], long_text)
        for part in parts[1:]:
            encoded.extend(await loop.run_in_executor(thread, encode, self.encoder, part, long_text))
        return encoded

    async def retire(self) -> None:
        """Answer what was taken, then free the engine."""
        await self.batcher.drain()
        self.engine.close()


def open_model(bundle: Bundle, engine: Engine, *, limits: Limits, turns: Turns) -> Model:
    """`bundle` with `engine`, whose golden texts are classified, so that it is checked and warm. Blocks.

    What `limits` leave open about the size of batches is measured.

    Raises:
        BundleError: the scores are not those the bundle promises.
    """
    try:
        check_golden(bundle, engine)
        limits = fitted(limits, engine)
    except EngineError as error:
        raise BundleError(f"{bundle.path}: the model fails on the golden texts ({error.message})") from error

    def run(rows: list[TokenIds]) -> list[Scores]:
        if not rows:
            return []
        # Six digits are more than the model knows, and half the bytes of the answer.
        scores: list[Scores] = engine.classify(rows).astype("float64").round(6).tolist()
        return scores

    def classify(begin: Begin) -> Awaitable[list[Scores]]:
        return turns.run(bundle.version, lambda: run(begin()), batcher.next_tokens)

    def observe(report: BatchReport) -> None:
        turns.done_tokens += report.padded_tokens
        turns.busy_s += report.engine_s
        _observe(report)

    batcher = TokenBatcher[Scores](classify, limits=limits, observe=observe)
    return Model(bundle, TextEncoder(bundle), engine, batcher, run)


_REAL, _PADDING = metrics.BATCH_TOKENS.labels("real"), metrics.BATCH_TOKENS.labels("padding")


def _observe(report: BatchReport) -> None:
    metrics.BATCH_TEXTS.observe(report.texts)
    metrics.QUEUE_SECONDS.observe(report.queue_s)
    metrics.ENGINE_SECONDS.observe(report.engine_s)
    metrics.QUEUE_TEXTS.set(report.waiting)
    _REAL.inc(report.tokens)
    _PADDING.inc(report.padded_tokens - report.tokens)
