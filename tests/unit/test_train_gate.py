"""The gate's judgement, from probabilities alone, and its rules."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from overtone.bundle import Bundle, load_bundle
from overtone.errors import ConfigurationError
from train.data import LabelledTexts
from train.gate import KEPT, Decision, Rules, app, decide, load_rules
from train.slices import SLICES

ROOT = Path(__file__).parents[2]
ROWS = 600
RULES = Rules(guarded=("negation", "emoji"), max_ece=1.0, min_slice_rows=30)


def make_data() -> LabelledTexts:
    """Every third text has a negation; none has an emoji."""
    texts = tuple("not so" if number % 3 == 0 else "so so" for number in range(ROWS))
    return LabelledTexts(texts, np.arange(ROWS) // 7 % 3, "ab", texts)


def answer(data: LabelledTexts, wrong: np.ndarray) -> np.ndarray:
    """Probabilities that are right but for the rows `wrong`."""
    chosen = data.labels.copy()
    chosen[wrong] = (chosen[wrong] + 1) % 3
    return np.eye(3, dtype=np.float32)[chosen] * 0.8 + np.float32(0.2 / 3)


def judge(tiny_bundle: Bundle, challenger: np.ndarray, champion: np.ndarray, rules: Rules = RULES) -> Decision:
    data = make_data()
    other = replace(tiny_bundle, version="tiny-other")
    return decide(rules, data, (other, answer(data, challenger)), (tiny_bundle, answer(data, champion)))


NEGATED, PLAIN = np.arange(0, ROWS, 3), np.arange(1, ROWS, 3)


def test_a_better_challenger_wins(tiny_bundle: Bundle) -> None:
    found = judge(tiny_bundle, PLAIN[:40], PLAIN[:100])
    assert found.promotes
    assert found.overall.difference.low > 0
    assert found.challenger == "tiny-other"
    assert set(found.slices) == {"negation"}, "no text has an emoji"
    assert "macro-averaged recall +0.1" in found.reasons[0]


def test_a_gain_that_chance_explains_is_none(tiny_bundle: Bundle) -> None:
    found = judge(tiny_bundle, PLAIN[:99], PLAIN[:100])
    assert not found.promotes
    assert found.overall.challenger > found.overall.champion
    assert "does not lie above +0.0000" in found.reasons[0]


def test_a_loss_on_a_guarded_slice_outweighs_any_gain(tiny_bundle: Bundle) -> None:
    found = judge(tiny_bundle, NEGATED[:20], PLAIN[:150])
    assert not found.promotes
    assert found.overall.difference.low > 0
    assert found.reasons == (found.reasons[0],)
    assert found.reasons[0].startswith("slice negation: -0.09")
    lenient = RULES.model_copy(update={"slice_tolerance": 0.2})
    assert judge(tiny_bundle, NEGATED[:20], PLAIN[:150], lenient).promotes


def test_slices_with_few_texts_are_not_judged(tiny_bundle: Bundle) -> None:
    rules = RULES.model_copy(update={"min_slice_rows": 201})
    assert judge(tiny_bundle, NEGATED[:20], PLAIN[:150], rules).slices == {}


def test_a_badly_calibrated_challenger_stays_outside(tiny_bundle: Bundle) -> None:
    found = judge(tiny_bundle, PLAIN[:1], PLAIN[:150], RULES.model_copy(update={"max_ece": 0.05}))
    assert not found.promotes
    assert "calibration error" in found.reasons[0]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle()


@settings(max_examples=30)
@given(wrong=st.sets(st.integers(0, ROWS - 1), max_size=200))
def test_no_bundle_beats_itself(bundle: Bundle, wrong: set[int]) -> None:
    data = make_data()
    probabilities = answer(data, np.array(sorted(wrong), dtype=int))
    assert not decide(RULES, data, (bundle, probabilities), (bundle, probabilities)).promotes


def test_the_rules_in_the_repository_are_the_defaults() -> None:
    assert load_rules(ROOT / "configs" / "train" / "gate.yaml") == load_rules(None) == Rules()
    assert set(Rules().guarded) <= set(SLICES)


@pytest.mark.parametrize(
    ("values", "told"),
    [({"guarded": ["emojis"]}, "no slice emojis"), ({"min_gian": 1}, "min_gian"), ({"max_ece": 2}, "max_ece")],
)
def test_wrong_rules_are_named(tmp_path: Path, values: dict[str, object], told: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigurationError, match=told):
        load_rules(path)


def test_the_command_judges_two_folders_without_a_registry(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERTONE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = tmp_path / "data.tsv"
    data.write_text("label\ttext\npositive\tlove\nnegative\thate\nneutral\tfine\n" * 1)
    folder = str(tiny_bundle.path)
    arguments = ["--challenger", folder, "--champion", folder, "--data", str(data)]
    ended = CliRunner().invoke(app, [*arguments, "--json"])
    assert ended.exit_code == KEPT, ended.output
    assert '"promotes":false' in ended.stdout
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "does not replace" in shown.stdout
    nowhere = CliRunner().invoke(app, ["--data", str(data)])
    assert nowhere.exit_code == 2
    assert "neither a folder nor in the registry" in nowhere.stderr.replace("\n", " ")
