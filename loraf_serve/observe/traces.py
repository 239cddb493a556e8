"""OpenTelemetry spans: one for each call, a child of the span that the client names in `traceparent`.

OpenTelemetry is optional (`pip install "loraf[otel]"`) and imported only here, when a tracer is asked for. Attributes
follow its conventions for RPC and generative AI; other names begin with `loraf.`. No text of a request is in a span.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraf import __version__
from loraf_serve.observe.call import Call, Observer

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

# Where spans go: any of these switches the exporter on. Its other settings are OpenTelemetry's own OTEL_ variables.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FIRST_TOKEN = "first token"
# Codes that are the server's fault, by the conventions for a server's span.
_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
_MAX_STATE = 512  # characters of `tracestate`; the specification asks for at least that


class TraceObserver(Observer):
    """Makes the spans. Needs OpenTelemetry's API.

    Args:
        provider: None for the process's own.
    """

    def __init__(self, provider: TracerProvider | None = None):
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._tracer = trace.get_tracer("loraf_serve", __version__, tracer_provider=provider)
        self._propagator = TraceContextTextMapPropagator()
        self._spans: dict[int, Span] = {}  # by id of the call

    def began(self, call: Call) -> None:
        parent = self._propagator.extract(_trace_headers(call.metadata))
        method = call.method.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        if call.is_http:
            verb, _, route = method.partition(" ")
            attributes = {"http.request.method": verb, "http.route": route}
        span = self._tracer.start_span(method, parent, kind=self._trace.SpanKind.SERVER, attributes=attributes)
        self._spans[id(call)] = span
        context = span.get_span_context()
        if context.is_valid:
            call.trace_id = self._trace.format_trace_id(context.trace_id)
            call.span_id = self._trace.format_span_id(context.span_id)

    def tokens(self, call: Call, count: int, since: float | None) -> None:
        if since is None and (span := self._spans.get(id(call))):
            span.add_event(FIRST_TOKEN)

    def ended(self, call: Call) -> None:
        span = self._spans.pop(id(call), None)
        if span is None:
            return
        span.set_attribute("loraf.code" if call.is_http else "rpc.response.status_code", call.code)
        span.set_attribute("loraf.request_id", call.request_id)
        if call.client:
            span.set_attribute("loraf.client", call.client)
        if call.answering is not None:
            span.set_attributes(_generation(call))
        if call.code in _FAULTS:
            span.set_attribute("error.type", call.code)
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
        span.end()


def observer() -> TraceObserver | None:
    """The observer, if somebody receives its spans: an exporter named by `ENDPOINTS`, or a tracer provider that
    `opentelemetry-instrument` has set. None otherwise, and without OpenTelemetry.

    Raises:
        ImportError: an endpoint is named and the SDK or its exporter is not installed.
    """
    named = any(os.environ.get(name) for name in ENDPOINTS)
    try:
        from opentelemetry import trace
    except ImportError:
        if named:
            raise
        return None
    is_set = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    if named and not is_set:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = Resource({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "loraf-serve"})
        provider = TracerProvider(resource=Resource.create().merge(name))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
    return TraceObserver() if named or is_set else None


def _trace_headers(metadata: Mapping[str, str]) -> dict[str, str]:
    headers = {name: metadata[name] for name in ("traceparent", "tracestate") if name in metadata}
    if len(headers.get("tracestate", "")) > _MAX_STATE:
        del headers["tracestate"]
    return headers


def _generation(call: Call) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat" if "/chat/" in call.method else "text_completion",
        "gen_ai.provider.name": "loraf",
        "gen_ai.usage.input_tokens": call.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": call.cached_prompt_tokens,
        "gen_ai.usage.output_tokens": call.completion_tokens,
        "loraf.adapter": call.adapter,
        "loraf.task_set": call.task_set,
    }
    if call.first_token is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = call.first_token - call.began
    return attributes
