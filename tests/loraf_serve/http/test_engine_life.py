"""What stays of requests through vLLM's app, and what stops them."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from loraf_serve.client import Client
from tests.loraf_serve.harness import eventually
from tests.loraf_serve.http.engine_stand import CHAT, idle, on_engine, over_grpc
from tests.loraf_serve.http.stand import pause_all
from tests.loraf_serve.vllm_engines import shared

pytestmark = shared("mistral")
LONG = {"prompt": ["x"] * 16, "n": 8, "max_tokens": 1000, "extra_body": {"ignore_eos": True}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_dropped_connection_stops_the_request(both, vllm_pool, stream, chat):
    engine = vllm_pool.get("mistral", "resident")
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = {"messages": CHAT} if chat else {"prompt": ["x", "y"]}
    body = {"model": "main@math:0.123", "max_tokens": 900, "n": 16, "ignore_eos": True, "stream": stream, **asked}
    with httpx.Client(base_url=both.url) as client:
        if stream:
            with client.stream("POST", path, json=body) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=0.4)
    assert eventually(lambda: idle(both, engine), 5.0)


def test_free_weights_leave_nothing_behind(both, vllm_pool):
    engine = vllm_pool.get("mistral", "resident")
    remembered = engine.backend._lora_requests
    count, at_once = 1200, 40  # more than are remembered
    expected = over_grpc(both, "math:0.5", prompt="x")

    async def ask_all() -> set[str]:
        async with httpx.AsyncClient(base_url=both.url, timeout=60) as client:
            turns = asyncio.Semaphore(at_once)

            async def ask(i: int) -> str:
                async with turns:
                    body = {"model": f"main@math:{i / 1000}+nlu", "prompt": [1, 5], "max_tokens": 1}
                    response = await client.post("/v1/completions", json=body)
                    assert response.status_code == 200, response.text
                    return response.json()["system_fingerprint"]

            return set(await asyncio.gather(*map(ask, range(1, count + 1))))

    assert len(asyncio.run(ask_all())) == count
    assert eventually(lambda: idle(both, engine))
    assert len(remembered._requests) <= 1024 + at_once  # as many as are remembered whatever clients ask
    app = both.door._answering._app._app
    assert not app.state.openai_serving_models.lora_requests
    assert not app.state.openai_serving_models.lora_resolver_lock
    assert over_grpc(both, "math:0.5", prompt="x") == expected


def test_the_deadline_ends_a_request(vllm_pool):
    engine = vllm_pool.get("mistral", "resident")
    with on_engine(engine, default_deadline=0.3) as both:
        with pytest.raises(openai.APIStatusError) as late:
            both.openai.completions.create(model="main", **LONG)
        assert late.value.status_code == 504
        assert eventually(lambda: idle(both, engine), 5.0)
        stream = both.openai.completions.create(model="main", stream=True, **LONG)
        with pytest.raises(openai.APIError, match="deadline"):
            list(stream)
        assert eventually(lambda: idle(both, engine), 5.0)


def test_requests_of_both_doors_are_counted_together(vllm_pool):
    engine = vllm_pool.get("mistral", "resident")
    with on_engine(engine, max_queue=2) as both, Client(both.grpc.address, retries=0) as client:
        stream = client.stream("x", max_tokens=900, n=8, ignore_eos=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as full:
            both.openai.completions.create(model="main", prompt=["x", "y"])
        assert int(full.value.response.headers["retry-after"]) >= 1
        assert both.openai.completions.create(model="main", prompt="x").choices
        stream.close()


def test_a_dead_engine_is_a_503_for_this_request_and_the_next(vllm_pool, monkeypatch):
    engine = vllm_pool.get("mistral", "resident")

    async def dying(*_, **__):
        raise EngineDeadError
        yield

    for stream in (False, True):
        with on_engine(engine) as both:
            with monkeypatch.context() as patch:
                patch.setattr(engine.backend._engine, "generate", dying)
                with pytest.raises(openai.InternalServerError) as gone:
                    both.openai.completions.create(model="main", prompt="x", stream=stream)
                assert gone.value.status_code == 503 and "engine" in gone.value.message
            with pytest.raises(openai.InternalServerError) as gone:
                both.openai.completions.create(model="main", prompt="x")
            assert gone.value.status_code == 503
            assert both.http.get("/health").status_code == 503 and both.grpc.client.health() == "NOT_SERVING"


def test_an_unexpected_error_tells_its_id_alone(vllm_pool, monkeypatch):
    engine = vllm_pool.get("mistral", "resident")

    async def failing(*_, **__):
        raise RuntimeError("/srv/secret")
        yield

    with on_engine(engine) as both:
        monkeypatch.setattr(engine.backend._engine, "generate", failing)
        for stream in (False, True):
            body = {"model": "main", "prompt": "x", "stream": stream, "request_id": "mine"}
            response = both.post("/v1/completions", body)
            assert response.status_code == 500
            error = response.json()["error"]
            assert error["message"] == "request mine" and "secret" not in response.text


def test_an_answer_that_nobody_reads_is_given_up(both, vllm_pool, monkeypatch):
    monkeypatch.setattr("loraf_serve.service.outbox.MAX_WAITING_BYTES", 20_000)
    monkeypatch.setattr("loraf_serve.service.outbox._ROOM_SECONDS", 0.1)
    engine = vllm_pool.get("mistral", "resident")
    body = {"model": "main", "prompt": ["x"] * 8, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=both.url) as client, client.stream("POST", "/v1/completions", json=body):
        pause_all(both)
        assert eventually(lambda: idle(both, engine))
