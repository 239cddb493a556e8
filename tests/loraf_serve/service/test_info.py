"""GetServerInfo tells what the server is and what it admits; docs/reference/limits.md says the same."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import grpc
import pytest

from loraf.hub import public_name
from loraf_serve import limits
from loraf_serve.v1 import info_pb2, info_pb2_grpc
from tests.loraf_serve.asking import ask, failure, violations
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import serving
from tests.loraf_serve.hostile_requests import INVALID
from tools.docs import limits as limits_table

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "limits.md"


def info_of(running) -> info_pb2.GetServerInfoResponse:
    return info_pb2_grpc.InfoServiceStub(running.channel).GetServerInfo(info_pb2.GetServerInfoRequest(), timeout=20)


def test_the_server_tells_its_model_backend_versions_and_limits():
    backend = FakeBackend(max_model_len=300)
    backend.unsupported_fields = ("sampling.structured_output",)
    with serving(backend, model="org/model", max_queue=7, default_deadline=2.5) as running:
        info = info_of(running)
    assert (info.model, info.backend) == ("org/model", "fake")
    assert info.versions["transformers"] == metadata.version("transformers")
    assert info.versions["loraf"] == metadata.version("loraf")
    assert list(info.unsupported_fields) == ["sampling.structured_output"]
    told = {limit.name: limit.value for limit in info.limits}
    assert len(told) == len(info.limits)
    fixed = {limit.name: limit.value for limit in limits.LIMITS}
    assert fixed.items() <= told.items()
    assert (told["max_model_len"], told["max_queue"], told["default_deadline"]) == (300, 7, 2.5)
    assert told["max_message_bytes"] == 4 << 20
    assert all(limit.description for limit in info.limits)


def test_while_the_model_is_loading_there_is_no_information():
    with serving(warm=False) as running:
        assert failure(lambda: info_of(running)).code() is grpc.StatusCode.UNAVAILABLE
        running.call(running.server.warm_up())
        assert info_of(running).backend == "fake"


def test_a_folder_is_named_without_the_folders_that_it_lies_in(tmp_path):
    assert public_name(tmp_path / "secret" / "model") == "model"


def test_the_reference_lists_every_fixed_limit():
    """With the description that clients get."""
    page = limits_table.markdown()
    assert "<!-- generate: limits -->" in PAGE.read_text()
    for limit in limits.LIMITS:
        assert f"| `{limit.name}` | {int(limit.value):,}" in page and f"| {limit.description} |" in page


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": limits.MAX_N + 1}, "sampling.n"),
        ({"regex": "a" * (limits.MAX_REGEX + 1)}, "sampling.structured_output.regex"),
        ({"priority": limits.MAX_PRIORITY + 1}, "priority"),
    ],
)
def test_a_limit_that_is_told_is_the_one_that_holds(fields, field):
    with serving() as running:
        error = failure(lambda: running.generation.Generate(ask("x", **fields), timeout=20))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(error)) == [field]


@pytest.mark.parametrize(("fields", "field"), INVALID, ids=lambda value: str(value)[:40])
def test_invalid_new_fields_have_their_code_and_field(fields, field):
    with serving() as running:
        error = failure(lambda: running.generation.Generate(ask("x", **fields), timeout=20))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in violations(error)
