"""OpenTelemetry traces of requests: the caller's W3C context in, one span a request and one a stage, out by OTLP.

Off unless an endpoint is set, and then it costs nothing. The stages are written down when the request is done, from
times that the batcher takes anyway: nothing waits on a trace. No text, key or caller is ever an attribute.
"""

import time
from collections.abc import Callable
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.types import Scope

from overtone import __version__
from serve.batcher import Timing


class Tracing:
    """Writes the spans of requests."""

    def __init__(self, provider: TracerProvider, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("overtone.serve", __version__)
        # From the clock that stages are timed by to that of traces.
        self._offset_ns = time.time_ns() - int(clock() * 1e9)

    def start(self, scope: Scope) -> Span:
        """The span of the request `scope`, a child of the caller's where it sent `traceparent`."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        return self._tracer.start_span("request", context=propagate.extract(headers), kind=SpanKind.SERVER)

    def end(self, span: Span, name: str, status: int, timing: Timing | None = None) -> None:
        """End `span`, now named after method and route, with the stages in `timing` and the status of the answer."""
        if span.is_recording():
            parent = trace.set_span_in_context(span)
            for stage_name, start, end in timing.stages() if timing is not None else ():
                stage = self._tracer.start_span(stage_name, context=parent, start_time=self._at(start))
                stage.end(self._at(end))
            method, _, route = name.partition(" ")
            span.update_name(name)
            span.set_attributes(
                {"http.request.method": method, "http.route": route, "http.response.status_code": status}
            )
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _at(self, clock_s: float) -> int:
        return self._offset_ns + int(clock_s * 1e9)


def trace_id(span: Span) -> str:
    """The trace of `span`, as log lines and the collector write it."""
    return trace.format_trace_id(span.get_span_context().trace_id)


def open_tracing(endpoint: str | None, ratio: float, *, exporter: SpanExporter | None = None) -> Tracing | None:
    """Tracing to the OTLP collector at `endpoint` of a share `ratio` of the requests; None without an endpoint.

    A caller that samples its trace has its requests traced whatever the ratio.
    """
    if endpoint is None and exporter is None:
        return None
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(ratio)),
        resource=Resource.create({"service.name": "overtone-serve", "service.version": __version__}),
    )
    provider.add_span_processor(BatchSpanProcessor(exporter or _otlp(f"{endpoint}/v1/traces")))
    return Tracing(provider)


def _otlp(address: str) -> Any:
    # Slow to import, and only needed where traces are sent.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=address, timeout=5)
