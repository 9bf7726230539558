"""Spans of requests and their stages."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from serve.batcher import Timing
from serve.tracing import Tracing, open_tracing

CALLER = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def scope_of(**headers: bytes) -> dict[str, Any]:
    return {"method": "POST", "headers": [(name.encode(), value) for name, value in headers.items()]}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    tracing = open_tracing(None, 0.0, exporter=exporter)
    assert tracing is not None
    yield tracing
    tracing.close()


def test_nothing_is_traced_without_an_endpoint() -> None:
    assert open_tracing(None, 1.0) is None


def test_a_request_is_a_child_of_its_caller_and_its_stages_its_children(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    span = tracing.start(scope_of(traceparent=CALLER))
    tracing.end(span, "POST /predict", 200, Timing(started=10.0, admitted=10.5, taken=11.0, done=13.0))
    tracing.close()

    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /predict", "tokenise", "queue", "engine"}
    request = spans["POST /predict"]
    assert request.parent is not None
    assert format(request.parent.span_id, "016x") == "b7ad6b7169203331"
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
    }
    for name, seconds in {"tokenise": 0.5, "queue": 0.5, "engine": 2.0}.items():
        stage = spans[name]
        assert stage.parent is not None
        assert stage.parent.span_id == request.context.span_id
        assert stage.end_time is not None
        assert stage.start_time is not None
        assert (stage.end_time - stage.start_time) / 1e9 == pytest.approx(seconds)


def test_a_share_of_the_others_is_traced(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    tracing.end(tracing.start(scope_of()), "POST /predict", 200, Timing(1.0, 2.0, 3.0, 4.0))
    tracing.close()

    assert exporter.get_finished_spans() == ()


def test_our_failures_are_marked_and_stages_not_reached_are_left_out(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    tracing.end(tracing.start(scope_of(traceparent=CALLER)), "POST /predict", 503, Timing(started=1.0, admitted=2.0))
    tracing.close()

    tokenise, request = exporter.get_finished_spans()
    assert tokenise.name == "tokenise"
    assert request.status.status_code is StatusCode.ERROR
