"""The services under load: many streams, a full queue, a drain, long prompts."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loraf_serve.backends.backend import BackendUnavailable
from loraf_serve.service.admission import Admission
from tests.loraf_serve.asking import ask, ask_stream, failure
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import eventually, serving

CODES = grpc.StatusCode


def test_after_a_hundred_streams_half_of_them_cancelled_nothing_is_left():
    with serving(FakeBackend(seconds_per_token=0.02)) as running, ThreadPoolExecutor(100) as pool:

        def one(i: int) -> str:
            call = running.generation.StreamGenerate(ask_stream(f"{i}", max_tokens=20))
            text = ""
            try:
                for j, piece in enumerate(call):
                    text += piece.choices[0].text
                    if i % 2 and j == i % 7:
                        call.cancel()
            except grpc.RpcError as error:
                assert i % 2 and error.code() is CODES.CANCELLED
                return ""
            return text

        texts = list(pool.map(one, range(100)))
        assert eventually(lambda: not running.backend.running)
        assert running.server._admission.in_flight == 0
        by_prompt = {r.prompt_token_ids: expected_text(r) for r in running.backend.requests}
    assert len(running.backend.requests) == 100
    for i in range(0, 100, 2):
        assert texts[i] == by_prompt[tuple(running.backend.tokenizer(f"{i}")["input_ids"])]


# --- admission


def test_a_full_queue_says_when_to_try_again():
    with serving(FakeBackend(seconds_per_token=0.2), max_queue=2) as running:
        calls = [running.generation.Generate.future(ask("x", max_tokens=5)) for _ in range(2)]
        assert eventually(lambda: len(running.backend.running) == 2)
        error = failure(lambda: running.generation.Generate(ask("x", max_tokens=1)))
        assert error.code() is CODES.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        assert rpc_status.from_call(error).details[0].Unpack(retry)
        # A request takes about a second, two are in flight: a place is free after half a second on average.
        assert 0.3 < retry.retry_delay.ToNanoseconds() / 1e9 < 0.8
        assert running.client.health() == "SERVING"  # health checks need no place
        assert all(call.result(20).choices for call in calls)
        assert running.generation.Generate(ask("x", max_tokens=1)).choices


def test_the_retry_delay_follows_from_how_long_requests_take(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    async def retry_after(seconds: float, limit: int) -> float:
        admission = Admission(limit)
        admission.open()
        for _ in range(100):
            with admission.enter():
                clock[0] += seconds
        return admission.retry_after()

    assert asyncio.run(retry_after(12.0, 4)) == pytest.approx(3.0, rel=0.01)
    assert asyncio.run(retry_after(1e-3, 4)) == 0.1 and asyncio.run(retry_after(1e6, 4)) == 60.0


def test_a_request_aborted_by_the_drain_gets_the_drain_as_reason():
    class Ended(FakeBackend):
        async def generate(self, request):
            async for output in super().generate(request):
                if output.choices[0].finish_reason == "abort":
                    raise BackendUnavailable("stopped at /srv/secret")
                yield output

    with serving(Ended(seconds_per_token=0.05)) as running:
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=200))
        next(call)
        running.call(running.server.drain(0.1))
        error = failure(lambda: list(call))
        assert (error.code(), error.details()) == (CODES.UNAVAILABLE, "the server is draining")
        assert not running.server.engine_gone


def test_a_long_tokenization_does_not_hold_up_other_clients(monkeypatch):
    with serving() as running:
        started, go_on = threading.Event(), threading.Event()
        validator = running.server._generations.validator
        read = validator._read

        def slow(*arguments):
            started.set()
            assert go_on.wait(10)
            return read(*arguments)

        monkeypatch.setattr(validator, "_read", slow)
        call = running.generation.Generate.future(ask("x"))
        assert started.wait(5)
        assert running.client.health(timeout=2) == "SERVING"
        assert running.client.adapters(timeout=2)
        go_on.set()
        assert call.result(10).choices


def test_backend_unavailable_is_the_same_in_the_middle_of_a_stream():
    backend = FakeBackend()
    backend.failure_after = BackendUnavailable("died")
    with serving(backend) as running:
        call = running.generation.StreamGenerate(ask_stream("x", max_tokens=5))
        pieces = []
        error = failure(lambda: [pieces.append(piece) for piece in call])
        assert len(pieces) == 2 and error.code() is CODES.UNAVAILABLE
        assert running.client.health() == "NOT_SERVING"
