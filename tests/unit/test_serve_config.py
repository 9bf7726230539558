"""The Serve configuration file says what the code takes."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve.environment import APPLICATION, DEPLOYMENT, JOBS_APPLICATION, ROUTE_PREFIX

# What importing Ray Serve warns of is Ray's business.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = yaml.safe_load((Path(__file__).parents[2] / "configs" / "serve" / "app.yaml").read_text())


def test_the_file_names_the_application_and_its_deployment() -> None:
    application, consumers = CONFIG["applications"]

    assert (consumers["name"], consumers["route_prefix"]) == (JOBS_APPLICATION, None)

    assert (application["name"], application["route_prefix"]) == (APPLICATION, ROUTE_PREFIX)
    assert [item["name"] for item in application["deployments"]] == [DEPLOYMENT]


def test_its_values_are_the_defaults_and_are_taken() -> None:
    from serve.app import JobsArgs, ServeArgs
    from serve.rollout import LiveOptions

    application, consumers = CONFIG["applications"]
    assert JobsArgs(**consumers["args"]) == JobsArgs()
    assert ServeArgs(**application["args"]) == ServeArgs()
    assert LiveOptions(**application["deployments"][0]["user_config"]) == LiveOptions()


def test_wrong_arguments_are_refused_by_name() -> None:
    from serve.app import ServeArgs

    with pytest.raises(ValidationError, match="budget_tokens"):
        ServeArgs(budget_tokens="many")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="budget"):
        ServeArgs(budget=1)  # type: ignore[call-arg]


def test_a_replica_that_is_taken_away_has_time_for_all_that_may_wait() -> None:
    from serve.app import ServeArgs, build

    args = ServeArgs(min_replicas=1, max_replicas=3)
    deployment = build(args)._bound_deployment._deployment_config

    assert deployment.graceful_shutdown_timeout_s == args.drain_s > args.max_bulk_s
    assert deployment.autoscaling_config.metrics_interval_s < args.scale_up_delay_s
