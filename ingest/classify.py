"""From stored posts to stored predictions: hand-over in memory, and a look into the database for what fell beside.

A post is safe in the database before it comes here, so nothing here has to be lossless: whatever a full queue, a
crash or a failed write leaves without a prediction is found by the next scan.
"""

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import orjson

from ingest.options import ClassifyOptions
from ingest.predict import Outcome, PredictClient, Refused
from ingest.waiting import until_it_works, until_true
from overtone import metrics
from overtone.db.database import Database
from overtone.db.posts import unclassified, write_dead_letter
from overtone.db.predictions import write_predictions
from overtone.errors import DatabaseUnavailableError, InvalidInputError, OvertoneError
from overtone.logging import get_logger
from overtone.schema import Post, Prediction, datetime_to_snowflake

_FIRST_WAIT_S = 0.1
_MAX_WAIT_S = 5.0
_SERVER_ERROR_PATIENCE_S = 60.0
"""How long the API may answer 500 before the texts are suspected: a replica that dies answers so for a while."""
_SCAN_PAGE_POSTS = 2_000
_SCAN_OVERLAP = timedelta(minutes=5)

_log = get_logger()

NOT_CLASSIFIED = "not classified: "
"""How the reason of a dead letter begins whose post is stored, and whose text the API refused."""

Item = tuple[int, str]


@dataclass(slots=True)
class ClassifyStatus:
    """Figures for people."""

    predictions_stored: int = 0
    refused: int = 0
    last_error: str | None = None


