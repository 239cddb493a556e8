"""Retries are gRPC's own, by the service config: which calls are sent again, when, and how often."""

from __future__ import annotations

import grpc
import pytest

from loraf_serve import client_cli
from loraf_serve.client import AsyncClient, Client, ServiceError
from loraf_serve.client.connection import DEFAULT_RETRIES, MOST_RETRIES
from tests.loraf_serve.client.stand_in import CLIENTS, Refusal, call, standing_in

both = pytest.mark.parametrize("kind", CLIENTS)


def pushback(milliseconds: int, code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED) -> Refusal:
    """At least 1: after 0, gRPC 1.85 sends nothing again and waits for the deadline."""
    return Refusal(code, metadata=(("grpc-retry-pushback-ms", str(milliseconds)),))


@both
@pytest.mark.parametrize(
    ("method", "arguments"), [("generate", ("x",)), ("stream", ("x",)), ("adapters", ()), ("server_info", ())]
)
def test_a_refused_call_is_sent_again_when_the_server_says(kind, method, arguments):
    with standing_in(pushback(600), pushback(1)) as (server, address):
        assert call(kind, address, method, *arguments)
        first, second, third = [attempt.time for attempt in server.attempts]
        # gRPC's own delays would be 0.16 to 0.24 s, then 0.32 to 0.48 s.
        assert 0.55 < second - first < 2 and third - second < 0.3


@both
def test_without_a_word_of_the_server_the_delay_grows(kind):
    with standing_in(Refusal(), Refusal()) as (server, address):
        call(kind, address, "generate", "x")
        first, second, third = [attempt.time for attempt in server.attempts]
        assert second - first > 0.1 and third - second > 0.25
        assert [a.metadata.get("grpc-previous-rpc-attempts") for a in server.attempts] == [None, "1", "2"]


@both
def test_a_negative_delay_forbids_a_retry(kind):
    with standing_in(pushback(-1), pushback(1)) as (server, address):
        with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED: not now"):
            call(kind, address, "generate", "x")
        assert len(server.attempts) == 1


@both
@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (1, 2), (MOST_RETRIES, MOST_RETRIES + 1)])
def test_no_more_attempts_than_allowed(kind, retries, attempts):
    with standing_in(*[pushback(1)] * 9) as (server, address):
        with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED"):
            call(kind, address, "generate", "x", options={"retries": retries})
        assert len(server.attempts) == attempts


@both
@pytest.mark.parametrize(
    ("method", "arguments"), [("load_adapter", ("a", "b")), ("unload_adapter", ("a",)), ("health", ())]
)
def test_changes_and_health_checks_are_not_sent_again(kind, method, arguments):
    with standing_in(pushback(1, grpc.StatusCode.UNAVAILABLE)) as (server, address):
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            call(kind, address, method, *arguments)
        assert len(server.attempts) == 1


@both
@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_other_statuses_are_final(kind, code):
    with standing_in(pushback(1, code)) as (server, address):
        with pytest.raises(ServiceError, match=code.name):
            call(kind, address, "generate", "x")
        assert len(server.attempts) == 1


def test_a_stream_is_not_sent_again_after_its_first_piece():
    refusal = Refusal(metadata=(("grpc-retry-pushback-ms", "1"),), after=2)
    with standing_in(refusal) as (server, address), Client(address) as client:
        texts = []
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            texts.extend(str(piece) for piece in client.stream("x"))
        assert len(server.attempts) == 1


@both
def test_a_long_prompt_is_sent_again_too(kind):
    """gRPC keeps no more than 256 kB for a retry by default."""
    with standing_in(pushback(1)) as (server, address):
        call(kind, address, "generate", "x" * 3_000_000)
        assert [len(attempt.request.prompt) for attempt in server.attempts] == [3_000_000] * 2


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("retries", [-1, 5, True, 1.5])
def test_retries_that_grpc_would_not_make_are_refused(kind, retries):
    with pytest.raises(ValueError, match=f"retries={retries} is out of range; use 0 to {MOST_RETRIES}"):
        kind("127.0.0.1:9", retries=retries)


def test_the_shell_tells_the_default():
    assert f"(default: {DEFAULT_RETRIES})" in _help_of("generate", "--retries")
    assert f"from 0 to {MOST_RETRIES}" in _help_of("generate", "--retries")


def _help_of(command: str, option: str) -> str:
    (subparsers,) = client_cli.parser()._subparsers._group_actions
    return subparsers.choices[command]._option_string_actions[option].help


def test_an_async_client_belongs_to_one_loop():
    import asyncio

    with standing_in() as (_, address):
        client = AsyncClient(address)
        assert asyncio.run(client.health()) == "SERVING"
        with pytest.raises(RuntimeError, match="another event loop"):
            asyncio.run(client.health())
