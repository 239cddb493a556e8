"""Two campaigns of benchmarks/campaigns/ on vLLM, briefly: many streams at once, and cancelled requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from benchmarks.campaigns import cancels, streams
from benchmarks.campaigns.server import state
from benchmarks.campaigns.stand import SETS, TASKS, make_checkpoint
from loraf_serve.adapters.adapter_spec import check_adapters
from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.backends.backend import Backend, GenerationRequest, Output, ServedAdapter
from loraf_serve.service.server import GrpcServer, create_server
from loraf_serve.service.server_options import ServerOptions
from tests.loraf_serve.vllm_engines import Loop, Pool, shared


class Started(Backend):
    """A backend that others have started, and stop."""

    reads_checkpoints = True

    def __init__(self, backend: Backend):
        self._backend = backend
        self.name = backend.name
        self.tokenizer, self.max_model_len = backend.tokenizer, backend.max_model_len
        self.vocab_size, self.end_tokens = backend.vocab_size, backend.end_tokens
        self.added: list[ServedAdapter] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def start(self) -> None: ...

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        self.added.append(adapter)
        await self._backend.add_adapter(adapter)

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        await self._backend.remove_adapter(adapter)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Output]:
        return self._backend.generate(request)

    async def check_health(self) -> None:
        await self._backend.check_health()

    async def stop(self) -> None:
        for adapter in self.added:
            await self._backend.remove_adapter(adapter)


class Serving:
    """A server on the loop of the pool's engines."""

    def __init__(self, loop: Loop, server: GrpcServer, port: int):
        self._loop, self._server = loop, server
        self.address = f"127.0.0.1:{port}"

    def state(self) -> dict[str, int]:
        return self._loop.run(state(self._server))


@pytest.fixture(scope="module")
def serving(vllm_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    engine = vllm_pool.get("mistral", "resident")
    root = tmp_path_factory.mktemp("campaign")
    make_checkpoint(root / "trio", engine.folder, TASKS, 0)
    make_checkpoint(root / "pair", engine.folder, TASKS[1:], 1)
    registry = check_adapters([f"{name}={root / name}" for name in ("trio", "pair")], engine.folder)
    registry = registry.with_sets(OperatorSets.parse(list(SETS)))

    async def begin() -> tuple[GrpcServer, int]:
        server, port = await create_server(Started(engine.backend), registry, ServerOptions(port=0, grace=0.0))
        await server.warm_up()
        return server, port

    server, port = engine.loop.run(begin())
    yield Serving(engine.loop, server, port)
    engine.loop.run(server.drain(0.0))


@shared("mistral")
def test_many_streams_are_neither_mixed_nor_lost(serving: Serving) -> None:
    result = asyncio.run(streams.run_campaign(serving, streams=54, lengths=(8, 24)))
    assert not result["faults"]
    assert result["as alone"] == 54 and result["most in flight in the server"] > 27
    assert result["prompt tokens from the prefix cache"] > 0


@shared("mistral")
def test_cancelled_requests_leave_nothing_in_the_engine(serving: Serving) -> None:
    result = asyncio.run(cancels.run_campaign(serving, "resident", count=60, places=("prefill", "decode")))
    assert not result["faults"]
    assert {f"decode, {way}" for way in cancels.WAYS} <= set(result["where and how"])