class Classifier:
    """Classifies what is offered, and what a scan finds."""

    def __init__(self, db: Database, client: PredictClient, options: ClassifyOptions) -> None:
        self.status = ClassifyStatus()
        self._db = db
        self._client = client
        self._options = options
        self._queue: asyncio.Queue[Item] = asyncio.Queue(options.queue_posts)
        self._pending: set[int] = set()
        self._refused: set[int] = set()
        self._scan_is_due = asyncio.Event()
        self._is_scanning = False
        self._scan_from = 0
        start = datetime.now(UTC) - timedelta(seconds=options.scan_back_s)
        self.scan_soon(datetime_to_snowflake(start))

    @property
    def pending(self) -> int:
        """Posts handed over and without a stored prediction yet."""
        return len(self._pending)

    def offer(self, posts: Iterable[Post]) -> None:
        """Take over stored posts; those for which there is no room are found by a scan later."""
        for post in posts:
            if self._queue.full():
                self.scan_soon(post.post_id)
            elif post.post_id not in self._pending:
                self._pending.add(post.post_id)
                self._queue.put_nowait((post.post_id, post.text))

    def scan_soon(self, first_post_id: int) -> None:
        """Have the database asked for posts without a prediction, from `first_post_id` on."""
        self._scan_from = min(self._scan_from, first_post_id) if self._scan_is_due.is_set() else first_post_id
        self._scan_is_due.set()

    async def run(self) -> None:
        """Classify until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._options.workers):
                tasks.create_task(self._work())
            tasks.create_task(self._scan_for_ever())

    async def finish(self) -> None:
        """Return when nothing that was offered is left to do."""
        await until_true(lambda: not (self._pending or self._is_scanning or self._scan_is_due.is_set()))

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._options.batch_texts and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await self._classify(batch)
            except OvertoneError as error:
                self._note(error)
                self.scan_soon(min(post_id for post_id, _ in batch))
            finally:
                self._pending.difference_update(post_id for post_id, _ in batch)

    async def _classify(self, batch: Sequence[Item]) -> None:
        waiting, wait_s = list(batch), _FIRST_WAIT_S
        while True:
            done, waiting = await self._ask(waiting)
            await self._store(done)
            if not waiting:
                return
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _MAX_WAIT_S)

    async def _ask(self, items: Sequence[Item]) -> tuple[list[tuple[int, Prediction]], list[Item]]:
        """Predictions for `items`, and the items to ask for again; what is refused becomes dead letters."""
        try:
            outcomes = await self._outcomes([text for _, text in items])
        except InvalidInputError as error:
            if len(items) == 1:
                await self._put_aside(items[0], error.code)
                return [], []
            middle = len(items) // 2
            first, again_first = await self._ask(items[:middle])
            second, again_second = await self._ask(items[middle:])
            return first + second, again_first + again_second
        done: list[tuple[int, Prediction]] = []
        postponed: list[Item] = []
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Prediction):
                done.append((item[0], outcome))
            elif isinstance(outcome, Refused):
                await self._put_aside(item, outcome.reason)
            else:
                postponed.append(item)
        return done, postponed

    async def _outcomes(self, texts: Sequence[str]) -> Sequence[Outcome]:
        """Ask until the API answers; InvalidInputError when it will not take or cannot bear these texts."""
        wait_s, failing_since = _FIRST_WAIT_S, None
        while True:
            try:
                outcomes = await self._client.predict(texts)
            except InvalidInputError:
                raise
            except OvertoneError as error:
                self._note(error)
                at_least_s = float(error.details.get("retry_after_s") or 0.0)
                now = time.monotonic()
                failing_since = (failing_since or now) if error.details.get("status") == 500 else None
                if failing_since is not None and now - failing_since > _SERVER_ERROR_PATIENCE_S:
                    raise InvalidInputError("the API fails on these texts") from error
            else:
                self._note_recovery()
                return outcomes
            await asyncio.sleep(max(wait_s, at_least_s) * random.uniform(1.0, 1.25))
            wait_s = min(wait_s * 2, _MAX_WAIT_S)

    async def _store(self, rows: Sequence[tuple[int, Prediction]]) -> None:
        if not rows:
            return
        with metrics.WRITE_SECONDS.labels("predictions").time():
            new = await until_it_works(lambda: write_predictions(self._db, rows), self._note)
        metrics.PREDICTIONS_STORED.inc(new)
        self.status.predictions_stored += new

    async def _put_aside(self, item: Item, reason: str) -> None:
        post_id, text = item
        raw = orjson.dumps({"post_id": str(post_id), "text": text})
        await until_it_works(
            lambda: write_dead_letter(self._db, raw, f"{NOT_CLASSIFIED}{reason}", post_id=post_id), self._note
        )
        self._refused.add(post_id)
        self.status.refused += 1
        metrics.DEAD_LETTERS.labels("not_classified").inc()
        _log.warning("post.refused", post_id=post_id, reason=reason)

    async def _scan_for_ever(self) -> None:
        while True:
            first = await self._first_to_scan()
            try:
                self._is_scanning = True
                await self._scan(first)
            except DatabaseUnavailableError as error:
                self._note(error)
                self.scan_soon(first)
                await asyncio.sleep(1.0)
            finally:
                self._is_scanning = False

    async def _first_to_scan(self) -> int:
        """Wait until a scan is due and return the post id it begins with."""
        try:
            await asyncio.wait_for(self._scan_is_due.wait(), self._options.scan_every_s)
        except TimeoutError:
            back = timedelta(seconds=self._options.scan_every_s) + _SCAN_OVERLAP
            return datetime_to_snowflake(datetime.now(UTC) - back)
        self._scan_is_due.clear()
        return self._scan_from

    async def _scan(self, first: int) -> None:
        """Walk once through the posts without a prediction and queue those that are not under way."""
        last, found = first - 1, 0
        while True:
            # Remembered before the query: what is under way now may be done before the answer is here.
            under_way = set(self._pending)
            page = await unclassified(self._db, None, after_post_id=last, limit=_SCAN_PAGE_POSTS)
            for item in page:
                if item[0] not in under_way and item[0] not in self._pending and item[0] not in self._refused:
                    found += 1
                    self._pending.add(item[0])
                    await self._queue.put(item)
            if len(page) < _SCAN_PAGE_POSTS:
                break
            last = page[-1][0]
        if found:
            _log.info("posts.found_unclassified", posts=found)

    def _note(self, error: OvertoneError) -> None:
        if error.message != self.status.last_error:
            _log.warning("classify.delayed", code=error.code, reason=error.message)
        self.status.last_error = error.message

    def _note_recovery(self) -> None:
        if self.status.last_error is not None:
            _log.info("classify.resumed")
        self.status.last_error = None
