"""Spans, as OpenTelemetry's own SDK receives them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from loraf_serve.observe.traces import TraceObserver
from tests.loraf_serve.observe.calls import LOAD, answer, begin, end

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def observer(exporter):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return TraceObserver(provider)


def test_an_answer_is_a_span_below_the_clients(observer, exporter):
    call = begin(
        [observer], metadata={"traceparent": TRACEPARENT, "tracestate": "vendor=1", "authorization": "Bearer x"}
    )
    call.client = "shop"
    answer([observer], call=call)
    [span] = exporter.get_finished_spans()
    assert span.name == "loraf.v1.GenerationService/Generate" and span.kind is SpanKind.SERVER
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.context.trace_state["vendor"] == "1"
    assert (call.trace_id, call.span_id) == (TRACE, f"{span.context.span_id:016x}")
    assert dict(span.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": "loraf.v1.GenerationService/Generate",
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "loraf",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.time_to_first_chunk": 0.5,
        "loraf.request_id": "r1",
        "loraf.client": "shop",
        "loraf.adapter": "trio",
        "loraf.task_set": "math",
    }
    assert [event.name for event in span.events] == ["first token"]
    assert span.status.status_code is StatusCode.UNSET


def test_a_call_over_http_follows_the_conventions_for_http(observer, exporter):
    answer([observer], call=begin([observer], "POST /v1/chat/completions", {"traceparent": TRACEPARENT}))
    [span] = exporter.get_finished_spans()
    assert span.name == "POST /v1/chat/completions" and f"{span.context.trace_id:032x}" == TRACE
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "loraf.code": "OK",
        "gen_ai.operation.name": "chat",
    }
    assert expected.items() <= dict(span.attributes).items()
    assert not [name for name in span.attributes if name.startswith("rpc.")]


@pytest.mark.parametrize(
    ("code", "is_fault"), [("INTERNAL", True), ("UNAVAILABLE", True), ("NOT_FOUND", False), ("CANCELLED", False)]
)
def test_only_the_servers_faults_are_errors(observer, exporter, code, is_fault):
    end([observer], begin([observer], LOAD), code)
    [span] = exporter.get_finished_spans()
    assert (span.status.status_code is StatusCode.ERROR) == is_fault
    assert span.attributes.get("error.type") == (code if is_fault else None)
    assert span.attributes["rpc.response.status_code"] == code


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", TRACEPARENT * 1000])
def test_a_hostile_traceparent_starts_a_trace_of_its_own(observer, exporter, traceparent):
    metadata = {"traceparent": traceparent, "tracestate": "a=" + "b" * 100_000, "baggage": "secret=1"}
    answer([observer], call=begin([observer], metadata=metadata))
    [span] = exporter.get_finished_spans()
    assert span.parent is None and not span.context.trace_state
    assert "secret" not in span.to_json()


def test_without_opentelemetry_nothing_is_imported_and_nothing_fails():
    script = """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from loraf_serve.observe import traces
assert traces.observer() is None
import os
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
try:
    traces.observer()
except ImportError:
    print("asked for, and missing")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.returncode) == ("asked for, and missing\n", 0), run.stderr


def test_spans_are_sent_only_where_somebody_receives_them():
    """By OTLP, to a collector that this test plays."""
    script = """
import concurrent.futures, os, grpc
from loraf_serve.observe import traces
assert traces.observer() is None  # OpenTelemetry is installed, and nobody listens
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
received = []
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request, context):
        received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()
server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
from tests.loraf_serve.observe.calls import answer
answer([traces.observer()])
from opentelemetry import trace
trace.get_tracer_provider().force_flush()
[spans] = received[0].resource_spans
names = {a.key: a.value.string_value for a in spans.resource.attributes}
print(names["service.name"], spans.scope_spans[0].spans[0].name)
server.stop(0)
del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
assert traces.observer()  # a tracer provider is there, as under opentelemetry-instrument
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout == "loraf-serve loraf.v1.GenerationService/Generate\n", run.stderr
