"""The whole of the ingestion, put together: stream -> inbox -> posts -> classifier -> predictions, repair beside it.

`Ingestion` is what entry points run: it starts a pipeline, and another one whenever it fails unexpectedly.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

from ingest.api import XApi
from ingest.backlog import Backlog
from ingest.classify import Classifier
from ingest.compliance import ComplianceKeeper
from ingest.connection import Inbox
from ingest.connects import ConnectLog, Connects
from ingest.leader import Leadership
from ingest.ledger import Ledger
from ingest.options import IngestOptions, SpendOptions, StreamOptions, is_loopback
from ingest.predict import PredictClient, client_for
from ingest.repair import Repairer
from ingest.replay import Replay
from ingest.retention import RetentionKeeper
from ingest.salvage import salvage
from ingest.spend import SpendMeter
from ingest.store import FoundStore, PostStore
from ingest.stream import StreamSupervisor
from ingest.waiting import until_it_works
from ingest.writer import Writer
from overtone.db.database import Address, Database
from overtone.db.posts import claim_stream
from overtone.erasure import open_eraser
from overtone.errors import ConfigurationError, FencedError, OvertoneError, StreamError, StreamFatalError
from overtone.logging import get_logger
from overtone.rotation import Rotation
from overtone.schema import snowflake_to_datetime
from overtone.settings import Settings
from overtone.spool import Spool

_MAX_RESTART_WAIT_S = 30.0
_GOOD_RUN_S = 60.0

_log = get_logger()
T = TypeVar("T")


class Pipeline:
    """One life of the ingestion."""

    def __init__(self, settings: Settings, options: IngestOptions, rotation: Rotation | None = None) -> None:
        """Check what can be checked without a connection. Secrets are followed as `rotation` changes them.

        Raises:
            ConfigurationError: a setting that is needed is missing.
        """
        if settings.database_url is None:
            raise ConfigurationError("DATABASE_URL is not set: ingestion needs the database that `overtone up` starts.")
        if settings.twitter_bearer_token is None:
            raise ConfigurationError(
                "TWITTER_BEARER_TOKEN is not set. To use the simulator, start `python -m ingest.simulator`, point "
                "X_API_BASE_URL at it and set any token."
            )
        self._settings = settings
        self._rotation = rotation or Rotation(settings)
        self._options = options
        self._token = settings.twitter_bearer_token.get_secret_value()
        self._database_url = settings.database_url.get_secret_value()
        self.source = source_name(settings.x_api_base_url, options.stream)
        self._inbox: Inbox = asyncio.Queue(options.stream.queue_lines)
        self._supervisor: StreamSupervisor | None = None
        self._classifier: Classifier | None = None
        self._store: PostStore | None = None
        self._repairer: Repairer | None = None
        self._backlog: Backlog | None = None
        self._spend: SpendMeter | None = None
        self._is_leader = False
        self._last_error: str | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Ingest until `stop` is set; then store and classify what was received, within `drain_s` seconds.

        Raises:
            StreamFatalError: the X API refuses for good. What was received is stored and classified first.
            FencedError: another process leads now.
            ConfigurationError: the database refuses the address.
        """
        async with AsyncExitStack() as stack:
            db = await self._unless(stop, self._open_database())
            if db is None:
                return
            stack.push_async_callback(db.close)
            stack.callback(self._rotation.follow("database_url", partial(self._move_database, db)))
            client = await stack.enter_async_context(
                client_for(self._settings, self._options.classify.timeout_s, lambda: self._rotation.settings)
            )
            address = Address(self._database_url, self._rotation.renew_database_url)
            leadership = Leadership(address, self.source, self._options.leader, self._note)
            stack.push_async_callback(leadership.close)
            epoch = await self._unless(stop, self._lead(leadership, db, client))
            if epoch is None:
                return
            self._is_leader = True
            _log.info("ingest.leading", stream=self.source, epoch=epoch)
            self._backlog = self._open_backlog()
            stack.callback(self._backlog.close)
            self._spend = SpendMeter(db, *billed(self._settings.x_api_base_url, self._options.spend))
            api = await stack.enter_async_context(
                XApi(
                    self._settings.x_api_base_url,
                    self._token,
                    gate=self._spend,
                    is_sure=lambda: leadership.is_sure,
                )
            )
            self._classifier = Classifier(db, client, self._options.classify)
            self._store = PostStore(db, self._classifier, epoch=epoch)
            self._last_error = None
            await self._run_parts(stop, Ledger(db, self.source, epoch), api, leadership)

    @property
    def is_leader(self) -> bool:
        """Whether this process reads the stream, and is no standby."""
        return self._is_leader

    async def _lead(self, leadership: Leadership, db: Database, client: PredictClient) -> int:
        """Wait as a standby for as long as another process leads; then the epoch to write with."""
        if not await leadership.try_once():
            _log.info("ingest.standing_by", stream=self.source)
            standby = asyncio.create_task(self._stand_by(db, client))
            try:
                await leadership.wait()
            finally:
                await _cancel([standby])
        return await until_it_works(lambda: claim_stream(db, self.source), self._note)

    async def _stand_by(self, db: Database, client: PredictClient) -> None:
        """Store and classify what an earlier process of this machine left on disk."""
        root, most = self._settings.home / "spool", self._options.spool.max_mib * 2**20
        spools = await asyncio.to_thread(Spool.claim_all, root, self.source, most)
        backlogs = [Backlog(spool) for spool in spools]
        try:
            if all(backlog.is_empty for backlog in backlogs):
                return
            classifier = Classifier(db, client, self._options.classify)
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(classifier.run())
                await salvage(backlogs, PostStore(db, classifier, epoch=None), stream=f"{self.source}_spool")
                await classifier.finish()
                work.cancel()
        finally:
            for backlog in backlogs:
                backlog.close()

    def status(self) -> dict[str, Any]:
        """Plain figures: what runs, how far it is, what is wrong."""
        figures: dict[str, Any] = {
            "source": self.source,
            "role": "leader" if self._is_leader else "standby",
            "connected": False,
            "queue_lines": self._inbox.qsize(),
        }
        errors = [self._last_error]
        if self._supervisor is not None:
            stream = self._supervisor.status
            figures |= {"connected": stream.is_connected, "connects": stream.connects, "waiting_s": stream.waiting_s}
            errors.append(None if stream.is_connected else stream.last_error)
        if self._store is not None:
            stored = self._store.status
            errors.append(stored.last_error)
            figures |= {
                "posts_received": stored.posts_received,
                "posts_stored": stored.posts_stored,
                "lag_s": stored.lag_s,
                "dead_letters": stored.dead_letters,
            }
        if self._backlog is not None:
            figures["spool_bytes"] = self._backlog.size_bytes
        if self._spend is not None:
            figures |= {"posts_read": self._spend.used, "posts_cap": self._spend.cap}
        if self._repairer is not None:
            repair = self._repairer.status
            figures |= {"open_gaps": repair.open_gaps, "repaired_posts": repair.repaired_posts}
            errors.append(repair.last_error)
        if self._classifier is not None:
            classified = self._classifier.status
            figures |= {
                "predictions_stored": classified.predictions_stored,
                "pending_posts": self._classifier.pending,
                "refused_posts": classified.refused,
            }
            errors.append(classified.last_error)
        figures["last_error"] = next((error for error in errors if error), None)
        return figures

    async def _run_parts(self, stop: asyncio.Event, ledger: Ledger, api: XApi, leadership: Leadership) -> None:
        store, classifier, backlog, spend = self._store, self._classifier, self._backlog, self._spend
        assert store is not None
        assert backlog is not None
        assert spend is not None
        assert classifier is not None
        options = self._options
        connects = Connects(options.stream.connects_per_window, ConnectLog(ledger.db, self.source))
        replay = Replay(api, self._token, fields=options.fields, options=options.stream, connects=connects)
        self._repairer = Repairer(
            ledger,
            api,
            options=options,
            found=FoundStore(store, self.source),
            replay=replay if options.plan == "enterprise" else None,
            is_idle=lambda: writer.is_idle,
        )
        reached = await until_it_works(ledger.reached, self._note)
        self._supervisor = StreamSupervisor(
            api,
            self._token,
            options=options,
            connects=connects,
            missed_since=snowflake_to_datetime(reached) if reached else None,
        )
        writer = Writer(self._inbox, backlog, store, self._repairer, stream=self.source, options=options.write)
        compliance = ComplianceKeeper(
            self._settings.x_api_base_url,
            self._token,
            open_eraser(self._settings, ledger.db),
            source=source_name(self._settings.x_api_base_url),
            options=options.compliance,
        )
        retention = RetentionKeeper(ledger.db, self._settings, options.retention)
        # Of the leaders of a stream in partitions one does what concerns the whole database.
        duties = [compliance.run(), retention.run()] if options.stream.partition in (None, 1) else []
        users = (api, self._supervisor, replay, compliance)
        parts = [
            self._follow_token(users),
            leadership.hold(ledger.epoch),
            *duties,
            classifier.run(),
            writer.run(),
            spend.run(api.usage if self._asks_usage else None),
            self._repairer.run(),
            self._supervisor.run(self._inbox),
        ]

        async def drain() -> None:
            await writer.finish()
            await classifier.finish()
            await until_it_works(spend.write, self._note)

        await _run_until(stop, parts, drain, options.drain_s)

    async def _open_database(self) -> Database:
        renew, lease_s = self._rotation.renew_database_url, self._options.leader.lease_s
        return await until_it_works(
            # A leader that hangs must not keep the next one out by a transaction that it left open.
            lambda: Database.open(
                self._database_url, application_name="overtone-ingest", renew=renew, patience_s=lease_s
            ),
            self._note,
        )

    async def _move_database(self, db: Database, settings: Settings) -> None:
        if settings.database_url is not None:
            await db.move_to(settings.database_url.get_secret_value())

    async def _follow_token(self, users: "Sequence[XApi | StreamSupervisor | Replay | ComplianceKeeper]") -> None:
        """Give `users` each new bearer token until cancelled."""

        async def take(settings: Settings) -> None:
            if settings.twitter_bearer_token is not None:
                for user in users:
                    user.use_token(settings.twitter_bearer_token.get_secret_value())

        end = self._rotation.follow("twitter_bearer_token", take)
        try:
            await asyncio.Event().wait()
        finally:
            end()

    @property
    def _asks_usage(self) -> bool:
        return not is_loopback(self._settings.x_api_base_url) or self._options.spend.monthly_posts is not None

    def _open_backlog(self) -> Backlog:
        root, most = self._settings.home / "spool", self._options.spool.max_mib * 2**20
        try:
            return Backlog(Spool.claim(root, self.source, most))
        except OSError as error:
            raise ConfigurationError(
                f"The spool under {root} cannot be used ({error.strerror or error}): OVERTONE_HOME must be a folder"
                " that this user may write to."
            ) from error

    async def _unless(self, stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None when `stop` is set before it is there."""
        task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            await _cancel([task, stopped])

    def _note(self, error: OvertoneError) -> None:
        if error.message != self._last_error:
            _log.warning("ingest.delayed", code=error.code, reason=error.message)
        self._last_error = error.message


class Ingestion:
    """Runs pipelines one after another: an unexpected failure costs a pause and a new pipeline, never silence."""

    def __init__(self, settings: Settings, options: IngestOptions) -> None:
        self._rotation = Rotation(settings)
        self._options = options
        self._pipeline: Pipeline | None = None
        self._state = "starting"
        self._restarts = 0
        self._began = time.monotonic()
        self._last_error: str | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Ingest until `stop` is set.

        Raises:
            ConfigurationError, StreamFatalError: starting again cannot help.
        """
        wait_s = 1.0
        refreshing = asyncio.create_task(self._rotation.keep_fresh())
        try:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    self._pipeline = Pipeline(self._rotation.settings, self._options, self._rotation)
                    self._state = "running"
                    await self._pipeline.run(stop)
                except FencedError as error:
                    self._last_error = error.message
                    _log.warning("ingest.stepped_down", reason=error.message)
                    await _sleep_unless(stop, 1.0)
                    continue
                except OvertoneError as error:
                    self._last_error = error.message
                    if await self._token_changes(error, stop):
                        continue
                    if isinstance(error, ConfigurationError) or (
                        isinstance(error, StreamError) and not error.retryable
                    ):
                        _log.error("ingest.stopped", code=error.code, reason=error.message)
                        raise
                    _log.exception("ingest.failed", code=error.code)
                except Exception as error:  # a defect must not end the ingestion
                    self._last_error = f"{type(error).__name__} in the pipeline; the log has the trace"
                    _log.exception("ingest.failed")
                else:
                    continue
                self._state = "restarting"
                self._restarts += 1
                wait_s = 1.0 if time.monotonic() - began > _GOOD_RUN_S else min(wait_s * 2, _MAX_RESTART_WAIT_S)
                await _sleep_unless(stop, wait_s)
        finally:
            refreshing.cancel()
            self._state = "stopped"

    async def _token_changes(self, error: OvertoneError, stop: asyncio.Event) -> bool:
        """Whether `error` is a bearer token that X refuses and that may have been exchanged by now; waits for that."""
        may_change = "twitter_bearer_token" in self._rotation.settings.may_change
        if not may_change or not isinstance(error, StreamFatalError) or error.details.get("status") != 401:
            return False
        refused = self._rotation.settings.twitter_bearer_token
        self._state = "waiting"
        _log.error("ingest.waits_for_token", reason=error.message)
        if (await self._rotation.renew()).twitter_bearer_token == refused:
            # A new one may have come while the old one was being refused, so that this does not wait for a change.
            await _sleep_unless(stop, self._rotation.settings.secrets_refresh_s)
        return True

    def status(self) -> dict[str, Any]:
        """The figures of the present pipeline and of this process. Callable from any thread."""
        figures = self._pipeline.status() if self._pipeline is not None else {"connected": False}
        return {
            "state": self._state,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._began, 1),
            "restarts": self._restarts,
            **figures,
            "last_error": figures.get("last_error") or self._last_error,
        }


