"""What OpenAI's API costs beside gRPC: both doors of one server, asked for the same.

    python -m benchmarks.campaigns.http_cost                     # about 15 minutes on two quiet cores
    python -m benchmarks.campaigns.http_cost --rounds 2 --out -

The model and the checkpoint are those of benchmarks/serving.py: 8 layers, rank 64, four tasks. The server has a process
of its own. Each round asks through both doors, in random order, with prompts as token ids that the engine has not seen:
16 streams at once with 16 task sets, with one set, and 16 whole answers. The client of each door does as little as it
can: grpc.aio reads messages, and over HTTP bytes are read and events counted. Ratios are taken within a round; the
report has their medians with 95 % intervals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpc import aio

from benchmarks.campaigns.calls import Caller
from benchmarks.campaigns.reporting import add_out, describe, finish, say
from benchmarks.campaigns.service_cost import ADAPTER, request
from benchmarks.measuring import interval
from benchmarks.serving import PROMPT, SETTLE_SECONDS, TOKENS, Cell, make_checkpoints, make_model
from loraf_serve.launch import launch
from loraf_serve.v1 import generation_pb2 as pb

LEAST_SHARE = 0.95
_DOORS = ("gRPC", "HTTP")
_ENGINE = (
    *("--max-model-len", "1024", "--max-num-seqs", "128"),
    *("--kv-cache-memory-bytes", str(512 << 20), "--enforce-eager"),
)


@dataclass(frozen=True)
class Way:
    """How answers are asked for.

    Attributes:
        whole: each answer as one message, not as a stream.
    """

    cell: Cell
    whole: bool = False

    @property
    def name(self) -> str:
        """For the report."""
        return f"{self.cell.name}, whole answers" if self.whole else self.cell.name


WAYS = (Way(Cell(16, 16)), Way(Cell(16, 1)), Way(Cell(16, 16), whole=True))


class Asker:
    """Asks one server through both doors.

    Args:
        address: of gRPC.
        url: of HTTP.
    """

    def __init__(self, address: str, url: str, seed: int):
        self._caller = Caller(address)
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 0
        self._source = random.Random(seed)

    def _prompts(self, count: int) -> list[list[int]]:
        return [[self._source.randrange(3, 259) for _ in range(PROMPT)] for _ in range(count)]

    async def grpc(self, message: pb.StreamGenerateRequest, whole: bool) -> list[float]:
        """Times of the pieces of one answer over gRPC, in seconds since it was sent."""
        began = time.perf_counter()
        if whole:
            await self._caller.generation.Generate(pb.GenerateRequest.FromString(message.SerializeToString()))
            return [time.perf_counter() - began]
        call: aio.UnaryStreamCall[Any, Any] = self._caller.generation.StreamGenerate(message)
        return [time.perf_counter() - began async for _ in call]

    async def http(self, body: dict[str, Any]) -> list[float]:
        """The same over HTTP."""
        data = json.dumps(body).encode()
        head = f"Host: {self._host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        reader, writer = await asyncio.open_connection(self._host, self._port)
        began = time.perf_counter()
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + data)
        times: list[float] = []
        while line := await reader.readline():
            if line.startswith((b"data: {", b"{")):
                times.append(time.perf_counter() - began)
        writer.close()
        if not times:
            raise RuntimeError("an answer over HTTP has no piece")
        return times

    async def ask(self, door: str, way: Way) -> dict[str, float]:
        """Asks for a batch of answers through one door."""
        cell = way.cell
        sets, prompts = cell.task_sets(self._source), self._prompts(cell.batch)
        calls = []
        for text, prompt in zip(sets, prompts, strict=True):
            if door == "gRPC":
                calls.append(self.grpc(request(text, prompt, cell.tokens), way.whole))
            else:
                calls.append(self.http(body_of(text, prompt, cell.tokens, not way.whole)))
        times = await asyncio.gather(*calls)
        total = max(pieces[-1] for pieces in times)
        first = statistics.median(pieces[0] for pieces in times)
        return {"tokens a second": cell.batch * cell.tokens / total, "first piece": first}

    async def round(self, way: Way) -> dict[str, dict[str, float]]:
        """Asks through both doors, in random order."""
        measured = {}
        for door in self._source.sample(_DOORS, len(_DOORS)):
            await asyncio.sleep(SETTLE_SECONDS)
            measured[door] = await self.ask(door, way)
        return measured

    async def close(self) -> None:
        """Closes the connections."""
        await self._caller.close()


def body_of(task_set: str, prompt: Sequence[int], tokens: int, stream: bool) -> dict[str, Any]:
    """The body that asks over HTTP for what `service_cost.request` asks over gRPC."""
    return {
        "model": f"{ADAPTER}@{task_set}",
        "prompt": list(prompt),
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
    }


def compare(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Ratios and differences within rounds, as medians with intervals."""
    shares = [r["HTTP"]["tokens a second"] / r["gRPC"]["tokens a second"] for r in rounds]
    more = [1e3 * (r["HTTP"]["first piece"] - r["gRPC"]["first piece"]) for r in rounds]
    doors = {
        f"{what}, {door}": interval([r[door][what] for r in rounds])
        for door in _DOORS
        for what in ("tokens a second", "first piece")
    }
    return {"share of the throughput": interval(shares), "ms more to the first piece": interval(more), **doors}


async def run_campaign(
    address: str, url: str, rounds: int, ways: Sequence[Way] = WAYS, seed: int = 0
) -> dict[str, Any]:
    """Runs all rounds. Returns what came of them."""
    asker = Asker(address, url, seed)
    measured: dict[Way, list[dict[str, dict[str, float]]]] = {way: [] for way in ways}
    for way in ways:  # warm-up
        await asker.round(way)
    for number in range(rounds):
        for way in ways:
            measured[way].append(await asker.round(way))
        say(f"round {number + 1} of {rounds}")
    await asker.close()
    return {way.name: compare(results) for way, results in measured.items()}


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--dtype", default="bfloat16")
    add_out(command, "http-cost")
    options = command.parse_args()
    setup = describe() | {"dtype": options.dtype, "rounds": options.rounds, "tokens of an answer": TOKENS}
    with tempfile.TemporaryDirectory(prefix="loraf-campaign-") as name:
        folder = Path(name)
        make_model(folder / "model")
        make_checkpoints(folder / "checkpoints", folder / "model")
        arguments = ("--backend", "resident", "--http-port", "0", "--dtype", options.dtype, *_ENGINE)
        with launch(
            str(folder / "model"), f"{ADAPTER}={folder / 'checkpoints' / 'T4'}", options=arguments, echo=sys.stderr
        ) as server:
            say(f"on {server.address} and {server.http}")
            result = asyncio.run(run_campaign(server.address, server.http, options.rounds))
    share = result[WAYS[0].name]["share of the throughput"]["median"]
    faults = [f"{share:.3f} of gRPC's throughput is less than {LEAST_SHARE}"] if share < LEAST_SHARE else []
    question = "What does OpenAI's API cost beside gRPC, on the same server?"
    return finish(question, setup, result | {"faults": faults}, options.out)


if __name__ == "__main__":
    sys.exit(main())
