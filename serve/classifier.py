"""Texts in, scores out, by the champion; beside it the cache, and a challenger that is on trial.

The engine runs on one thread of its own and large requests are tokenised on another, so the event loop never blocks
for long. Knows no HTTP and no Ray.
"""

import asyncio
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from overtone import metrics
from overtone.bundle import Bundle, TextEncoder, load_bundle
from overtone.engine import Engine, open_engine
from overtone.errors import BundleError, DeadlineExceededError, EngineError, ShuttingDownError, UnavailableError
from overtone.logging import get_logger
from serve.batcher import Limits, Priority, Timing, TokenIds
from serve.cache import Cache, key_of
from serve.longtext import LongText
from serve.model import Model, Scores, Turns, open_model
from serve.rollout import SHADOW_LANE, Canary, LiveOptions, Shadow
from serve.scaling import Work

__all__ = ["INTERACTIVE_TEXTS", "Answer", "Classifier", "Refusal", "Scores", "Trial"]

INTERACTIVE_TEXTS = 16
"""A request of more texts is bulk."""

_REMEMBERED_REFUSALS = 8
_ENGINE_NICE = 5
"""Added to the niceness of the engine's thread. It computes for as long as there is work, and what brings it work and
takes its results, here, in HAProxy and in clients, would wait for a slice of a busy core each time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The scores of each text, or why it has none, and the bundle that gave them."""

    bundle: Bundle
    rows: list[Scores | Exception]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A bundle that was not taken."""

    role: str
    folder: str
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Trial:
    """A challenger, and how it is tried."""

    model: Model
    canary: Canary
    shadow: Shadow


def _give_way() -> None:
    """Let others go before this thread, where priorities are those of threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + _ENGINE_NICE, 19))