def source_name(base_url: str, stream: StreamOptions | None = None) -> str:
    """The name under which posts, cursor and gaps of a stream of the API at `base_url` are kept.

    The simulator's is another one than X's: a cursor of the one must not make the other fetch anything. A partition
    has a name, and so a leader, of its own.
    """
    is_simulator = is_loopback(base_url)
    if stream is None or stream.partition is None:
        return "simulator" if is_simulator else "filtered_stream"
    return f"{'simulator_' if is_simulator else ''}{stream.endpoint}_{stream.partition}"


def billed(base_url: str, options: SpendOptions) -> tuple[str, SpendOptions]:
    """Under which name posts from the API at `base_url` are counted, and what they cost: the simulator's nothing."""
    if is_loopback(base_url):
        return "simulator_posts", options.model_copy(update={"post_usd": 0.0})
    return "posts", options


async def _run_until(
    stop: asyncio.Event,
    parts: Sequence[Coroutine[Any, Any, None]],
    drain: Callable[[], Awaitable[None]],
    drain_s: float,
) -> None:
    """Run `parts`, the last of which brings in new work, until `stop` is set or one of them ends."""
    tasks = [asyncio.create_task(part) for part in parts]
    source, stopped = tasks[-1], asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in tasks if task in done]
        if all(_ended_fatally(task) and task is source for task in failed):
            await _cancel([source])
            await _drained(drain, drain_s)
        for task in failed:
            task.result()
    finally:
        await _cancel([*tasks, stopped])


def _ended_fatally(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and isinstance(task.exception(), StreamFatalError)


async def _drained(drain: Callable[[], Awaitable[None]], drain_s: float) -> None:
    try:
        await asyncio.wait_for(drain(), drain_s)
    except TimeoutError:
        _log.warning("ingest.drain_cut", drain_s=drain_s, advice="the next start goes on where this one stopped")


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _sleep_unless(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
