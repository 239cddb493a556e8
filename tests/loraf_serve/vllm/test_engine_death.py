"""A dead engine is reported at once, and stopping is clean. Each test uses up an engine of the pool."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from loraf_serve.backends.backend import BackendUnavailable
from tests.loraf_serve.vllm_engines import Engine, Pool, random_prompt, shared

pytestmark = pytest.mark.uses_up_engine  # runs these tests last, see tests/conftest.py
PROMPT = random_prompt(10, seed=90)


def workers(engine: Engine) -> list[psutil.Process]:
    (core,) = engine.backend._engine.engine_core.resources.engine_manager.processes
    return [psutil.Process(core.pid), *psutil.Process(core.pid).children(recursive=True)]


@shared("qwen2")
def test_requests_fail_when_the_engine_dies(vllm_pool: Pool) -> None:
    engine = vllm_pool.get("qwen2")
    texts = ["base", "math", "nlu", "code", "all"]  # "all" waits for a slot

    async def scenario() -> None:
        requests = [engine.request(text, PROMPT, max_tokens=900) for text in texts]
        tasks = [asyncio.ensure_future(engine.answers(request)) for request in requests]
        while not await engine.busy():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        processes = workers(engine)
        processes[-1].kill()
        with pytest.raises(BackendUnavailable):  # vLLM itself raises a plain exception, or never returns
            await asyncio.wait_for(engine.backend._call_workers("loraf_layers"), 30)
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert [type(outcome) for outcome in outcomes] == [BackendUnavailable] * len(texts)
        with pytest.raises(BackendUnavailable):
            await engine.backend.check_health()
        with pytest.raises(BackendUnavailable):
            await engine.answers(engine.request("base", PROMPT))
        with pytest.raises(BackendUnavailable):
            await engine.backend.add_adapter(engine.adapter)
        await engine.backend.stop()
        await engine.backend.stop()
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive

    engine.loop.run(scenario())


@shared("llama")
def test_stopping_ends_requests_and_processes(vllm_pool: Pool) -> None:
    engine = vllm_pool.get("llama")
    texts = ["base", "math", "nlu", "code", "all"]

    async def scenario() -> None:
        requests = [engine.request(text, PROMPT, max_tokens=900) for text in texts]
        tasks = [asyncio.ensure_future(engine.answers(request)) for request in requests]
        while not await engine.busy():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        processes = workers(engine)
        await engine.backend.stop()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert [type(outcome) for outcome in outcomes] == [BackendUnavailable] * len(texts)
        with pytest.raises(BackendUnavailable):
            await engine.backend.check_health()
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive

    engine.loop.run(scenario())
