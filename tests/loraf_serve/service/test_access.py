"""Tokens at a running server: who may call, which adapters and tasks, who may load; what gets out."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from loraf.errors import LorafError, Problem
from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.adapters.registry import Registry
from loraf_serve.client import ServiceError, request_of
from loraf_serve.errors import PermissionDenied, Unauthenticated
from loraf_serve.security.tokens import Tokens
from loraf_serve.service import access, messages
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.asking import ask, ask_stream, failure
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, checkpoints_root, one_adapter, serving, two_adapters

CODES = grpc.StatusCode
LINES = {
    "everything": "load priority",
    "plain": "",
    "trio": "adapter=trio",
    "math": "tasks=math",
    "loader": "load adapter=new",
    "one": "in-flight=1",
    "few": "tokens-per-minute=20",
}
TOKENS = {name: f"{name}-token-0123456789" for name in LINES}


@pytest.fixture
def token_file(tmp_path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("".join(f"{TOKENS[name]} name={name} {rest}\n" for name, rest in LINES.items()))
    return file


@pytest.fixture
def running(token_file):
    checkpoint_folder(0)
    with serving(FakeBackend(), two_adapters(), token_file=token_file, root=checkpoints_root(), reflection=True) as it:
        yield it


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[name]}"),)


def code(call) -> grpc.StatusCode:
    return failure(call).code()


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong-0123456789abcdef"),), (("token", "x"),)])
def test_nothing_but_health_answers_without_a_token(running, metadata):
    stub, asks = running.generation, ask("x", adapter="trio")
    calls = [
        lambda: stub.Generate(asks, metadata=metadata),
        lambda: list(stub.StreamGenerate(ask_stream("x", adapter="trio"), metadata=metadata)),
        lambda: running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), metadata=metadata),
        lambda: running.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(name="x", path="ckpt0"), metadata=metadata),
        lambda: ProtoReflectionDescriptorDatabase(running.channel).get_services(),
    ]
    assert [code(call) for call in calls] == [CODES.UNAUTHENTICATED] * len(calls)
    assert not running.backend.requests
    health = health_pb2_grpc.HealthStub(running.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_an_unauthenticated_request_is_not_even_read(running):
    raw = running.channel.unary_unary("/loraf.v1.GenerationService/Generate")
    assert code(lambda: raw(b"\xff\xff\xff")) is CODES.UNAUTHENTICATED


@pytest.mark.parametrize("name", ["everything", "plain", "trio"])
def test_a_token_opens_what_its_line_allows(running, name):
    answer = running.generation.Generate(ask("x", adapter="trio"), metadata=bearer(name))
    assert answer.choices[0].text


def test_an_adapter_that_a_token_may_not_use_does_not_exist_for_it(running):
    stub = running.generation
    for name in ("pair", "nowhere"):
        error = failure(lambda name=name: stub.Generate(ask("x", adapter=name), metadata=bearer("trio")))
        assert error.code() is CODES.PERMISSION_DENIED
        assert error.details().endswith("it may use: trio")
    listed = running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), metadata=bearer("trio")).adapters
    assert [adapter.name for adapter in listed] == ["trio"]
    request = adapter_pb2.GetAdapterRequest(name="pair")
    assert code(lambda: running.adapters.GetAdapter(request, metadata=bearer("trio"))) is CODES.PERMISSION_DENIED
    assert stub.Generate(ask("x"), metadata=bearer("trio")).served_by.adapter == "trio"  # the only one it may use


@pytest.mark.parametrize(
    ("selection", "allowed"),
    [
        ({"tasks": ["math"]}, True),
        ({"base": True}, True),
        ({"as_trained": "math"}, True),
        ({"tasks": ["math", "nlu"]}, False),
        ({"tasks": {"nlu": 0.0}}, False),
        ({"tasks": ["nowhere"]}, False),
        ({"as_trained": "nlu"}, False),
        ({}, False),  # all tasks
    ],
)
def test_every_way_to_select_a_task_needs_permission_for_it(running, selection, allowed):
    request = ask("x", adapter="trio", **selection)
    if allowed:
        assert running.generation.Generate(request, metadata=bearer("math")).choices
        return
    error = failure(lambda: running.generation.Generate(request, metadata=bearer("math")))
    assert error.code() is CODES.PERMISSION_DENIED
    assert "code" not in error.details()  # a task that the token may not use is not listed
    assert not running.backend.requests


def test_tasks_that_a_token_may_not_use_are_not_listed(running):
    listed = running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), metadata=bearer("math")).adapters
    assert {adapter.name: [task.name for task in adapter.tasks] for adapter in listed} == {"trio": ["math"], "pair": []}
    assert "nlu" not in str(listed)


def test_a_named_set_needs_permission_for_its_tasks(token_file):
    registry = one_adapter().with_sets(OperatorSets.parse(["both=math+nlu", "lone=math"]))
    with serving(FakeBackend(), registry, token_file=token_file) as running:
        assert running.generation.Generate(ask("x", named="lone"), metadata=bearer("math")).choices
        call = running.generation.Generate
        for name in ("both", "nowhere", "nlu"):  # what it may not use, and what there is not, look the same
            error = failure(lambda name=name: call(ask("x", named=name, top_p=-1.0), metadata=bearer("math")))
            assert "both" not in error.details().replace(repr(name), "")
            error = failure(lambda name=name: call(ask("x", named=name), metadata=bearer("math")))
            assert error.code() is CODES.NOT_FOUND
            assert error.details() == (
                f"task_selection.named.name: adapter 'trio' has no named set {name!r} → this token may use: math"
            )


def test_loading_needs_a_token_that_says_load(running):
    load = running.adapters.LoadAdapter
    request = adapter_pb2.LoadAdapterRequest(name="new", path="ckpt0")
    assert code(lambda: load(request, metadata=bearer("plain"))) is CODES.PERMISSION_DENIED
    other = adapter_pb2.LoadAdapterRequest(name="other", path="ckpt0")
    assert code(lambda: load(other, metadata=bearer("loader"))) is CODES.PERMISSION_DENIED
    assert load(request, metadata=bearer("loader")).adapter.name == "new"
    unload = adapter_pb2.UnloadAdapterRequest(name="new")
    assert code(lambda: running.adapters.UnloadAdapter(unload, metadata=bearer("plain"))) is CODES.PERMISSION_DENIED
    running.adapters.UnloadAdapter(unload, metadata=bearer("loader"))


def test_a_load_reveals_nothing_that_a_token_may_not_use(running, token_file):
    token_file.write_text(f"{TOKENS['loader']} tasks=math load\n{TOKENS['everything']} load\n")
    load = running.adapters.LoadAdapter
    time.sleep(1.1)  # the file is looked at once a second
    with pytest.raises(grpc.RpcError):
        load(adapter_pb2.LoadAdapterRequest(name="new", path="ckpt0"), metadata=bearer("plain"))
    for task, expected in (("secret", CODES.PERMISSION_DENIED), ("nlu", CODES.PERMISSION_DENIED)):
        request = adapter_pb2.LoadAdapterRequest(name="new", path="ckpt0", tasks=[task])
        error = failure(lambda request=request: load(request, metadata=bearer("loader")))
        assert error.code() is expected and "code" not in error.details()
    request = adapter_pb2.LoadAdapterRequest(name="new", path="x/" * 1_000_000)
    error = failure(lambda: load(request, metadata=bearer("everything")))
    assert error.code() is CODES.INVALID_ARGUMENT and "2000000 characters" in error.details()


def test_a_request_without_an_adapters_name_keeps_the_adapter_that_it_may_use(token_file):
    checkpoint_folder(0)
    backend = FakeBackend(seconds_per_token=0.02)
    with serving(backend, two_adapters(), token_file=token_file, root=checkpoints_root()) as running:
        call = running.generation.StreamGenerate(ask_stream("x", adapter="", max_tokens=60), metadata=bearer("trio"))
        next(call)
        unload = adapter_pb2.UnloadAdapterRequest(name="trio")
        answer = running.adapters.UnloadAdapter(unload, metadata=bearer("everything"))
        assert answer.running_requests == 1
        assert len(list(call)) == 59  # the fake backend refuses to go on with an adapter that is removed


def test_more_tasks_than_any_request_needs_are_refused_at_once(running):
    request = ask("x", adapter="trio", tasks=["math"])
    for _ in range(300_000):
        request.task_selection.tasks.tasks.add(name="math")
    for name in ("plain", "math"):
        error = failure(lambda name=name: running.generation.Generate(request, metadata=bearer(name)))
        assert error.code() is CODES.INVALID_ARGUMENT
        assert error.details() == "task_selection.tasks.tasks: has 300001 tasks → use at most 1024"


def test_a_priority_needs_a_token_that_allows_it(running):
    request = ask("x", adapter="trio")
    request.priority = 1
    error = failure(lambda: running.generation.Generate(request, metadata=bearer("plain")))
    assert error.code() is CODES.PERMISSION_DENIED and error.details().startswith("priority: ")
    request.priority = 0
    assert running.generation.Generate(request, metadata=bearer("plain")).choices


def test_limits_of_a_token_say_when_to_try_again(token_file):
    with serving(FakeBackend(seconds_per_token=0.05), token_file=token_file) as running:
        stub = running.generation
        call = stub.StreamGenerate(ask_stream("x", max_tokens=40), metadata=bearer("one"))
        next(call)
        error = failure(lambda: stub.Generate(ask("x", max_tokens=2), metadata=bearer("one")))
        assert error.code() is CODES.RESOURCE_EXHAUSTED
        assert stub.Generate(ask("x", max_tokens=2), metadata=bearer("plain")).choices  # nobody else is affected
        call.cancel()
        assert stub.Generate(ask("x", max_tokens=20), metadata=bearer("few")).choices
        error = failure(lambda: stub.Generate(ask("x", max_tokens=2), metadata=bearer("few")))
        assert error.code() is CODES.RESOURCE_EXHAUSTED and "20 tokens a minute" in error.details()
        assert 1 <= int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) <= 60_000


def test_a_token_that_is_taken_out_of_the_file_is_refused_without_a_restart(running, token_file):
    assert running.generation.Generate(ask("x", adapter="trio"), metadata=bearer("plain")).choices
    token_file.write_text(f"{TOKENS['everything']}\n")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            running.generation.Generate(ask("x", adapter="trio"), metadata=bearer("plain"))
        except grpc.RpcError as error:
            assert error.code() is CODES.UNAUTHENTICATED
            return
        time.sleep(0.1)
    pytest.fail("the token still opens the server")


def test_metrics_are_for_tokens_of_every_adapter_and_task(token_file):
    check = access.metrics_reader(Tokens(token_file))
    check(bearer("plain")[0][1])
    for name in ("trio", "math"):
        with pytest.raises(PermissionDenied):
            check(bearer(name)[0][1])
    with pytest.raises(Unauthenticated):
        check(None)


# --- what gets out


def test_every_error_carries_the_request_id():
    with serving() as running:
        for request_id in ("mine-1", ""):
            error = failure(lambda r=request_id: running.generation.Generate(ask("", request_id=r)))
            info = error_details_pb2.RequestInfo()
            assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)
            assert info.request_id == dict(error.trailing_metadata())["loraf-request-id"]
            assert info.request_id == request_id or len(info.request_id) == 32
        call = running.generation.StreamGenerate(ask_stream("x", request_id="mine-2"))
        assert list(call) and dict(call.trailing_metadata())["loraf-request-id"] == "mine-2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("could not open /srv/secret/engine.py now", "could not open …/engine.py now"),
        ("'/root/a.b/c'", "'…/c'"),
        ("see https://example.org/a/b for 1/2 of it", "see https://example.org/a/b for 1/2 of it"),
    ],
)
def test_no_absolute_path_gets_out(text, shown):
    backend = FakeBackend()
    backend.failure = LorafError(Problem(text, remedy=text))
    with serving(backend) as running:
        assert failure(lambda: running.generation.Generate(ask("x"))).details() == f"{shown} → {shown}"


@pytest.mark.parametrize("request_id", ["a%25b", "größe 1", "50 %", "日本"])
def test_the_client_reads_the_request_id_that_was_sent(request_id):
    with serving() as running, pytest.raises(ServiceError) as error:
        running.client.generate("", request_id=request_id)
    assert error.value.request_id == request_id


def test_bytes_that_are_no_message_and_unknown_fields_are_invalid():
    with serving(reflection=True) as running:
        for method in ("GenerationService/Generate", "AdapterService/LoadAdapter"):
            error = failure(lambda m=method: running.channel.unary_unary(f"/loraf.v1.{m}")(b"\x0a\xff\xff\xff"))
            assert error.code() is CODES.INVALID_ARGUMENT
            assert "not a message" in error.details() and "Generate" not in error.details()
        stream = running.channel.unary_stream("/loraf.v1.GenerationService/StreamGenerate")
        assert code(lambda: list(stream(b"\x0a\xff\xff\xff"))) is CODES.INVALID_ARGUMENT
        health = running.channel.unary_unary("/grpc.health.v1.Health/Check")
        assert code(lambda: health(b"\x0a\xff\xff\xff")) is CODES.INVALID_ARGUMENT

        raw = running.channel.unary_unary("/loraf.v1.GenerationService/Generate")
        future = ask("x").SerializeToString() + b"\xfa\x7f\x01x"  # field 2047
        assert failure(lambda: raw(future)).details().startswith("2047: is not a field")
        inner = pb.GenerateRequest(prompt="x")
        inner.sampling.MergeFromString(b"\xf8\x3f\x01")  # field 1023
        error = failure(lambda: raw(inner.SerializeToString()))
        assert error.code() is CODES.INVALID_ARGUMENT and error.details().startswith("sampling.1023: ")
        chat = request_of(pb.GenerateRequest, messages=[{"role": "user", "content": "a"}] * 2)
        chat.messages.messages[1].MergeFromString(b"\xf8\x3f\x01")
        assert failure(lambda: raw(chat.SerializeToString())).details().startswith("messages.messages[1].1023: ")


def test_an_exception_that_leaves_a_service_does_not_get_out(monkeypatch):
    def fails(*_):
        raise RuntimeError("/srv/secret has 3 files")

    monkeypatch.setattr(messages, "adapter", fails)
    with serving() as running:
        error = failure(lambda: running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest()))
    assert error.code() is CODES.INTERNAL and error.details().startswith("request ") and "files" not in error.details()


def test_an_unknown_method_is_unimplemented():
    with serving(adapters=Registry()) as running:
        call = running.channel.unary_unary("/loraf.v1.GenerationService/Nothing")
        assert code(lambda: call(b"")) is CODES.UNIMPLEMENTED
