"""An evaluation whole: a small bundle, a small file, the command, its JSON and its report."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from overtone.bundle import Bundle
from overtone.errors import DataError
from train.evaluate import app, evaluate
from train.slices import SLICES

ROWS = [
    ("positive", "love it \U0001f600"),
    ("positive", "great @ann #great"),
    ("neutral", "fine"),
    ("neutral", "okay okay okay ?"),
    ("negative", "hate it"),
    ("negative", "not the WORST PHONE of all"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.tsv"
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in ROWS * 4), encoding="utf-8")
    return path


def test_everything_is_measured(tiny_bundle: Bundle, data: Path) -> None:
    found = evaluate(tiny_bundle, data, baselines_from=data)
    assert found.model_version == tiny_bundle.version
    assert found.scores.rows == 24
    assert found.scores.macro_recall == pytest.approx(found.intervals["macro_recall"].value)
    assert found.ece_before_calibration != found.scores.ece
    assert set(found.slices) <= set(SLICES)
    assert found.slices["emoji"].rows == 4
    assert found.slices["negation"].rows == 4
    assert found.robustness["mentions_renamed"].same_label == 1
    assert found.speed.texts_per_s > 0
    assert found.size.model_bytes == tiny_bundle.model_path.stat().st_size
    assert found.baselines["tfidf_linear"].macro_recall == 1
    assert found.baselines["vader"].per_label["positive"].recall > 0


def test_the_temperature_is_taken_out_exactly(tiny_bundle: Bundle, data: Path) -> None:
    # With its frame, the logits of "love" are -2, 1 and 2, and the bundle's temperature is 2.
    path = data.with_name("two.tsv")
    path.write_text("label\ttext\npositive\tlove\nnegative\thate\n")
    found = evaluate(tiny_bundle, path, with_robustness=False)
    assert found.reliability[0].confidence == pytest.approx(0.5741, abs=1e-3)
    assert found.reliability_before[0].confidence == pytest.approx(0.7214, abs=1e-3)
    assert found.robustness == {}


def test_the_command_prints_one_line_of_json_and_writes_a_report(
    tiny_bundle: Bundle, data: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    arguments = ["--bundle", str(tiny_bundle.path), "--data", str(data), "--report", str(report), "--json"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    (line,) = ended.stdout.splitlines()
    printed = json.loads(line)
    assert printed["model_version"] == tiny_bundle.version
    assert printed["intervals"]["macro_recall"]["low"] <= printed["macro_recall"]
    assert {path.suffix for path in report.iterdir()} == {".html", ".png"}
    page = (report / "index.html").read_text()
    assert "confusion.png" in page
    assert not any(text in page for _, text in ROWS if " " in text), "a text stands in the report"


def test_the_command_shows_tables_to_people(tiny_bundle: Bundle, data: Path) -> None:
    ended = CliRunner().invoke(app, ["--bundle", str(tiny_bundle.path), "--data", str(data), "--baselines", str(data)])
    assert ended.exit_code == 0, ended.output
    for shown in ("macro-averaged recall", "negation", "typos", "vader", "texts/s"):
        assert shown in ended.stdout


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"label\ttext\nhappy\tsome text\n", r"label 'happy' is not one of negative, neutral, positive \(line 2\)"),
        (b"label\ttext\npositive\t \nnegative\tbad\n", r"the text is empty \(line 2\)"),
        (b"label\ttext\npositive\tone\npositive\ttwo\n", "have the same label"),
        (b"label\ttext\npositive\t\xff\xfe\n", r"not UTF-8 \(line 2\)"),
        (b"text\nsome text\n", "no column label"),
    ],
)
def test_bad_data_is_refused_with_a_reason(tiny_bundle: Bundle, tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        evaluate(tiny_bundle, path)
    ended = CliRunner().invoke(app, ["--bundle", str(tiny_bundle.path), "--data", str(path)])
    assert ended.exit_code == 2
    assert "error:" in ended.stderr
