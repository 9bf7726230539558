"""Whether it is time to train again, and the order for it: one run at a time, submitted once, however many ask.

A run is written down before its job is submitted, under the name that is the job's id at Ray too. A check that is cut
off in between is finished by the next one, and a second submission of the same id is refused by Ray.
"""

import asyncio
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from overtone.db import retrain as store
from overtone.db.database import Database
from overtone.db.retrain import History, Labels, Profile, Run
from overtone.errors import ConfigurationError
from overtone.logging import get_logger
from overtone.settings import Settings
from train.config import read_values
from train.drift import confidence_psi, label_psi

RUN_NAME = "{run}"
"""Stands for the name of the run in the options of `python -m train`."""

Outcome = Literal["submits", "waits", "busy"]
JobState = Literal["running", "succeeded", "failed"]

_HOUR = timedelta(hours=1)

_log = get_logger()


class Policy(BaseModel):
    """What calls for a new run, beside MIN_SAMPLES_FOR_RETRAIN and RETRAIN_INTERVAL_HOURS of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_hours: float = Field(24.0, gt=0, le=168)
    """Posts of the last so many hours are compared with those of the same hours some days ago."""
    days_back: tuple[int, ...] = Field((28, 21, 14, 7, 1), min_length=1)
    """Days between the two; the first of these for which the model's version has predictions enough is taken."""
    min_predictions: int = Field(1000, ge=100)
    """Of both windows; with fewer, nothing is said of drift."""
    max_psi: float = Field(0.2, gt=0, le=10)
    """Population-stability index of the labels, and of the confidence."""
    max_confidence_drop: float = Field(0.05, gt=0, le=1)
    """By which the mean confidence may fall."""
    drift_rest_hours: float = Field(24.0, ge=0, le=8760)
    """After a run, drift alone calls for no other within so many hours."""
    retry_hours: float = Field(1.0, gt=0, le=168)
    """Wait after a run that failed; doubled with each failure more, up to the interval of the settings."""


@dataclass(frozen=True)
class Criterion:
    """One of the things that call for a run."""

    name: str
    is_met: bool
    value: float | None
    """None where it cannot be told."""
    limit: float
    """Met from here on; drift: above it."""
    told: str
    """For people."""


@dataclass(frozen=True)
class Facts:
    """What a decision is made from."""

    labels: Labels
    history: History
    recent: Profile | None
    reference: Profile | None
    """The same hours some days ago, of the version that `recent` is of."""
    reference_days: int | None


@dataclass(frozen=True)
class Decision:
    """Whether a run is ordered, and why."""

    outcome: Outcome
    """`busy`: a run or another check is under way."""
    reasons: tuple[str, ...]
    criteria: tuple[Criterion, ...] = ()
    model_version: str | None = None
    run: str | None = None
    """Name of the run that is ordered, or that is under way."""
    entrypoint: str | None = None
    decided_at: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        at = self.decided_at.isoformat(timespec="milliseconds") if self.decided_at else None
        return {**asdict(self), "decided_at": at}


@dataclass(frozen=True)
class Order:
    """What a check is told."""

    arguments: tuple[str, ...]
    """Options of `python -m train`."""
    python: str = "python"
    """The interpreter on the cluster."""
    policy: Policy = field(default_factory=Policy)
    is_forced: bool = False
    """Order a run whatever the criteria say, unless one is under way."""
    is_dry_run: bool = False


@dataclass(frozen=True)
class JobNeeds:
    """What a job is given beside its command."""

    working_dir: Path | None = None
    """Uploaded for the job to run in. None: it runs where the cluster has the code."""
    cpus: float | None = None
    """Kept for the command itself; its training workers ask for their own."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the node that the command runs on."""


class JobServer(Protocol):
    """What is needed of Ray's job server; see `train.submission.RayJobs`."""

    def state(self, name: str) -> JobState | None:
        """How the job is; None if there is none of this name."""

    def submit(self, name: str, entrypoint: str) -> None:
        """Run the command as this job, once."""


def load_policy(path: Path | None) -> Policy:
    """The policy in the YAML file `path`; without one the defaults, which `configs/train/retrain.yaml` spells out.

    Raises:
        ConfigurationError: naming the file and each value that is wrong.
    """
    return read_values(path, Policy, "the policy is")


