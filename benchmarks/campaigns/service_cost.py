"""What the service costs: the same engine asked over gRPC, and within its own process.

    python -m benchmarks.campaigns.service_cost                     # about 15 minutes on two quiet cores
    python -m benchmarks.campaigns.service_cost --rounds 2 --out -

The model and the checkpoint are those of benchmarks/serving.py: 8 layers, rank 64, four tasks. The server has a process
of its own, and so has the client. Each round asks both ways, in random order, with prompts that the engine has not
seen: 16 streams at once with 16 task sets, with one set, and a single stream. «In process» is the server's own loop,
which calls the backend as the service does and counts its outputs. Ratios and differences are taken within a round; the
report has their medians with 95 % intervals.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpc import aio

from benchmarks.campaigns.calls import Caller
from benchmarks.campaigns.reporting import add_out, describe, finish, say
from benchmarks.campaigns.stand import CampaignServer
from benchmarks.measuring import interval
from benchmarks.serving import PROMPT, SETTLE_SECONDS, TOKENS, Cell, make_checkpoints, make_model
from loraf.tasksets import TaskSet
from loraf_serve.v1 import generation_pb2 as pb

CELLS = (Cell(16, 16), Cell(16, 1), Cell(1, 1))
REPEATED = {CELLS[2]: 5}  # within a round
LEAST_SHARE = 0.95
MOST_MORE_MS = 3.0
ADAPTER = "four"
_TASKS = ("t0", "t1", "t2", "t3")
_ENGINE = (
    *("--max-model-len", "1024", "--max-num-seqs", "128"),
    *("--kv-cache-memory-bytes", str(512 << 20), "--enforce-eager"),
)
Times = list[list[float]]
"""For each request the times of its pieces, in seconds since it was sent."""


class Asker:
    """Asks one server in both ways."""

    def __init__(self, server: CampaignServer, seed: int):
        self._server = server
        self._caller = Caller(server.address)
        self._source = random.Random(seed)

    def prompts(self, count: int) -> list[list[int]]:
        return [[self._source.randrange(3, 259) for _ in range(PROMPT)] for _ in range(count)]

    async def within(self, sets: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        """Within the server's process."""
        command = {"sets": list(sets), "prompts": [list(prompt) for prompt in prompts], "tokens": tokens}
        times: Times = await asyncio.to_thread(self._server.do, do="ask", adapter=ADAPTER, **command)
        return times

    async def over(self, sets: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        """Over gRPC."""
        requests = [request(text, prompt, tokens) for text, prompt in zip(sets, prompts, strict=True)]

        async def one(message: pb.StreamGenerateRequest) -> list[float]:
            began = time.perf_counter()
            call: aio.UnaryStreamCall[Any, Any] = self._caller.generation.StreamGenerate(message)
            return [time.perf_counter() - began async for _ in call]

        return await asyncio.gather(*map(one, requests))

    async def cell(self, cell: Cell) -> dict[str, dict[str, float]]:
        """Asks both ways, in random order."""
        ways = [("in process", self.within), ("over gRPC", self.over)]
        measured: dict[str, dict[str, float]] = {}
        for name, ask in self._source.sample(ways, len(ways)):
            results = []
            for _ in range(REPEATED.get(cell, 1)):
                await asyncio.sleep(SETTLE_SECONDS)
                times = await ask(cell.task_sets(self._source), self.prompts(cell.batch), cell.tokens)
                total = max(pieces[-1] for pieces in times)
                results.append((cell.batch * cell.tokens / total, statistics.median(pieces[0] for pieces in times)))
            speeds, firsts = zip(*results, strict=True)
            measured[name] = {"tokens a second": statistics.median(speeds), "first token": statistics.median(firsts)}
        return measured

    async def close(self) -> None:
        await self._caller.close()


def request(task_set: str, prompt: Sequence[int], tokens: int) -> pb.StreamGenerateRequest:
    """The request that asks for the same as `server.ask` within the process."""
    message = pb.StreamGenerateRequest(adapter=ADAPTER)
    message.prompt_token_ids.ids.extend(prompt)
    for name, weight in TaskSet.parse(task_set, _TASKS).weights:
        message.task_selection.tasks.tasks.add(name=name, weight=weight)
    message.sampling.temperature = 0
    message.sampling.max_tokens, message.sampling.ignore_eos = tokens, True
    return message


def compare(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Ratios and differences within rounds, as medians with intervals."""
    shares = [r["over gRPC"]["tokens a second"] / r["in process"]["tokens a second"] for r in rounds]
    more = [1e3 * (r["over gRPC"]["first token"] - r["in process"]["first token"]) for r in rounds]
    ways = {
        f"{what}, {way}": interval([r[way][what] for r in rounds])
        for way in ("in process", "over gRPC")
        for what in ("tokens a second", "first token")
    }
    return {"share of the throughput": interval(shares), "ms more to the first token": interval(more), **ways}


async def run_campaign(
    server: CampaignServer, rounds: int, cells: Sequence[Cell] = CELLS, seed: int = 0
) -> dict[str, Any]:
    """Runs all rounds. Returns what came of them."""
    asker = Asker(server, seed)
    measured: dict[Cell, list[dict[str, dict[str, float]]]] = {cell: [] for cell in cells}
    for cell in cells:  # warm-up
        await asker.cell(cell)
    for number in range(rounds):
        for cell in cells:
            measured[cell].append(await asker.cell(cell))
        say(f"round {number + 1} of {rounds}")
    await asker.close()
    return {cell.name: compare(results) for cell, results in measured.items()}


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--dtype", default="bfloat16")
    add_out(command, "service-cost")
    options = command.parse_args()
    setup = describe() | {"dtype": options.dtype, "rounds": options.rounds, "tokens of an answer": TOKENS}
    with tempfile.TemporaryDirectory(prefix="loraf-campaign-") as name:
        folder = Path(name)
        make_model(folder / "model")
        make_checkpoints(folder / "checkpoints", folder / "model")
        engine = ("--dtype", options.dtype, *_ENGINE)
        with CampaignServer(
            "resident", folder, engine_options=engine, adapters={ADAPTER: "T4"}, sets=(), rank=64
        ) as server:
            say(f"on {server.address}")
            result = asyncio.run(run_campaign(server, options.rounds))
    faults = []
    share = result[CELLS[0].name]["share of the throughput"]["median"]
    more = result[CELLS[2].name]["ms more to the first token"]["median"]
    if share < LEAST_SHARE:
        faults.append(f"{share:.3f} of the throughput is less than {LEAST_SHARE}")
    if more >= MOST_MORE_MS:
        faults.append(f"{more:.1f} ms more to the first token is not less than {MOST_MORE_MS}")
    question = "What does the service cost beside the same engine called in process?"
    return finish(question, setup, result | {"faults": faults}, options.out)


if __name__ == "__main__":
    sys.exit(main())
