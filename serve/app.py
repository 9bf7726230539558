"""The Serve application: `serve run serve.app:build`, or `deploy` from Python."""

import warnings
from hashlib import sha256
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions
from ray.serve.schema import LoggingConfig

from overtone import __version__
from overtone.settings import load_settings
from serve.batcher import Limits
from serve.environment import APPLICATION, JOBS_APPLICATION, ROUTE_PREFIX
from serve.replica import ReplicaOptions, deployment
from serve.rollout import LiveOptions

_LIMITS = Limits()
_REPORT_S = 2.0
"""How often replicas report their work while their number may change."""


class ServeArgs(BaseModel):
    """The application's arguments. They are public within the Ray cluster: no secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int | None = Field(None, ge=1, le=1024, description="Default: SERVE_REPLICAS, or one a core, at most 8.")
    threads: int = Field(1, ge=1, le=256, description="Engine threads a replica.")
    gpus: float = Field(0, ge=0, le=16, description="GPUs a replica, which Ray hides from it otherwise; 0.5 is half.")
    pool: str | None = Field(None, description="Replicas run on nodes whose label `pool` is this. Default: on any.")
    min_replicas: int | None = Field(None, ge=1, le=1024, description="With max_replicas: replicas come with the work.")
    max_replicas: int | None = Field(None, ge=1, le=1024)
    scale_up_delay_s: float = Field(5.0, ge=0, le=3600, description="How long more replicas must be needed.")
    scale_down_delay_s: float = Field(120.0, ge=0, le=86_400, description="How long fewer must be enough.")
    live: LiveOptions = LiveOptions()
    """The first `user_config`."""
    metrics_folder: str | None = Field(None, description="Folder through which replicas add up their metrics.")
    budget_tokens: int | None = Field(
        None, ge=16, le=1_000_000, description="Padded tokens a batch. Default: measured when a bundle is loaded."
    )
    waste_tokens: int | None = Field(
        None, ge=0, le=1_000_000, description="Padding a row may add to it. Default: measured, as above."
    )
    max_interactive_texts: int = Field(_LIMITS.max_interactive_texts, ge=1, le=1_000_000)
    max_bulk_texts: int = Field(_LIMITS.max_bulk_texts, ge=1, le=10_000_000)
    max_interactive_s: float = Field(_LIMITS.max_interactive_s, gt=0, le=3600, description="Work that may wait.")
    max_bulk_s: float = Field(_LIMITS.max_bulk_s, gt=0, le=86_400, description="As above, of both priorities.")
    interactive_deadline_s: float = Field(30.0, gt=0, le=3600)
    bulk_deadline_s: float = Field(600.0, gt=0, le=86_400)
    drain_s: float = Field(
        60.0, ge=1, le=3600, description="How long a replica that is taken away may take to answer what it has."
    )

    @model_validator(mode="after")
    def _bounds_are_whole(self) -> Self:
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError("min_replicas and max_replicas go together")
        if self.min_replicas and self.max_replicas and self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        if self.min_replicas and self.replicas:
            raise ValueError("give replicas, or min_replicas and max_replicas, not both")
        return self


class JobsArgs(BaseModel):
    """The arguments of the application whose replicas consume tasks. Public within the Ray cluster: no secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_consumers: int = Field(1, ge=1, le=64)
    max_consumers: int = Field(1, ge=1, le=64, description="Consumers come with the length of the queue, up to here.")
    cpus: float = Field(0.0, ge=0, le=16, description="CPUs that Ray reserves for each; they do little themselves.")
    pool: str | None = Field(None, description="Consumers run on nodes whose label `pool` is this. Default: on any.")
    metrics_folder: str | None = Field(None, description="Folder through which processes add up their metrics.")

    @model_validator(mode="after")
    def _bounds_are_whole(self) -> Self:
        if self.min_consumers > self.max_consumers:
            raise ValueError("min_consumers is above max_consumers")
        return self