def decide(settings: Settings, policy: Policy, facts: Facts, *, is_forced: bool = False) -> Decision:
    """Weigh `facts`. Pure.

    Whatever else is met, without a new label there is nothing to learn that the last run did not learn.
    """
    labels, history = facts.labels, facts.history
    criteria = (_enough_labels(settings, labels), _interval(settings, facts), *_drift(policy, facts))
    met = [one.told for one in criteria if one.is_met]
    waits = _reasons_to_wait(settings, policy, facts)
    if is_forced:
        submits, reasons = True, ["it was asked for"]
    else:
        submits, reasons = bool(met) and not waits, waits if met and waits else met or [one.told for one in criteria]
    return Decision(
        outcome="busy" if history.open_run else "submits" if submits else "waits",
        reasons=tuple(reasons),
        criteria=criteria,
        model_version=facts.recent.model_version if facts.recent else None,
        decided_at=labels.counted_at,
    )


def _enough_labels(settings: Settings, labels: Labels) -> Criterion:
    limit = settings.min_samples_for_retrain
    told = f"{labels.fresh} new labels of {limit}"
    return Criterion("new_labels", labels.fresh >= limit, labels.fresh, limit, told)


def _interval(settings: Settings, facts: Facts) -> Criterion:
    limit = settings.retrain_interval_hours
    since = facts.history.learned_at or facts.labels.first_at
    if since is None:
        return Criterion("interval", False, None, limit, "no run and no label yet")
    hours = (facts.labels.counted_at - since) / _HOUR
    what = "last run" if facts.history.learned_at else "first label"
    return Criterion(
        "interval", hours >= limit, round(hours, 2), limit, f"{hours:.1f} hours of {limit} since the {what}"
    )


def _drift(policy: Policy, facts: Facts) -> tuple[Criterion, ...]:
    limits = {
        "label_psi": policy.max_psi,
        "confidence_psi": policy.max_psi,
        "confidence_drop": policy.max_confidence_drop,
    }
    recent, reference = facts.recent, facts.reference
    if recent is None or reference is None or min(recent.rows, reference.rows) < policy.min_predictions:
        have = f"{recent.rows if recent else 0} predictions of late, {reference.rows if reference else 0} of before"
        told = f"cannot be told from {have}; {policy.min_predictions} of one version are needed"
        return tuple(Criterion(name, False, None, limit, f"{name} {told}") for name, limit in limits.items())
    learned_at = facts.history.learned_at
    rests = learned_at is not None and (facts.labels.counted_at - learned_at) / _HOUR < policy.drift_rest_hours
    values = {
        "label_psi": label_psi(reference, recent),
        "confidence_psi": confidence_psi(reference, recent),
        "confidence_drop": reference.mean_confidence - recent.mean_confidence,
    }
    against = f"against {facts.reference_days} days ago, {recent.rows} and {reference.rows} predictions"
    rest = f"; counts {policy.drift_rest_hours:g} hours after a run" if rests else ""
    return tuple(
        Criterion(
            name,
            value > limits[name] and not rests,
            round(value, 4),
            limits[name],
            f"{name} {value:.3f} of {limits[name]:g} {against}{rest}",
        )
        for name, value in values.items()
    )


def _reasons_to_wait(settings: Settings, policy: Policy, facts: Facts) -> list[str]:
    history, labels = facts.history, facts.labels
    reasons = []
    if not labels.fresh:
        reasons.append("no new label to learn from")
    if history.failures and history.failed_at:
        # Far fewer doublings than these fill the longest interval.
        wait = min(policy.retry_hours * 2 ** min(history.failures - 1, 14), settings.retrain_interval_hours)
        left = wait - (labels.counted_at - history.failed_at) / _HOUR
        if left > 0:
            reasons.append(f"the last {history.failures} runs failed: the next one in {left:.1f} hours")
    return reasons


async def check(settings: Settings, db: Database, order: Order, connect: Callable[[], JobServer]) -> Decision:
    """Decide, keep the decision with its figures, and submit the run if one is due; `connect` reaches the job server.

    Raises:
        ConfigurationError: the job cannot be submitted as it is.
        DatabaseUnavailableError: the database cannot be reached.
        UnavailableError: the job server does not answer. A run that was written down is submitted by the next check.
    """
    async with store.only_one(db) as is_alone:
        if not is_alone:
            return Decision("busy", ("another check is under way",))
        history = await store.history(db)
        if history.open_run:
            under_way = await _look_after(db, history.open_run, connect, is_dry_run=order.is_dry_run)
            if under_way:
                return under_way
            history = await store.history(db)
        facts = await _facts(settings, db, order, history)
        decision = decide(settings, order.policy, facts, is_forced=order.is_forced)
        if decision.outcome == "submits":
            decision = _named(decision, order, settings, with_feedback=facts.labels.total > 0)
        return decision if order.is_dry_run else await _carry_out(db, decision, connect)


