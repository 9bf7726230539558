"""When a new run is called for: the criteria one by one, and what holds a run back."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.db.retrain import BUCKETS, History, Labels, Profile, Run
from overtone.errors import ConfigurationError
from overtone.settings import Settings, load_settings
from train.drift import confidence_psi, label_psi, stability_index
from train.retrain import Decision, Facts, Order, Policy, decide, entrypoint, load_policy, require_arguments

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
POLICY = Policy()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(overtone_home=tmp_path, min_samples_for_retrain=100, retrain_interval_hours=48)


def profile(share: float, confidence: float, rows: int = 2000) -> Profile:
    """Predictions of which `share` are positive, all about as confident as `confidence`."""
    positive = round(rows * share)
    buckets = [0] * BUCKETS
    middle = int(confidence * BUCKETS)
    for number in range(rows):
        buckets[min(max(middle - 5 + number % 11, 0), BUCKETS - 1)] += 1
    return Profile("m-1", {"positive": positive, "negative": rows - positive}, tuple(buckets), confidence)


def facts(
    *,
    fresh: int = 10,
    learned: float | None = 30,
    failed: tuple[int, float] | None = None,
    recent: Profile | None = None,
    reference: Profile | None = None,
    open_run: Run | None = None,
) -> Facts:
    """`learned` and the second of `failed` are hours ago."""
    ago = lambda hours: None if hours is None else NOW - timedelta(hours=hours)  # noqa: E731
    failures, failed_hours = failed or (0, None)
    labels = Labels(fresh, fresh, NOW - timedelta(hours=40) if fresh else None, NOW)
    return Facts(labels, History(open_run, ago(learned), failures, ago(failed_hours)), recent, reference, 7)


def met(decision: Decision) -> set[str]:
    return {one.name for one in decision.criteria if one.is_met}


def test_nothing_is_due_and_every_criterion_is_told_with_its_figures(settings: Settings) -> None:
    calm = profile(0.5, 0.8)
    found = decide(settings, POLICY, facts(recent=calm, reference=calm))
    assert (found.outcome, met(found)) == ("waits", set())
    assert {one.name: (one.value, one.limit) for one in found.criteria} == {
        "new_labels": (10, 100),
        "interval": (30.0, 48),
        "label_psi": (0.0, 0.2),
        "confidence_psi": (0.0, 0.2),
        "confidence_drop": (0.0, 0.05),
    }
    assert found.reasons == tuple(one.told for one in found.criteria)


def test_labels_enough_call_for_a_run(settings: Settings) -> None:
    assert decide(settings, POLICY, facts(fresh=99)).outcome == "waits"
    found = decide(settings, POLICY, facts(fresh=100))
    assert (found.outcome, found.reasons) == ("submits", ("100 new labels of 100",))


def test_the_interval_counts_from_the_last_run_or_the_first_label(settings: Settings) -> None:
    assert met(decide(settings, POLICY, facts(learned=48))) == {"interval"}
    assert met(decide(settings, POLICY, facts(learned=None))) == set()
    late = replace(facts(learned=None), labels=Labels(5, 5, NOW - timedelta(hours=49), NOW))
    found = decide(settings, POLICY, late)
    assert (found.outcome, found.reasons) == ("submits", ("49.0 hours of 48 since the first label",))


def test_without_a_new_label_there_is_nothing_to_learn(settings: Settings) -> None:
    found = decide(settings, POLICY, facts(fresh=0, learned=1000))
    assert (found.outcome, met(found), found.reasons) == ("waits", {"interval"}, ("no new label to learn from",))
    assert decide(settings, POLICY, facts(fresh=0, learned=1000), is_forced=True).outcome == "submits"


@pytest.mark.parametrize(
    ("recent", "called"),
    [
        (profile(0.8, 0.8), {"label_psi"}),
        (profile(0.5, 0.5), {"confidence_psi", "confidence_drop"}),
        (profile(0.5, 0.74), {"confidence_psi", "confidence_drop"}),
        (profile(0.55, 0.8), set()),
        (profile(0.5, 0.98), {"confidence_psi"}),
        (profile(0.1, 0.3, rows=999), set()),
    ],
)
def test_drift_calls_for_a_run(settings: Settings, recent: Profile, called: set[str]) -> None:
    found = decide(settings, POLICY, facts(recent=recent, reference=profile(0.5, 0.8)))
    assert met(found) == called
    assert found.outcome == ("submits" if called else "waits")
    assert found.model_version == "m-1"


def test_drift_rests_after_a_run(settings: Settings) -> None:
    seen = facts(learned=23, recent=profile(0.9, 0.5), reference=profile(0.5, 0.8))
    found = decide(settings, POLICY, seen)
    assert (found.outcome, met(found)) == ("waits", set())
    assert {one.name for one in found.criteria if one.value and one.value > one.limit} == {
        "label_psi",
        "confidence_psi",
        "confidence_drop",
    }
    assert decide(settings, POLICY.model_copy(update={"drift_rest_hours": 1.0}), seen).outcome == "submits"


@pytest.mark.parametrize(("failures", "hours"), [(1, 1), (2, 2), (4, 8), (40, 48)])
def test_failed_runs_are_tried_again_ever_later(settings: Settings, failures: int, hours: float) -> None:
    soon = decide(settings, POLICY, facts(fresh=500, failed=(failures, hours - 0.1)))
    assert (soon.outcome, met(soon)) == ("waits", {"new_labels"})
    assert f"the last {failures} runs failed" in soon.reasons[0]
    assert decide(settings, POLICY, facts(fresh=500, failed=(failures, hours))).outcome == "submits"


def test_one_run_at_a_time(settings: Settings) -> None:
    run = Run("retrain-1", "python -m train", NOW, is_submitted=True)
    assert decide(settings, POLICY, facts(fresh=500, open_run=run), is_forced=True).outcome == "busy"


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=50))
def test_the_index_is_0_for_the_same_shares_and_never_below(counts: list[int]) -> None:
    assert stability_index(counts, counts) == 0
    assert stability_index(counts, counts[::-1]) >= 0


def test_the_index_is_that_of_the_formula() -> None:
    # (0.25 - 0.5) ln 0.5 + (0.75 - 0.5) ln 1.5, which half a count changes little.
    assert stability_index([50_000, 50_000], [25_000, 75_000]) == pytest.approx(0.274653, abs=1e-4)


def test_confidence_is_compared_in_bins_of_like_size() -> None:
    calm = profile(0.5, 0.8)
    assert confidence_psi(calm, profile(0.5, 0.8, rows=20_000)) < 0.001
    assert label_psi(calm, Profile("m-1", {"neutral": 2000}, calm.buckets, 0.8)) > 1
    everything_at_once = Profile("m-1", {"positive": 5}, (*[0] * 49, 5), 1.0)
    assert confidence_psi(everything_at_once, everything_at_once) == 0


def test_the_command_of_a_run(settings: Settings) -> None:
    order = Order(("--config", "a b.yaml", "--storage", "/runs/{run}"), "py")
    command = entrypoint(order, settings, "retrain-1", with_feedback=True)
    bundle = settings.home / "bundles" / "retrain-1"
    assert command == (
        "py -m train --config 'a b.yaml' --storage /runs/retrain-1"
        f" --run-name retrain-1 --output {bundle} --from-feedback"
    )
    own = Order(("--output=/x/{run}", "--run-name", "mine"))
    assert entrypoint(own, settings, "r", with_feedback=False) == "python -m train --output=/x/r --run-name mine"
    judged = Order(("--gate", "apart.tsv", "--run-name=mine"))
    assert entrypoint(judged, settings, "r", with_feedback=False) == "python -m train --gate apart.tsv --run-name=mine"


def test_options_without_which_no_run_can_be_are_missed() -> None:
    with pytest.raises(ConfigurationError, match="missing: --validation;"):
        require_arguments(["--config=x.yaml"])


def test_the_file_of_the_policy_spells_out_the_defaults(tmp_path: Path) -> None:
    assert load_policy(ROOT / "configs" / "train" / "retrain.yaml") == Policy()
    wrong = tmp_path / "policy.yaml"
    wrong.write_text("max_psi: -1\nmin: 3\n")
    with pytest.raises(ConfigurationError, match=r"(?s)max_psi.*min: Extra"):
        load_policy(wrong)
