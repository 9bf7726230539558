"""Rates and the median from the text of `/metrics`."""

import pytest

from overtone.cli.rates import Look, between, read_metrics

TEXT = """\
# TYPE overtone_ingest_posts_stored_total counter
overtone_ingest_posts_stored_total 120.0
# TYPE overtone_ingest_predictions_stored_total counter
overtone_ingest_predictions_stored_total 100.0
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{method="POST",route="/predict",le="0.1"} 6.0
http_request_duration_seconds_bucket{method="POST",route="/predict",le="0.2"} 8.0
http_request_duration_seconds_bucket{method="POST",route="/predict",le="+Inf"} 8.0
http_request_duration_seconds_count{method="POST",route="/predict"} 8.0
http_request_duration_seconds_bucket{method="POST",route="/predict/batch",le="0.1"} 0.0
http_request_duration_seconds_bucket{method="POST",route="/predict/batch",le="0.2"} 4.0
http_request_duration_seconds_bucket{method="POST",route="/predict/batch",le="+Inf"} 4.0
http_request_duration_seconds_count{method="POST",route="/predict/batch"} 4.0
http_request_duration_seconds_bucket{method="GET",route="/",le="0.1"} 900.0
http_request_duration_seconds_count{method="GET",route="/"} 900.0
"""


def test_figures_are_read_and_other_routes_left_out() -> None:
    look = read_metrics(TEXT, 5.0)
    assert (look.posts, look.predictions, look.requests) == (120, 100, 12)
    assert look.durations == {0.1: 6, 0.2: 12, float("inf"): 12}


def test_rates_are_per_second_between_looks() -> None:
    rates = between(Look(0.0, posts=20, predictions=100), Look(2.0, posts=120, predictions=100))
    assert (rates.posts_per_s, rates.predictions_per_s, rates.p50_ms) == (50, 0, None)


def test_a_counter_that_began_again_counts_from_nought() -> None:
    assert between(Look(0.0, posts=1000), Look(1.0, posts=30)).posts_per_s == 30


@pytest.mark.parametrize(
    ("durations", "median_ms"),
    [
        ({0.1: 10.0, 0.2: 10.0, float("inf"): 10.0}, 50.0),
        ({0.1: 0.0, 0.2: 10.0, float("inf"): 10.0}, 150.0),
        ({0.1: 0.0, 0.2: 0.0, float("inf"): 10.0}, 200.0),
    ],
)
def test_the_median_lies_within_its_bucket(durations: dict[float, float], median_ms: float) -> None:
    rates = between(Look(0.0), Look(1.0, requests=10, durations=durations))
    assert rates.p50_ms == pytest.approx(median_ms)