async def _look_after(db: Database, run: Run, connect: Callable[[], JobServer], *, is_dry_run: bool) -> Decision | None:
    """Bring what is known of the open `run` up to date; None when it has ended."""
    server = await asyncio.to_thread(connect)
    state = await asyncio.to_thread(server.state, run.name)
    if state in {"succeeded", "failed"} or (state is None and run.is_submitted):
        if is_dry_run:
            return _busy(run, "has ended, which the next check notes")
        if state is None:
            _log.warning("retrain.job_lost", run=run.name)
        await store.end_run(db, run.name, "succeeded" if state == "succeeded" else "failed")
        return None
    if not is_dry_run and not run.is_submitted:
        if state is None:
            await asyncio.to_thread(server.submit, run.name, run.entrypoint)
        await store.mark_submitted(db, run.name)
    return _busy(run, "is under way")


def _busy(run: Run, told: str) -> Decision:
    return Decision("busy", (f"run {run.name} {told}",), run=run.name, entrypoint=run.entrypoint)


async def _facts(settings: Settings, db: Database, order: Order, history: History) -> Facts:
    labels = await store.count_labels(db, with_posts=settings.allow_training_on_x_content, since=history.learned_at)
    policy, last = order.policy, labels.counted_at
    first = last - timedelta(hours=policy.window_hours)
    recent = await store.profile(db, first, last)
    best, best_days = None, None
    if recent is not None:
        for days in policy.days_back:
            back = timedelta(days=days)
            found = await store.profile(db, first - back, last - back, recent.model_version)
            if found and (best is None or found.rows > best.rows):
                best, best_days = found, days
            if found and found.rows >= policy.min_predictions:
                break
    return Facts(labels, history, recent, best, best_days)


def _named(decision: Decision, order: Order, settings: Settings, *, with_feedback: bool) -> Decision:
    assert decision.decided_at is not None
    name = f"retrain-{decision.decided_at:%Y%m%dt%H%M%S}-{decision.decided_at.microsecond // 1000:03d}"
    command = entrypoint(order, settings, name, with_feedback=with_feedback)
    return replace(decision, run=name, entrypoint=command)


async def _carry_out(db: Database, decision: Decision, connect: Callable[[], JobServer]) -> Decision:
    assert decision.decided_at is not None
    detail = {"reasons": decision.reasons, "criteria": [asdict(one) for one in decision.criteria]}
    if decision.run is None or decision.entrypoint is None:
        await store.record_wait(db, decision.decided_at, detail, decision.model_version)
        return decision
    # Reached first: a server that is away leaves nothing behind to be finished.
    server = await asyncio.to_thread(connect)
    run = Run(decision.run, decision.entrypoint, decision.decided_at, is_submitted=False)
    if not await store.claim_run(db, run, detail, decision.model_version):
        return Decision("busy", ("another run is under way",))
    _log.info("retrain.ordered", run=run.name, reasons=list(decision.reasons))
    await asyncio.to_thread(server.submit, run.name, run.entrypoint)
    await store.mark_submitted(db, run.name)
    return decision


def entrypoint(order: Order, settings: Settings, name: str, *, with_feedback: bool) -> str:
    """The command of the run `name`, for a shell. Options that a run needs and `order` leaves out are added."""
    arguments = [argument.replace(RUN_NAME, name) for argument in order.arguments]
    given = {argument.partition("=")[0] for argument in arguments}
    if "--run-name" not in given:
        arguments += ["--run-name", name]
    if not given & {"--output", "--register", "--gate"}:
        arguments += ["--output", str(settings.home / "bundles" / name)]
    if with_feedback and "--from-feedback" not in given:
        arguments.append("--from-feedback")
    return shlex.join([order.python, "-m", "train", *arguments])


def require_arguments(arguments: Sequence[str]) -> None:
    """Refuse options of `python -m train` that could never make a run.

    Raises:
        ConfigurationError: naming what is missing.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    missing = [name for name in ("--config", "--validation") if name not in given]
    if missing:
        raise ConfigurationError(
            f"options of `python -m train` are missing: {', '.join(missing)}; they follow after --, "
            "such as: overtone retrain --check -- --config configs/train/tweets.yaml --validation val.tsv"
        )
