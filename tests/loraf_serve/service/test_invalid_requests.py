"""Each kind of invalid request is refused with its code and its fields, whatever method it comes by."""

from __future__ import annotations

from urllib.parse import unquote

import grpc
import pytest

from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.asking import failure, violations
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, checkpoints_root, serving, two_adapters
from tests.loraf_serve.invalid_adapter_calls import adapter_calls
from tests.loraf_serve.invalid_requests import KINDS, good_request

CALLS = adapter_calls("ckpt1")


class ToolBackend(FakeBackend):
    """Admits forms of answers, tools and calls of tools."""

    end_tokens = frozenset({2})

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer.chat_template = (
            "{% for tool in tools %}{{ tool }}{% endfor %}{% for m in messages %}{{ m.role }}{{ m.content }}"
            "{{ m.reasoning_content }}{{ m.tool_call_id }}{{ m.tool_calls }}{% endfor %}"
        )


@pytest.fixture(scope="module")
def running():
    checkpoint_folder(1)
    with serving(ToolBackend(), two_adapters(), root=checkpoints_root()) as it:
        yield it


def test_there_are_at_least_sixty_kinds():
    assert len(KINDS) >= 60 and len(KINDS) + len(CALLS) >= 100
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    named = {field for kind in KINDS for field in kind.fields}
    assert len(named) >= 55


def test_the_request_that_is_spoilt_is_valid(running):
    assert running.generation.Generate(good_request()).choices


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_a_request_is_refused_with_its_code_and_field(running, kind, method):
    request = good_request()
    kind.spoil(request)
    before = len(running.backend.requests)
    if method == "Generate":
        error = failure(lambda: running.generation.Generate(request))
    else:
        other = pb.StreamGenerateRequest.FromString(request.SerializeToString())
        error = failure(lambda: list(running.generation.StreamGenerate(other)))
    assert error.code() is grpc.StatusCode[kind.code], error.details()
    assert error.details().startswith(kind.fields)
    if kind.code == "INVALID_ARGUMENT":
        assert set(violations(error)) == set(kind.fields)
    assert len(running.backend.requests) == before


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_of_the_adapter_service_is_refused_with_its_code_and_field(running, call):
    error = failure(lambda: getattr(running.adapters, call.method)(call.request))
    assert error.code() is grpc.StatusCode[call.code], error.details()
    assert error.details().startswith(call.field)
    assert [adapter.name for adapter in running.server.registry] == ["trio", "pair"]


@pytest.mark.parametrize("request_id", ["Zürich", "日本", "50 %"])
def test_any_printable_request_id_comes_back(running, request_id):
    """gRPC's metadata holds nothing but ASCII, so that ids are percent-encoded there."""
    request = good_request()
    request.request_id = request_id
    response, call = running.generation.Generate.with_call(request)
    assert response.request_id == request_id
    assert unquote(dict(call.trailing_metadata())["loraf-request-id"]) == request_id
    request.prompt = ""
    error = failure(lambda: running.generation.Generate(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert unquote(dict(error.trailing_metadata())["loraf-request-id"]) == request_id
