"""What an operator sees of a running server: metrics over HTTP, log lines and spans of real calls."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraf.errors import ConfigError
from loraf_serve.client import Client, ServiceError
from loraf_serve.observe import logs, traces
from loraf_serve.observe.metrics import FAMILIES
from loraf_serve.service import server
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.v1 import generation_pb2, generation_pb2_grpc
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import eventually, one_adapter

TOKEN = "a-token-of-the-test-0123456789"


def while_it_runs(work: Callable[[str, str], None], **options) -> list[str]:
    """Runs a server with metrics until `work` has returned, which gets its address and that of the metrics.

    Returns:
        What the server has said.
    """
    said: list[str] = []

    def start() -> None:
        assert eventually(lambda: any("listening on" in line for line in said), 20)
        addresses = {line.partition(" on ")[0]: line.partition(" on ")[2] for line in said if " on " in line}
        work(addresses["listening"], addresses["metrics"])

    async def scenario() -> None:
        settings = ServerOptions(**{"port": 0, "grace": 0.0, "metrics_port": 0} | options)
        running = asyncio.create_task(server.run(FakeBackend(), one_adapter(), settings, None, None, said.append))
        try:
            await asyncio.to_thread(start)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running == 0

    asyncio.run(scenario())
    return said


def scrape(url: str, token: str = "", until: str = "") -> dict[str, float]:
    """Values by name and labels.

    Args:
        until: text to wait for: a client learns of a call's end before it is counted, and a page may be a moment old.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    text = ""

    def is_there() -> bool:
        nonlocal text
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            text = response.read().decode()
        return until.replace("=", '="') in text

    assert eventually(is_there)
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            values[f"{sample.name}{{{labels}}}"] = sample.value
    return values


@pytest.fixture
def call_lines(caplog):
    """Fields of the log lines of calls so far."""
    caplog.set_level(logging.INFO)
    formatter = logs.JsonFormatter()
    return lambda: [json.loads(formatter.format(r)) for r in caplog.records if r.name == "loraf_serve.calls"]


def test_calls_are_seen_in_metrics_and_logs(call_lines):
    def work(address: str, metrics: str) -> None:
        with Client(address) as client:
            client.generate("Hello", tasks={"math": 1.0, "nlu": 0.5}, max_tokens=5)
            with pytest.raises(ServiceError, match="NOT_FOUND"):
                client.generate("Hello", tasks=["unknown"])
            values = scrape(metrics, until="code=NOT_FOUND")
        labels = "adapter=trio,code=OK,method=Generate,task_set=math+nlu:0.5"
        assert values[f"loraf_requests_total{{{labels}}}"] == 1
        assert values["loraf_requests_total{adapter=,code=NOT_FOUND,method=Generate,task_set=}"] == 1
        assert values["loraf_completion_tokens_total{adapter=trio,task_set=math+nlu:0.5}"] == 5
        assert values["loraf_time_to_first_token_seconds_count{adapter=trio,task_set=math+nlu:0.5}"] == 1
        assert values["loraf_time_between_tokens_seconds_count{adapter=trio,task_set=math+nlu:0.5}"] == 4
        assert values["loraf_requests_in_flight{method=Generate}"] == 0
        assert values["loraf_adapter_tasks{adapter=trio}"] == 3
        assert values["loraf_adapter_bytes{adapter=trio}"] > 0
        assert values["loraf_serving{}"] == values["loraf_engine_up{}"] == 1
        assert values["process_resident_memory_bytes{}"] > 0
        names = {name.partition("{")[0] for name in values}
        assert not [name for name in names if name.endswith("_created")]
        for family in FAMILIES.values():
            assert {family.name, f"{family.name}_count"} & names

    while_it_runs(work)
    first, second = call_lines()
    assert (first["message"], first["task_set"], first["completion_tokens"]) == ("Generate OK", "math+nlu:0.5", 5)
    assert (second["message"], second["request_id"] != first["request_id"]) == ("Generate NOT_FOUND", True)
    assert not {"prompt", "answer"} & (first.keys() | second.keys())


def test_a_call_is_a_span_below_the_clients_and_its_log_line_names_it(call_lines, monkeypatch):
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "observer", lambda: traces.TraceObserver(provider))
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    def work(address: str, metrics: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = generation_pb2.StreamGenerateRequest(prompt="Hello", request_id="mine")
            list(stub.StreamGenerate(request, metadata=[("traceparent", f"00-{trace_id}-{parent}-01")]))

    while_it_runs(work)
    [span], [line] = exporter.get_finished_spans(), call_lines()
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace_id, parent)
    assert span.attributes["loraf.task_set"] == line["task_set"] == "math+nlu+code"
    assert span.attributes["loraf.request_id"] == line["request_id"] == "mine"
    assert (line["trace_id"], line["span_id"]) == (trace_id, f"{span.context.span_id:016x}")
    assert [event.name for event in span.events] == ["first token"]


def test_texts_are_logged_where_the_operator_asks_for_them(call_lines):
    def work(address: str, metrics: str) -> None:
        with Client(address) as client:
            answers.append(client.generate("Hello\nforged line", max_tokens=5).text)

    answers: list[str] = []
    while_it_runs(work, log_texts=True)
    [line] = call_lines()
    assert (line["prompt"], line["answer"]) == ("Hello\nforged line", answers[0])


def test_metrics_ask_for_the_servers_tokens(tmp_path, call_lines):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN} name=shop\n")
    tokens.chmod(0o600)

    def work(address: str, metrics: str) -> None:
        with pytest.raises(urllib.error.HTTPError) as error:
            scrape(metrics)
        assert error.value.code == 401
        with Client(address) as client, pytest.raises(ServiceError, match="UNAUTHENTICATED"):
            client.generate("Hello")
        values = scrape(metrics, TOKEN, until="code=UNAUTHENTICATED")
        assert values["loraf_requests_total{adapter=,code=UNAUTHENTICATED,method=Generate,task_set=}"] == 1
        assert TOKEN not in str(values)

    while_it_runs(work, token_file=tokens)
    assert TOKEN not in str(call_lines())


def test_no_metrics_are_served_where_none_are_asked_for():
    with pytest.raises(KeyError, match="metrics"):
        while_it_runs(lambda *_: None, metrics_port=None)


def test_a_metrics_port_that_is_taken_ends_the_start():
    async def start() -> None:
        settings = ServerOptions(port=0, metrics_port=taken.getsockname()[1])
        await server.run(FakeBackend(), one_adapter(), settings, None, None, lambda _: None)

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--metrics-port"):
        asyncio.run(start())


@pytest.mark.parametrize("options", [{"metrics_port": 70_000}, {"metrics_port": -1}, {"port": 5, "metrics_port": 5}])
def test_an_impossible_metrics_port_is_named(options):
    assert [problem.field for problem in ServerOptions(**options).problems()] == ["--metrics-port"]


def test_spans_need_opentelemetry_only_if_somebody_asks_for_them(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT: OpenTelemetry is not installed"):
        asyncio.run(server.run(FakeBackend(), one_adapter(), ServerOptions(port=0), None, None, lambda _: None))
