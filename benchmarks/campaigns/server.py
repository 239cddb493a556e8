"""The server of a campaign, in a process of its own. Started by `stand.CampaignServer`.

Reads commands on its standard input, one JSON object a line, and writes an answer to each on its standard output:

    {"do": "state"}                         what is unfinished where
    {"do": "ask", "sets": …, …}             asks the backend within this process, for service_cost.py
    {"do": "stop"}                          drains and ends
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from loraf.tasksets import TaskSet
from loraf_serve.adapters.adapter_spec import check_adapters
from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.backends.backend import Backend, GenerationRequest, Sampling
from loraf_serve.observe.logs import LogObserver
from loraf_serve.service.server import GrpcServer, create_server
from loraf_serve.service.server_options import ServerOptions
from tests.loraf_serve.fake_backend import FakeBackend


class CampaignFake(FakeBackend):
    """Remembers no requests, so that it does not grow, and has an end token, so that forms of answers are admitted."""

    end_tokens = frozenset({2})

    def __init__(self, seconds_per_token: float, chat_template: str):
        super().__init__(seconds_per_token, max_model_len=1024)
        self.tokenizer.chat_template = chat_template
        # Lists that keep nothing, hence the ignores.
        self.requests = collections.deque(maxlen=0)  # type: ignore[assignment]
        self.closed_early = collections.deque(maxlen=0)  # type: ignore[assignment]
        self.history = collections.deque(maxlen=0)  # type: ignore[assignment]


def make_backend(config: dict[str, Any]) -> Backend:
    """The backend that the campaign asks for."""
    kind, model, options = config["kind"], Path(config["model"]), tuple(config["engine_options"])
    if kind == "fake":
        return CampaignFake(config["seconds_per_token"], config["chat_template"])
    if kind == "merged":
        from loraf_serve.backends.merged import MergedBackend

        return MergedBackend(model, "float32", 1024)
    from loraf_serve.vllm.engine.backends import ResidentBackend

    return ResidentBackend(model, options, config["rank"])


async def unfinished(backend: Backend) -> dict[str, int]:
    """Requests that the engine has not ended: known to its client, and to its core."""
    engine = getattr(backend, "_engine", None)
    if isinstance(backend, FakeBackend):
        return {"engine": len(backend.running)}
    if backend.name == "merged":
        return {"engine": len(engine._inbox) + sum(len(group.jobs) for group in list(engine._groups.values()))}
    core_busy = await engine.engine_core.call_utility_async("has_work")
    sets = sum(backend._in_use.values())
    client = engine.output_processor.get_num_unfinished_requests()
    return {"engine": client, "engine core busy": int(core_busy), "sets in use": sets}


async def state(server: GrpcServer) -> dict[str, int]:
    """What is unfinished where, all 0 if nothing runs."""
    library = server._library
    running = {"admission": server._admission.in_flight, "leases": sum(library._leases.values())}
    return running | {"changes of adapters": len(library._changes)} | await unfinished(server._backend)


async def ask(server: GrpcServer, command: dict[str, Any]) -> list[list[float]]:
    """Sends all requests to the backend at once.

    Returns:
        For each request the times of its pieces in seconds since it was sent.
    """
    adapter = server.registry.get(command["adapter"])
    sampling = Sampling(temperature=0.0, max_tokens=command["tokens"], ignore_eos=True)

    async def one(task_set: str, prompt: list[int]) -> list[float]:
        request = GenerationRequest("r", tuple(prompt), sampling, adapter, TaskSet.parse(task_set, adapter.tasks))
        began = time.perf_counter()
        return [time.perf_counter() - began async for _ in server._backend.generate(request)]

    return await asyncio.gather(*map(one, command["sets"], command["prompts"]))


async def main(config: dict[str, Any], answers: int) -> None:
    """Serves until told to stop.

    Args:
        answers: file descriptor for the answers to commands.
    """
    model, root = Path(config["model"]), Path(config["root"])
    registry = check_adapters([f"{name}={root / path}" for name, path in config["adapters"].items()], model)
    if config["sets"]:
        registry = registry.with_sets(OperatorSets.parse(config["sets"]))
    options = ServerOptions(port=0, grace=0.0, **config["server_options"])
    adapter_root = AdapterRoot(root, model)
    observers = [LogObserver()]
    server, port = await create_server(make_backend(config), registry, options, None, adapter_root, observers)
    await server.warm_up()
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def answer(value: object) -> None:
        os.write(answers, json.dumps(value).encode() + b"\n")

    answer({"port": port})
    while line := await reader.readline():
        command = json.loads(line)
        if command["do"] == "state":
            answer(await state(server))
        elif command["do"] == "ask":
            answer(await ask(server, command))
        else:
            break
    await server.drain(0.0)
    answer({})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it tells it to stop
    descriptor = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    asyncio.run(main(json.loads(sys.argv[1]), descriptor))