def build_jobs(args: JobsArgs) -> Application:
    """The consumers of tasks that `args` describe."""
    from serve.consumers import CONCURRENCY, deployment

    variables = {"PROMETHEUS_MULTIPROC_DIR": args.metrics_folder} if args.metrics_folder else {}
    # Nobody calls a consumer: without this it would take the port on which a node's metrics are read.
    variables |= {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    scaling = AutoscalingConfig(
        min_replicas=args.min_consumers,
        max_replicas=args.max_consumers,
        upscale_delay_s=10.0,
        downscale_delay_s=120.0,
        policy=AutoscalingPolicy(policy_function="serve.scaling:scale_by_queue"),
    )
    is_fixed = args.min_consumers == args.max_consumers
    application: Application = deployment.options(
        **({"num_replicas": args.min_consumers} if is_fixed else {"autoscaling_config": scaling}),
        # Ray takes this for the number of tasks that a consumer works on at once.
        max_ongoing_requests=CONCURRENCY,
        ray_actor_options={
            "num_cpus": args.cpus,
            "runtime_env": {"env_vars": variables},
            **({"label_selector": {"pool": args.pool}} if args.pool else {}),
        },
        health_check_period_s=5,
        health_check_timeout_s=15,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=20,
        logging_config=LoggingConfig(enable_access_log=False, encoding="JSON"),
    ).bind()
    return application


def build(args: ServeArgs) -> Application:
    """The application that `args` describe."""
    options = ReplicaOptions(
        threads=args.threads,
        limits=Limits(
            budget_tokens=args.budget_tokens,
            waste_tokens=args.waste_tokens,
            max_interactive_texts=args.max_interactive_texts,
            max_bulk_texts=args.max_bulk_texts,
            max_interactive_s=args.max_interactive_s,
            max_bulk_s=args.max_bulk_s,
        ),
        interactive_deadline_s=args.interactive_deadline_s,
        bulk_deadline_s=args.bulk_deadline_s,
    )
    # Before the process starts: `prometheus_client` reads it on import.
    variables = {"PROMETHEUS_MULTIPROC_DIR": args.metrics_folder} if args.metrics_folder else {}
    application: Application = deployment.options(
        **_number(args),
        user_config=args.live.model_dump(),
        # The batcher is the queue and refuses by itself; Serve's own limit only guards its memory.
        max_ongoing_requests=10_000,
        ray_actor_options={
            "num_cpus": args.threads,
            "num_gpus": args.gpus,
            "runtime_env": {"env_vars": variables},
            **({"label_selector": {"pool": args.pool}} if args.pool else {}),
        },
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_s,
        logging_config=LoggingConfig(enable_access_log=False, encoding="JSON"),
        # Serve makes up a new version at every `serve.run`, which restarts every replica even when nothing but
        # `user_config` was changed. It takes a version of ours only as an internal option.
        version=_version(options, variables),
        _internal=True,
    ).bind(options)
    return application


def _number(args: ServeArgs) -> dict[str, Any]:
    """How many replicas: a fixed number, or bounds and what decides between them."""
    if args.min_replicas is None or args.max_replicas is None:
        return {"num_replicas": args.replicas or load_settings().replicas}
    with warnings.catch_warnings():
        # Serve 2.60 announces variables in place of `metrics_interval_s`, and reads none of them yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            metrics_interval_s=_REPORT_S,
            look_back_period_s=15.0,
            upscale_delay_s=args.scale_up_delay_s,
            downscale_delay_s=args.scale_down_delay_s,
            policy=AutoscalingPolicy(policy_function="serve.scaling:scale_by_waiting_tokens"),
        )
    return {"autoscaling_config": scaling}


def _version(options: ReplicaOptions, variables: dict[str, str]) -> str:
    """Changes with all that a running replica cannot take in."""
    fixed = f"{__version__} {options.model_dump_json()} {sorted(variables.items())}"
    return sha256(fixed.encode()).hexdigest()[:16]


def deploy(args: ServeArgs, *, host: str, port: int, wait: bool = True) -> None:
    """Start Serve on `host` and `port` in the Ray instance this process is connected to, and wait until it answers.

    Without `wait`, replicas that run may still have to take what is new in `args`. That instance must have been started
    with `serve.environment.serve_environment` in its environment.
    """
    serve.start(http_options=HTTPOptions(host=host, port=port))
    target = serve.RunTarget(build(args), name=APPLICATION, route_prefix=ROUTE_PREFIX)
    serve.run_many([target], wait_for_applications_running=wait)


def deploy_jobs(args: JobsArgs) -> None:
    """Start the consumers of tasks in a Serve that runs, without waiting for them."""
    target = serve.RunTarget(build_jobs(args), name=JOBS_APPLICATION, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
