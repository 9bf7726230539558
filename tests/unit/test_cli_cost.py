"""What a load costs: sums that can be checked by hand, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from overtone import __version__
from overtone.cli.app import app
from overtone.cli.cost import Prices, estimate, load_prices, sensitivity, with_results
from overtone.errors import ConfigurationError

FILE = Path(__file__).parents[2] / "configs" / "cost.yaml"
PRICES = load_prices(FILE)


def with_load(**changes: float) -> Prices:
    return PRICES.model_copy(update={"load": PRICES.load.model_copy(update=changes)})


def test_nodes_follow_the_peak() -> None:
    prices = with_load(batch_share=0.0, peak_factor=2.0, target_use=0.5)
    per_core = PRICES.measured.single_texts_per_s / PRICES.measured.cores
    # Exactly what five nodes of four cores hold at half of their capacity, in the busiest minute.
    found = estimate(prices, 5 * 4 * per_core * 0.5 / 2.0 * 86_400)
    assert found.serve_nodes == 5
    assert found.usd_per_month["serve"] == pytest.approx(5 * PRICES.nodes["serve"].usd_per_hour * 730)
    assert found.total_usd_per_month == pytest.approx(sum(found.usd_per_month.values()))
    assert estimate(prices, 1.0).serve_nodes == PRICES.nodes["serve"].least


def test_posts_cost_storage_and_what_x_asks() -> None:
    found = estimate(with_load(posts_per_day=50_000.0, retention_days=100.0), 1e6)
    assert found.x_tier == "pay-per-use"
    assert found.usd_per_month["x_api"] == pytest.approx(50_000 * 30.4 * 0.005)
    assert found.growth_gb_per_month == pytest.approx(50_000 * 30.4 * 2124 / 1e9)
    assert estimate(with_load(posts_per_day=200_000.0), 1e6).x_tier == "enterprise"
    with pytest.raises(ConfigurationError, match="are the most of any plan"):
        estimate(with_load(posts_per_day=1e8), 1e9)


@given(st.floats(1, 1e11), st.floats(1, 100))
def test_more_never_costs_less(predictions: float, factor: float) -> None:
    less, more = estimate(PRICES, predictions), estimate(PRICES, predictions * factor)
    assert more.serve_nodes >= less.serve_nodes
    assert more.total_usd_per_month >= less.total_usd_per_month


def test_batches_are_cheaper_than_single_texts() -> None:
    rows = {(name, value): each for name, value, each in sensitivity(PRICES, 1e9)}
    assert rows["batch_share", 0.0].serve_nodes > rows["batch_share", 1.0].serve_nodes
    assert rows["peak_factor", 6.0].serve_nodes > rows["peak_factor", 1.5].serve_nodes
    assert ("predictions_per_day", 1e10) in rows


def test_throughput_comes_from_a_benchmark(tmp_path: Path) -> None:
    names = ("engine.texts_per_s", "serve.single.c64.ratio_to_engine", "serve.batch256.ratio_to_engine")
    results = {name: {"value": value} for name, value in zip(names, (1000.0, 0.5, 2.0), strict=True)}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"machine": {"cores": 4}, "results": results}))
    measured = with_results(PRICES, file).measured
    assert (measured.cores, measured.single_texts_per_s, measured.batch_texts_per_s) == (4, 500.0, 2000.0)
    file.write_text("{}")
    with pytest.raises(ConfigurationError, match="is not a benchmark's results"):
        with_results(PRICES, file)


def test_the_command(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        given = ["cost", "--predictions-per-day", "1e8", "--prices", str(FILE), *words]
        result = CliRunner().invoke(app, given, standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.stdout

    told = json.loads(run("--json"))
    assert told["serve_nodes"] >= 2
    assert len(told["sensitivity"]) > 8
    assert "total" in run("--posts-per-day", "1000")
    broken = tmp_path / "cost.yaml"
    broken.write_text(FILE.read_text().replace("cores: 2", "cores: 0", 1))
    with pytest.raises(ConfigurationError, match=r"measured\.cores"):
        run("--prices", str(broken))


def test_the_version_needs_no_command() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == __version__
