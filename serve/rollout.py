"""How a challenger is tried beside the champion: what is asked for, when a canary is taken back, what a shadow tells.

`Canary` decides from numbers alone and `Shadow` knows no HTTP and no Ray; `serve.classifier` feeds both.
"""

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field, model_validator

from overtone import metrics
from overtone.engine import plan_batches
from overtone.logging import get_logger
from serve.model import Model, Scores, Turns

SHADOW_LANE = "shadow"

_WINDOW = 1000
"""Requests of each side that are remembered."""
_CHECK_EVERY = 25
_QUEUED_TEXTS = 256
_SHADOW_TEXTS = 16
"""Texts of one request that a shadow looks at, and that it looks at together."""
_SHADOW_TOKENS = 128
"""Padded tokens a batch of the shadow: a request that comes meanwhile waits for it."""
_BUSY_PAUSE_S = 0.05


class CanaryLimits(BaseModel):
    """What ends a canary by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_requests: int = Field(200, ge=10, le=1000, description="Requests of each side before latencies are compared.")
    max_error_rate: float = Field(0.02, ge=0, le=1, description="Share of its requests that the challenger may fail.")
    max_p99_ratio: float = Field(2.0, ge=1, le=100, description="Its 99th percentile of latency, over the champion's.")


class LiveOptions(BaseModel):
    """What changes while replicas run: Serve's `user_config`. Public within the cluster, so it holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str | None = Field(
        None, description="Folder of the champion. Unset: the setting BUNDLE, or the bundle in the package."
    )
    challenger: str | None = Field(None, description="Folder of the bundle to try.")
    shadow: float = Field(0.0, ge=0, le=1, description="Share of requests the challenger classifies too, unseen.")
    canary: float = Field(0.0, ge=0, le=1, description="Share of requests the challenger answers.")
    limits: CanaryLimits = CanaryLimits()
    revision: int = Field(0, ge=0, description="Raised with each order: a canary that was taken back starts again.")

    @model_validator(mode="after")
    def _shares_have_a_challenger(self) -> Self:
        if self.challenger is None and (self.shadow or self.canary):
            raise ValueError("shadow and canary need a challenger")
        return self


@dataclass(slots=True)
class Side:
    """What the last requests of one bundle were like."""

    requests: int = 0
    errors: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    """Seconds."""

    def p99(self) -> float | None:
        """The 99th percentile of latency in seconds; None without any."""
        if not self.latencies:
            return None
        return sorted(self.latencies)[min(len(self.latencies) - 1, math.ceil(0.99 * len(self.latencies)) - 1)]


class Canary:
    """The share of requests that the challenger answers, and when that ends by itself. Pure."""

    def __init__(self, share: float, limits: CanaryLimits) -> None:
        self.configured = share
        self.share = share
        self.reason: str | None = None
        self.champion = Side()
        self.challenger = Side()
        self._limits = limits

    def takes(self, request_id: bytes | None) -> bool:
        """Whether the challenger answers this request; the same for the same id on every replica."""
        if not self.share:
            return False
        return (random.random() if request_id is None else crc32(request_id) / 2**32) < self.share

    def note(self, *, by_challenger: bool, seconds: float | None, failed: bool) -> bool:
        """Count one request, with its latency if it is one to compare; True when this ends the canary."""
        side = self.challenger if by_challenger else self.champion
        side.requests += 1
        side.errors += failed
        if seconds is not None:
            side.latencies.append(seconds)
        if not by_challenger or not self.share or not (failed or side.requests % _CHECK_EVERY == 0):
            return False
        self.reason = self._broken()
        if self.reason is not None:
            self.share = 0.0
        return self.reason is not None

    def _broken(self) -> str | None:
        limits, tried = self._limits, self.challenger
        # Broken as soon as it would be even if every request up to the minimum went well.
        if tried.errors > limits.max_error_rate * max(tried.requests, limits.min_requests):
            return f"{tried.errors} of {tried.requests} requests failed; at most {limits.max_error_rate:.1%} may"
        enough = min(len(tried.latencies), len(self.champion.latencies)) >= limits.min_requests
        theirs, ours = tried.p99(), self.champion.p99()
        if enough and theirs is not None and ours is not None and theirs > ours * limits.max_p99_ratio:
            return (
                f"its p99 is {theirs * 1e3:.1f} ms and the champion's {ours * 1e3:.1f} ms; "
                f"at most {limits.max_p99_ratio:g} times that is allowed"
            )
        return None


@dataclass(frozen=True, slots=True)
class _Seen:
    text: str
    scores: Scores
    labels: Sequence[str]


class Shadow:
    """Classifies a sample of what the champion answered once more, by the challenger, when nothing else waits."""

    def __init__(self, model: Model, share: float, turns: Turns, is_busy: Callable[[], bool]) -> None:
        """`is_busy` says whether requests wait for the engine."""
        self.share = share
        self.agreement: Counter[tuple[str, str]] = Counter()
        """Texts by the champion's and the challenger's label."""
        self.dropped = 0
        self.failed = 0
        self._model = model
        self._turns = turns
        self._is_busy = is_busy
        self._queue: deque[_Seen] = deque()
        self._task: asyncio.Task[None] | None = None

    def offer(self, texts: Sequence[str], rows: Sequence[Scores | Exception], labels: Sequence[str]) -> None:
        """Take some of `texts`, by chance, to compare later. Never waits and never fails."""
        if random.random() >= self.share:
            return
        seen = [_Seen(text, row, labels) for text, row in zip(texts, rows, strict=True) if isinstance(row, list)]
        if len(seen) > _SHADOW_TEXTS:
            seen = random.sample(seen, _SHADOW_TEXTS)
        if len(self._queue) + len(seen) > _QUEUED_TEXTS:
            self.dropped += len(seen)
            metrics.SHADOW_DROPPED.inc(len(seen))
            return
        self._queue.extend(seen)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Forget what was not looked at."""
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        while self._queue:
            if self._is_busy():
                await asyncio.sleep(_BUSY_PAUSE_S)
                continue
            batch = [self._queue.popleft() for _ in range(min(_SHADOW_TEXTS, len(self._queue)))]
            try:
                await self._compare(batch)
            except Exception as error:  # whatever the challenger does, requests must not notice
                self.failed += len(batch)
                metrics.SHADOW_FAILED.inc(len(batch))
                get_logger().warning(
                    "shadow.failed", model_version=self._model.bundle.version, reason=type(error).__name__
                )

    async def _compare(self, batch: list[_Seen]) -> None:
        rows = await asyncio.to_thread(self._model.encoder.encode, [seen.text for seen in batch])
        labels = self._model.bundle.labels
        for part in plan_batches([len(ids) for ids in rows], _SHADOW_TOKENS):
            chosen = [rows[row] for row in part]
            work = partial(self._model.classify_now, chosen)
            found = await self._turns.run(SHADOW_LANE, work, len(chosen) * max(map(len, chosen)))
            self._count([batch[row] for row in part], found, labels)

    def _count(self, batch: list[_Seen], found: list[Scores], labels: Sequence[str]) -> None:
        for seen, scores in zip(batch, found, strict=True):
            pair = seen.labels[seen.scores.index(max(seen.scores))], labels[scores.index(max(scores))]
            self.agreement[pair] += 1
            metrics.SHADOW_TEXTS.labels(*pair).inc()
            metrics.SHADOW_DISTANCE.observe(sum(abs(a - b) for a, b in zip(seen.scores, scores, strict=True)) / 2)
