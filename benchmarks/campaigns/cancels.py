"""1,000 requests cancelled on their way: one second later nothing of them is left in the server or its engine.

    python -m benchmarks.campaigns.cancels --kind resident merged        # about 10 minutes on two cores

A request ends because its client cancels it, because its deadline passes, or because its connection is reset; while it
waits in the engine's queue behind others that fill the batch, while its prompt is computed, or while tokens are made.
One second after each batch of them the server is asked what is unfinished: in its admission, in the adapters' leases,
in the engine's client and in its core. The requests that filled the batch meanwhile must go on.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from benchmarks.campaigns.calls import Caller, control, is_well
from benchmarks.campaigns.frames import STREAM, Connection
from benchmarks.campaigns.reporting import add_out, describe, finish, say
from benchmarks.campaigns.stand import ENGINE_OPTIONS, KINDS, LookedInto, campaign_server
from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb

WAYS = ("client", "deadline", "socket")
# The fake backend has no queue.
PLACES = {"fake": ("prefill", "decode")} | dict.fromkeys(("resident", "merged"), ("queue", "prefill", "decode"))
# Requests, and answers of each, that fill a batch.
FILLING = {"resident": (8, 1), "merged": (1, 16)}
ENGINE = (*ENGINE_OPTIONS, "--max-num-seqs", "8", "--max-num-batched-tokens", "16")
EACH_WAY = 10  # in a batch
_LONG = 800  # tokens
_GONE_SECONDS = 1.0
_BASE = pb.TaskSelection(base=pb.Base())
_SETS: tuple[dict[str, Any], ...] = (
    {"tasks": ["math"]},
    {"tasks": {"nlu": 0.5}},
    {},
    {"base": True},
    {"named": "both"},
)


@dataclass
class Victim:
    """A request that is cancelled.

    Attributes:
        place: where it shall be then.
        delay: seconds from its start, or for `decode` from its first piece.
        pieces: what it had got by then.
    """

    way: str
    place: str
    request: pb.StreamGenerateRequest
    delay: float
    pieces: int = 0

    @property
    def was(self) -> str:
        """Where it was: with a piece, it was no longer in the queue or its prompt."""
        return "decode" if self.pieces else self.place


class Canceller:
    """Sends victims and cancels them."""

    def __init__(self, address: str, seed: int):
        self._address = address
        self.caller = Caller(address)
        self._threads = ThreadPoolExecutor(4 * EACH_WAY)
        self._source = random.Random(seed)
        self.first_token = 0.1  # seconds that a long prompt takes alone

    def request(self, place: str) -> pb.StreamGenerateRequest:
        """A request that stays in that place for a while."""
        length = 8 if place != "prefill" else _LONG
        prompt = [1, *(self._source.randrange(3, 259) for _ in range(length))]
        return request_of(
            pb.StreamGenerateRequest,
            prompt_token_ids=prompt,
            max_tokens=_LONG if place != "prefill" else 100,
            temperature=0,
            ignore_eos=True,
            adapter="trio",
            **self._source.choice(_SETS),
        )

    async def measure(self) -> None:
        """Measures how long a long prompt takes."""
        times = []
        for _ in range(3):
            request = self.request("prefill")
            request.sampling.max_tokens = 1
            times.append((await self.caller.stream(request)).seconds)
        self.first_token = min(times)

    async def cancel(self, victim: Victim) -> None:
        """Sends one victim and cancels it."""
        if victim.way == "socket":
            await asyncio.get_running_loop().run_in_executor(self._threads, self._reset, victim)
            return
        timeout = victim.delay + (self.first_token if victim.place == "decode" else 0.0)
        call = self.caller.generation.StreamGenerate(
            victim.request, timeout=timeout if victim.way == "deadline" else 60
        )

        async def read() -> None:
            async for _ in call:
                victim.pieces += 1

        reading = asyncio.ensure_future(read())
        if victim.way == "client":
            if victim.place == "decode":
                while not victim.pieces and not reading.done():
                    await asyncio.sleep(0.002)
            await asyncio.wait([reading], timeout=victim.delay)
            call.cancel()
        with suppress(aio.AioRpcError, asyncio.CancelledError):
            await reading

    def _reset(self, victim: Victim) -> None:
        connection = Connection(self._address)
        connection.open()
        number = connection.call(STREAM, victim.request.SerializeToString())
        deadline = time.monotonic() + 60
        while victim.place == "decode" and not connection.pieces(number) and time.monotonic() < deadline:
            connection.receive(0.05)
        connection.wait(victim.delay, number)
        victim.pieces = connection.pieces(number)
        connection.kill()

    def victims(self, place: str) -> list[Victim]:
        """EACH_WAY victims of each way."""
        highest = 0.8 * self.first_token if place == "prefill" else 0.3
        victims = []
        for way in WAYS:
            for _ in range(EACH_WAY):
                request = self.request("decode" if place == "queue" else place)
                if place == "queue":  # of the set whose batch is full
                    request.task_selection.CopyFrom(_BASE)
                victims.append(Victim(way, place, request, self._source.uniform(highest / 10, highest)))
        return victims

    async def close(self) -> None:
        self._threads.shutdown()
        await self.caller.close()


class Filling:
    """Requests that fill the engine's batch, so that others wait in its queue."""

    def __init__(self, canceller: Canceller, kind: str):
        self._canceller = canceller
        self._count, self._answers = FILLING[kind]
        self._counted_each = self._answers if kind == "resident" else 1  # by the engine
        self._calls: list[aio.UnaryStreamCall[Any, Any]] = []
        self._readers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Sends them and waits until all run."""
        for _ in range(self._count):
            request = self._canceller.request("decode")
            request.task_selection.CopyFrom(_BASE)
            request.sampling.max_tokens = 1000
            if self._answers > 1:
                request.sampling.n, request.sampling.temperature = self._answers, 1.0
            self._calls.append(self._canceller.caller.generation.StreamGenerate(request))
        for call in self._calls:
            await call.read()
        self._readers = [asyncio.create_task(_drain(call)) for call in self._calls]

    @property
    def running(self) -> int:
        return sum(not reader.done() for reader in self._readers)

    @property
    def all_run(self) -> bool:
        return self.running == self._count

    def without(self, state: dict[str, int]) -> dict[str, int]:
        """What is unfinished beside these requests."""
        own = {"admission": self.running, "engine": self.running * self._counted_each}
        return {what: max(0, state[what] - number) for what, number in own.items()}

    async def stop(self) -> None:
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._readers)


@dataclass
class Batch:
    """What came of some victims that were cancelled at the same time.

    Attributes:
        victims: where and how → how many.
        filling, went_on: requests that filled the engine's batch, and those of them that ran a second later.
        faults: what was left, in words.
    """

    victims: Counter[str]
    filling: int = 0
    went_on: int = 0
    faults: list[str] = field(default_factory=list)


async def cancel_batch(canceller: Canceller, server: LookedInto, kind: str, place: str) -> Batch:
    """Cancels EACH_WAY victims in each way, and looks for them a second later."""
    filling = Filling(canceller, kind) if place == "queue" else None
    if filling:
        await filling.start()
    victims = canceller.victims(place)
    await asyncio.gather(*map(canceller.cancel, victims))
    ended = time.monotonic()
    waited = filling is None or filling.all_run  # otherwise the engine may have begun with some of them
    batch = Batch(Counter(f"{victim.was if waited else 'decode'}, {victim.way}" for victim in victims))
    await asyncio.sleep(_GONE_SECONDS)
    if filling:
        batch.filling, batch.went_on = FILLING[kind][0], filling.running
        beside = filling.without(await asyncio.to_thread(server.state))
        batch.faults += [f"beside those that run: {number} in {what}" for what, number in beside.items() if number]
        await filling.stop()
        ended = time.monotonic()
        await asyncio.sleep(_GONE_SECONDS)
    state = await asyncio.to_thread(server.state)
    late = time.monotonic() - ended
    if any(state.values()):
        gone = await until_nothing_is_left(server, ended)
        left = ", ".join(f"{what} {number}" for what, number in state.items() if number)
        batch.faults.append(f"{place}: left after {late:.2f} s: {left}; nothing after {gone:.2f} s")
    return batch


async def run_campaign(
    server: LookedInto, kind: str, count: int, places: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Cancels at least `count` requests. Returns what came of it.

    Args:
        places: where they are then; None for every place that the backend has.
    """
    places = places or PLACES[kind]
    canceller = Canceller(server.address, seed)
    known = await canceller.caller.generate(control(), timeout=60)
    await canceller.measure()
    cancelled: Counter[str] = Counter()
    batches: list[Batch] = []
    while cancelled.total() < count:
        batches.append(await cancel_batch(canceller, server, kind, places[len(batches) % len(places)]))
        cancelled += batches[-1].victims
        if len(batches) % 5 == 0:
            say(f"{cancelled.total()} cancelled, {sum(len(batch.faults) for batch in batches)} faults")
    faults = [fault for batch in batches for fault in batch.faults] + await is_well(canceller.caller, known)
    await canceller.close()
    return {
        "cancelled": cancelled.total(),
        "where and how": dict(sorted(cancelled.items())),
        "at once": len(WAYS) * EACH_WAY,
        "batches": len(batches),
        "seconds of a long prompt": round(canceller.first_token, 3),
        "requests that filled the batch": sum(batch.filling for batch in batches),
        "of them running a second later": sum(batch.went_on for batch in batches),
        "seconds after which nothing may be left": _GONE_SECONDS,
        "faults": faults,
    }


async def until_nothing_is_left(server: LookedInto, since: float) -> float:
    """Waits for at most a minute. Returns the seconds since `since`."""
    while time.monotonic() < since + 60:
        if not any((await asyncio.to_thread(server.state)).values()):
            break
        await asyncio.sleep(0.05)
    return time.monotonic() - since


async def _drain(call: aio.UnaryStreamCall[Any, Any]) -> None:
    with suppress(aio.AioRpcError, asyncio.CancelledError):
        while await call.read() is not aio.EOF:
            pass


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--kind", choices=KINDS, nargs="+", default=["resident", "merged"])
    command.add_argument("--count", type=int, default=1000, help="of each kind (default: %(default)s)")
    add_out(command, "cancels")
    options = command.parse_args()
    status = 0
    for kind in options.kind:
        setup = describe()
        with campaign_server(kind, engine_options=ENGINE, seconds_per_token=0.05) as server:
            say(f"{kind} on {server.address}")
            result = asyncio.run(run_campaign(server, kind, options.count))
        status |= finish("Is anything left of a cancelled request?", setup, result, options.out, kind)
    return status


if __name__ == "__main__":
    sys.exit(main())