class Classifier:
    """Classifies with the bundle that was loaded last."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        threads: int = 1,
        engine_for: Callable[[Bundle, int], Engine] = open_engine,
        cache: Cache | None = None,
    ) -> None:
        """Nothing is loaded yet: `load` does."""
        self._limits = limits or Limits()
        self._fitted: dict[str, Limits] = {}
        """By version: who returns to a bundle, as in a rollback, does not wait for its batches to be measured again."""
        self._threads = threads
        self._engine_for = engine_for
        self._cache = cache
        self._champion: Model | None = None
        self._trial: Trial | None = None
        self._loading = asyncio.Lock()
        self._engine_thread = ThreadPoolExecutor(1, "engine", initializer=_give_way)
        self._other_thread = ThreadPoolExecutor(1, "tokenizer")
        self._turns = Turns(self._engine_thread)
        self._retiring: set[asyncio.Task[None]] = set()
        self.refusals: deque[Refusal] = deque(maxlen=_REMEMBERED_REFUSALS)
        """Bundles that were not taken, the last one last."""
        self.revision = 0
        """Of the options in use."""

    @property
    def is_ready(self) -> bool:
        """Whether a bundle is loaded, warm and checked."""
        return self._champion is not None

    @property
    def bundle(self) -> Bundle:
        """The champion.

        Raises:
            UnavailableError: none is loaded yet.
        """
        return self._current().bundle

    @property
    def encoder(self) -> TextEncoder:
        """The tokenizer of the champion.

        Raises:
            UnavailableError: none is loaded yet.
        """
        return self._current().encoder

    @property
    def trial(self) -> Trial | None:
        """The challenger, if there is one."""
        return self._trial

    @property
    def waiting(self) -> int:
        """Texts that wait for the engine."""
        return sum(model.batcher.waiting for model in self._models())

    @property
    def work(self) -> Work:
        """What waits for the engine and what it has done."""
        models = self._models()
        return Work(sum(model.batcher.waiting_tokens for model in models), self._turns.done_tokens, self._turns.busy_s)

    @property
    def is_failing(self) -> bool:
        """Whether the engine has failed on so many texts in a row that the texts are not to blame."""
        return self._champion is not None and self._champion.batcher.failures_in_a_row >= 32

    async def load(self, path: Path | None) -> Bundle:
        """Change to the bundle at `path` (default: the one in the package); see `apply`.

        Raises:
            BundleError: the bundle is not fit for use; the old one stays.
        """
        async with self._loading:
            return await self._load_champion(path)

    async def apply(self, options: LiveOptions, default: Path | None) -> None:
        """Change champion, challenger and shares to what `options` say; `default` is the champion they need not name.

        Each bundle is loaded beside those in use, warmed, and its golden texts are checked; then the change is one
        assignment, and requests that the old one took are answered by it. One that is not fit is written down in
        `refusals` and changes nothing: the champion stays, and without a fit challenger there is no trial.

        Raises:
            BundleError: no champion is in use yet and this one is not fit.
        """
        async with self._loading:
            folder = Path(options.bundle) if options.bundle else default
            try:
                await self._load_champion(folder)
            except BundleError as error:
                self._refuse("champion", folder, error)
                if self._champion is None:
                    raise
            await self._try_challenger(options)
            self.revision = options.revision

    async def classify(
        self,
        texts: Sequence[str],
        *,
        deadline_s: float | None = None,
        long_text: LongText = "truncate",
        priority: Priority | None = None,
        request_id: bytes | None = None,
        timing: Timing | None = None,
    ) -> Answer:
        """Classify valid `texts`, all with one bundle.

        Requests with the same `request_id` go to the same bundle while a canary runs. `timing` is filled in.

        Raises:
            OverloadedError, DeadlineExceededError, ShuttingDownError: see `TokenBatcher.submit`.
            UnavailableError: no bundle is loaded yet.
        """
        if priority is None:
            priority = "interactive" if len(texts) <= INTERACTIVE_TEXTS else "bulk"
        if timing is not None:
            timing.started = time.monotonic()
        request = _Request(texts, deadline_s, long_text, priority, timing)
        if self._trial is None and self._cache is None:
            answer = await self._classify_by_champion(request, texts)
        else:
            answer = await self._classify_on_trial(request, request_id)
        _TEXTS[priority].inc(len(texts))
        return answer

    async def submit(
        self, token_ids: Sequence[TokenIds], *, deadline_s: float | None = None, priority: Priority = "interactive"
    ) -> Answer:
        """Classify texts that are tokenised already, by the champion's `encoder`.

        Raises:
            OverloadedError, DeadlineExceededError, ShuttingDownError: see `TokenBatcher.submit`.
            UnavailableError: no bundle is loaded yet.
        """
        model = self._current()
        return Answer(model.bundle, await model.batcher.submit(token_ids, priority=priority, deadline_s=deadline_s))

    async def close(self) -> None:
        """Answer what was taken, refuse what comes, free the engine."""
        trial = self._trial
        if trial is not None:
            await trial.shadow.close()
        models = self._models()
        await asyncio.gather(*(model.batcher.drain() for model in models), *self._retiring)
        for model in models:
            model.engine.close()
        if self._cache is not None:
            await self._cache.close()
        self._engine_thread.shutdown(wait=False)
        self._other_thread.shutdown(wait=False)

    # --- classifying

    def _current(self) -> Model:
        if self._champion is None:
            raise UnavailableError("The model is not loaded yet; try again in a moment.")
        return self._champion

    def _models(self) -> list[Model]:
        found = [] if self._champion is None else [self._champion]
        return found if self._trial is None else [*found, self._trial.model]

    async def _classify_by_champion(self, request: "_Request", texts: Sequence[str]) -> Answer:
        """The answer for `texts`, which are those of `request` or some of them."""
        while True:
            model = self._current()
            try:
                model.batcher.admit(len(texts), request.priority, request.deadline_s)
                encoded = await model.encode(texts, request.long_text, self._other_thread)
                rows = await model.batcher.submit(
                    encoded.rows, priority=request.priority, deadline_s=request.deadline_s, timing=request.timing
                )
            except ShuttingDownError:
                if model is self._champion:
                    raise
                continue  # the bundle was changed while the texts were prepared for the old one
            return Answer(model.bundle, encoded.merge(rows))

    async def _classify_on_trial(self, request: "_Request", request_id: bytes | None) -> Answer:
        trial = self._trial
        if trial is not None and trial.canary.takes(request_id):
            answer = await self._classify_by_challenger(trial, request)
            if answer is not None:
                return answer
        model = self._current()
        keys: list[bytes] = []
        found: list[Scores | None] = [None] * len(request.texts)
        if self._cache is not None:
            keys = [key_of(text, model.bundle.version, request.long_text) for text in request.texts]
            found = await self._cache.find(keys)
        missing = [index for index, scores in enumerate(found) if scores is None]
        if not missing:
            return Answer(model.bundle, list(found))  # type: ignore[arg-type]  # none is missing
        texts = request.texts if len(missing) == len(found) else [request.texts[index] for index in missing]
        started = time.monotonic()
        answer = await self._classify_by_champion(request, texts)
        if trial is not None:
            self._note(trial, request, started, failed=_has_failed(answer.rows), by_challenger=False)
            trial.shadow.offer(texts, answer.rows, answer.bundle.labels)
        if answer.bundle is not model.bundle:  # changed meanwhile: what was found is the old one's
            if len(missing) < len(found):
                return await self._classify_on_trial(request, request_id)
            return answer
        if self._cache is not None:
            fresh = [(keys[i], row) for i, row in zip(missing, answer.rows, strict=True) if isinstance(row, list)]
            await self._cache.keep(fresh)
        if len(missing) == len(found):
            return answer
        rows: list[Scores | Exception] = list(found)  # type: ignore[arg-type]  # what is None is filled in below
        for index, row in zip(missing, answer.rows, strict=True):
            rows[index] = row
        return Answer(model.bundle, rows)

    async def _classify_by_challenger(self, trial: Trial, request: "_Request") -> Answer | None:
        """Its answer; None when it has none and the champion must give one."""
        model, started = trial.model, time.monotonic()
        try:
            encoded = await model.encode(request.texts, request.long_text, self._other_thread)
            rows = await model.batcher.submit(
                encoded.rows, priority=request.priority, deadline_s=request.deadline_s, timing=request.timing
            )
        except ShuttingDownError:
            return None
        except DeadlineExceededError:
            self._note(trial, request, started, failed=True, by_challenger=True)
            raise
        failed = _has_failed(rows)
        self._note(trial, request, started, failed=failed, by_challenger=True)
        metrics.CANARY_REQUESTS.labels("failed" if failed else "answered").inc()
        return None if failed else Answer(model.bundle, encoded.merge(rows))

    def _note(self, trial: Trial, request: "_Request", started: float, *, failed: bool, by_challenger: bool) -> None:
        """Count one request for the canary, which may end it."""
        seconds = time.monotonic() - started if request.priority == "interactive" else None
        if trial.canary.note(by_challenger=by_challenger, seconds=seconds, failed=failed):
            metrics.CANARY_ROLLBACKS.inc()
            metrics.CANARY_SHARE.set(0.0)
            self._weigh()
            version = trial.model.bundle.version
            get_logger().error("canary.rolled_back", model_version=version, reason=trial.canary.reason)

    # --- loading

    async def _load_champion(self, path: Path | None) -> Bundle:
        bundle = await self._opened(path)
        old = self._champion
        if old is not None and old.bundle.version == bundle.version:
            return old.bundle
        trial = self._trial
        if trial is not None and trial.model.bundle.version == bundle.version:
            # It is loaded, warm and checked already.
            await trial.shadow.close()
            self._champion, self._trial = trial.model, None
        else:
            self._champion = await self._model_of(bundle)
        self._weigh()
        if old is not None:
            self._retire(old)
        get_logger().info("bundle.loaded", model_version=bundle.version, replaced=old.bundle.version if old else None)
        return bundle

    async def _try_challenger(self, options: LiveOptions) -> None:
        model: Model | None = None
        old = self._trial
        if options.challenger is not None:
            try:
                model = await self._challenger_of(options.challenger)
            except BundleError as error:
                self._refuse("challenger", Path(options.challenger), error)
        if model is None:
            self._trial = None
        elif old is None or old.model is not model or options.revision != self.revision:
            canary = Canary(options.canary, options.limits)
            shadow = Shadow(model, options.shadow, self._turns, lambda: self.waiting > 0)
            self._trial = Trial(model, canary, shadow)
        if old is not None and old is not self._trial:
            await old.shadow.close()
            if old.model is not model:
                self._retire(old.model)
        self._weigh()
        metrics.CANARY_SHARE.set(self._trial.canary.share if self._trial else 0.0)

    async def _challenger_of(self, folder: str) -> Model:
        bundle = await self._opened(Path(folder))
        champion = self._current()
        if bundle.version == champion.bundle.version:
            raise BundleError(f"{folder}: is the champion already")
        if bundle.labels != champion.bundle.labels:
            raise BundleError(f"{folder}: its labels {bundle.labels} are not the champion's {champion.bundle.labels}")
        if self._trial is not None and self._trial.model.bundle.version == bundle.version:
            return self._trial.model
        return await self._model_of(bundle)

    async def _opened(self, path: Path | None) -> Bundle:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._other_thread, load_bundle, path)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror})") from error

    async def _model_of(self, bundle: Bundle) -> Model:
        def open_() -> Model:
            engine = self._engine_for(bundle, self._threads)
            limits = self._fitted.get(bundle.version, self._limits)
            try:
                return open_model(bundle, engine, limits=limits, turns=self._turns)
            except BundleError:
                engine.close()
                raise

        model = await asyncio.get_running_loop().run_in_executor(self._other_thread, open_)
        self._fitted[bundle.version] = model.batcher.limits
        return model

    def _weigh(self) -> None:
        """Share the engine thread by the share of requests each bundle gets."""
        trial = self._trial
        if trial is None or self._champion is None:
            self._turns.weigh({})
            return
        share = trial.canary.share
        champion, challenger = self._champion.bundle.version, trial.model.bundle.version
        # What is left in a canary's queue when it ends must still be run.
        self._turns.weigh({champion: 1.0 - share, challenger: max(share, 0.05), SHADOW_LANE: 0.0})

    def _retire(self, model: Model) -> None:
        task = asyncio.get_running_loop().create_task(model.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _refuse(self, role: str, folder: Path | None, error: BundleError) -> None:
        metrics.BUNDLES_REFUSED.labels(role).inc()
        self.refusals.append(
            Refusal(role, str(folder or "the bundle in the package"), error.message, datetime.now(UTC))
        )
        kept = self._champion.bundle.version if self._champion else None
        get_logger().error("bundle.refused", role=role, reason=error.message, kept=kept)


@dataclass(frozen=True, slots=True)
class _Request:
    texts: Sequence[str]
    deadline_s: float | None
    long_text: LongText
    priority: Priority
    timing: Timing | None


def _has_failed(rows: Sequence[Scores | Exception]) -> bool:
    return any(isinstance(row, EngineError) for row in rows)


_TEXTS = {name: metrics.TEXTS.labels(name) for name in ("interactive", "bulk")}
