"""Both doors of a vLLM engine that the suite has started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import grpc

from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.adapters.registry import Registry
from loraf_serve.client import Client
from loraf_serve.http.door import HttpDoor
from loraf_serve.service import server
from loraf_serve.service.doors import Inside
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.v1 import adapter_pb2_grpc, generation_pb2_grpc
from tests.loraf_serve.harness import Running
from tests.loraf_serve.http.stand import Both
from tests.loraf_serve.vllm_engines import Engine

GREEDY = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6 times 7?"}]


class OnEngine(Running):
    """As `Running`, on the engine's own loop."""

    def __init__(self, engine: Engine, running: server.GrpcServer, port: int):
        self.backend, self.server, self.port, self.loop = engine.backend, running, port, engine.loop.loop
        self.address = f"127.0.0.1:{port}"
        self.client = Client(self.address, retries=0)
        self.channel = grpc.insecure_channel(self.address)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(self.channel)


@contextmanager
def on_engine(
    engine: Engine, sets: Sequence[str] = (), tool_parser: str = "", token: str = "none", **options
) -> Iterator[Both]:
    """Both doors; the engine's adapter is called `main`. The engine runs on when they are closed."""
    backend = engine.backend
    made: list[HttpDoor] = []

    async def nothing() -> None:
        pass

    def make_door(inside: Inside) -> HttpDoor:
        made.append(HttpDoor(inside, 0, (), tool_parser))
        return made[0]

    async def begin() -> OnEngine:
        server_options = replace(ServerOptions(port=0, grace=0.0), **options)
        adapters = Registry([replace(engine.adapter, checkpoint=None)]).with_sets(OperatorSets.parse(sets))
        running, port = await server.create_server(backend, adapters, server_options, doors=[make_door])
        await running.warm_up()
        return OnEngine(engine, running, port)

    before = {name: vars(backend).get(name) for name in ("start", "stop")}
    backend.start = backend.stop = nothing  # it has started, and goes on
    try:
        running = engine.loop.run(begin())
        both = Both(running, made[0], token)
        try:
            yield both
        finally:
            both.http.close()
            both.openai.close()
            running.client.close()
            running.channel.close()
            engine.loop.run(running.server.drain(0.0), 90)
    finally:
        for name, method in before.items():
            if method:
                setattr(backend, name, method)
            else:
                delattr(backend, name)


def selection(text: str) -> dict[str, object]:
    """The set as an argument of loraf's client."""
    if text in ("all", "base", "support"):
        return {"all": {}, "base": {"base": True}, "support": {"named": "support"}}[text]
    if text.startswith("as_trained="):
        return {"as_trained": text.partition("=")[2]}
    pairs = (part.partition(":") for part in text.split("+"))
    return {"tasks": {name: float(weight or 1) for name, _, weight in pairs}}


def model(text: str) -> str:
    return "base" if text == "base" else f"main@{text}"


def over_grpc(both: Both, text: str, **request) -> tuple[str, list[int]]:
    answer = both.grpc.client.generate(**request, **selection(text), max_tokens=8, temperature=0, ignore_eos=True)
    return answer.text, list(answer.token_ids)


def idle(both: Both, engine) -> bool:
    return (
        not engine.loop.run(engine.busy())
        and not engine.sets_in_use()
        and not both.grpc.server._admission.in_flight
        and not both.grpc.server._library._leases
    )
