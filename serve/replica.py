"""The deployment: one process that listens, batches and runs the engine."""

import contextlib
import gc
from asyncio import Task, TaskGroup, get_running_loop, to_thread
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from starlette.types import ASGIApp

from overtone import logging
from overtone.engine import open_engine
from overtone.erasure import open_eraser
from overtone.errors import BundleError, ConfigurationError, EngineError
from overtone.hardware import usable_cores
from overtone.metrics import forget_dead_processes
from overtone.rotation import Rotation
from overtone.settings import Settings, load_settings
from serve.auth import Gate, KeyRing
from serve.batcher import Limits
from serve.cache import Cache, MemoryCache, RedisCache
from serve.classifier import Classifier
from serve.environment import DEPLOYMENT, is_loopback
from serve.http import create_app
from serve.loopback import keep_handle_port_on_loopback
from serve.quotas import Allowance, Quotas
from serve.rollout import LiveOptions
from serve.rotation import address, follow_secrets
from serve.scaling import LoadMeter
from serve.service import JobDesk, Service
from serve.shortcut import Shortcut
from serve.store import Store
from serve.tokens import open_tokens
from serve.tracing import open_tracing

_LONE_THREADS = 2
"""For a text that finds its replica idle, where a second thread pays; more take little more off a short one."""


class ReplicaOptions(BaseModel):
    """What every replica of a deployment starts with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = 1
    limits: Limits = Limits()
    interactive_deadline_s: float = 30.0
    bulk_deadline_s: float = 600.0


class Replica:
    """Answers HTTP with one engine.

    Settings come from the environment of this process, not from its arguments: those are public in a Ray cluster.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        self._settings = load_settings()
        logging.configure("serve", self._settings.log_level, self._settings.log_format)
        if is_loopback(self._settings.api_host):
            keep_handle_port_on_loopback()
        allowance = Allowance(
            self._settings.limit_requests_per_minute,
            self._settings.limit_texts_per_minute,
            self._settings.limit_texts_per_day,
        )
        self._rotation = Rotation(self._settings)
        self._store = Store(
            address(self._settings.database_url),
            default=allowance,
            eraser_for=partial(open_eraser, self._settings),
            renew=self._rotation.renew_database_url,
        )
        self._keys = KeyRing(self._store)
        self._quotas = Quotas(address(self._settings.redis_url))
        self._tokens = open_tokens(self._settings, allowance or None)
        self._gate = Gate(
            self._keys, api_key_header=self._settings.api_key_header, tokens=self._tokens, quotas=self._quotas
        )
        cache = _cache(self._settings)
        follow_secrets(self._rotation, store=self._store, tokens=self._tokens, quotas=self._quotas, cache=cache)
        self._classifier = Classifier(
            limits=options.limits,
            threads=options.threads,
            engine_for=partial(
                open_engine,
                wanted=self._settings.engine,
                built=self._settings.tensorrt_folder,
                lone_threads=min(_LONE_THREADS, usable_cores()),
            ),
            cache=cache,
        )
        self._tracing = open_tracing(self._settings.otel_exporter_otlp_endpoint, self._settings.otel_traces_sampler_arg)
        self._service = Service(
            classifier=self._classifier,
            gate=self._gate,
            records=self._store,
            jobs=JobDesk(
                self._store.database,
                self._settings.jobs_path,
                max_bytes=self._settings.jobs_max_mib * 2**20,
                max_texts=self._settings.jobs_max_texts,
                max_open=self._settings.jobs_max_open,
                keep_days=self._settings.retention_jobs_days,
            ),
            tracing=self._tracing,
            replica=serve.get_replica_context().replica_id.unique_id,
            cors_origins=self._settings.cors_origins,
            metrics_folder=self._settings.prometheus_multiproc_dir,
            sends_request_id=False,
            interactive_deadline_s=options.interactive_deadline_s,
            bulk_deadline_s=options.bulk_deadline_s,
        )
        if self._settings.prometheus_multiproc_dir is not None:
            forget_dead_processes(self._settings.prometheus_multiproc_dir)
        self._refreshing: Task[None] | None = None
        self._load = LoadMeter()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Serve listens with."""
        Shortcut.open(create_app(replace(self._service, sends_request_id=True)))
        return create_app(self._service)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Change to the bundles and shares that `config` asks for, without losing a request.

        A bundle that is not fit for use leaves the one in use where it is; `GET /models` says why.

        Raises:
            BundleError: no bundle is in use yet and this one is not fit.
            ConfigurationError: `config` is not what `LiveOptions` describes.
        """
        if self._refreshing is None:
            # A database that is away at the start stops nothing but the look-up of keys.
            await self._keys.refresh()
            self._refreshing = get_running_loop().create_task(self._keep_fresh())
        self._quotas.share_among(serve.get_replica_context().world_size)
        try:
            live = LiveOptions.model_validate(config)
        except ValidationError as error:
            if not self._classifier.is_ready:
                raise ConfigurationError(f"user_config: {error.errors()[0]['msg']}") from None
            logging.get_logger().error("replica.config_refused", fields=[item["loc"] for item in error.errors()])
            return
        is_first = not self._classifier.is_ready
        await self._classifier.apply(live, self._settings.bundle)
        if is_first:
            # What was imported and loaded stays: looking through all of it for garbage would stop answers for 0.2 s.
            gc.freeze()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serve.scaling` decides by; Serve asks every few seconds if the number of replicas may change."""
        return self._load.measure(self._classifier.work)

    async def check_health(self) -> None:
        """Raise if this replica cannot do its work, so that Serve replaces it.

        Raises:
            BundleError: no bundle was loaded.
            EngineError: the engine fails on every text.
        """
        if not self._classifier.is_ready:
            raise BundleError("No bundle is loaded: the deployment's user_config must be set, if only to {}.")
        if self._classifier.is_failing:
            raise EngineError("The engine failed on the last 32 texts.")

    async def __del__(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        with contextlib.suppress(TimeoutError):
            await self._classifier.close()
        if self._tokens is not None:
            await self._tokens.close()
        if self._tracing is not None:
            await to_thread(self._tracing.close)
        await self._quotas.close()
        await self._store.close()

    async def _keep_fresh(self) -> None:
        async with TaskGroup() as group:
            group.create_task(self._gate.keep_fresh())
            group.create_task(self._rotation.keep_fresh())


deployment: Any = serve.deployment(name=DEPLOYMENT)(serve.ingress()(Replica))
"""`Replica`, as Serve takes it."""


def _cache(settings: Settings) -> Cache | None:
    if not settings.cache_entries:
        return None
    url = address(settings.redis_url)
    return RedisCache(url, ttl_s=settings.cache_ttl_s) if url else MemoryCache(settings.cache_entries)
