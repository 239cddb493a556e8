"""Gives a server more work than it can do, for ten minutes: its memory must not grow.

    python -m benchmarks.campaigns.saturation --kind fake         # the service alone: 11 minutes
    python -m benchmarks.campaigns.saturation --kind resident     # with vLLM

An open loop: requests arrive at random times at a fixed rate, whether earlier ones have been answered or not. They are
streams and whole answers with several sets and lengths, cancels, short deadlines, invalid requests, lists, health
checks, loads and unloads. The rate rises until the queue of 32 is often full, and what exceeds it is refused with
RESOURCE_EXHAUSTED. Each answer must be the one that the request gets alone.

Memory is what the operating system counts for all processes of the server together, every 5 seconds under load; nothing
is freed or collected for the measurement. Growth is from the median of minute 2 to the median of the last minute.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.campaigns.calls import NEVER, Caller, Outcome, control, is_well, stream_request
from benchmarks.campaigns.questions import ask_alone, is_same, make_questions
from benchmarks.campaigns.reporting import add_out, describe, finish, say
from benchmarks.campaigns.stand import KINDS, CampaignServer, campaign_server
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.invalid_requests import KINDS as INVALID
from tests.loraf_serve.invalid_requests import good_request

LIMIT_MB = 64
QUEUE = 32
CHANNELS = 4
_MOST_OPEN = 512  # calls of the generator at once; more arrivals are counted and left out
_SAMPLE_SECONDS = 5.0
_LOOK_SECONDS = 3.0  # after which the rate is looked at
_FULL = (0.1, 0.5)  # share of calls that a full queue refuses: the rate rises below, and falls above
_FIRST_RATE = 50.0  # calls a second
_ALLOWED = {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


class Load:
    """Makes the calls and notes what came of them.

    Attributes:
        outcomes: kind of call → code → how many.
        faults: what must not happen, in words.
    """

    def __init__(self, address: str, seed: int):
        self.callers = [Caller(address) for _ in range(CHANNELS)]
        # Connections of their own: with grpc's asyncio client a cancel can end a call that begins on the same one.
        self._cancelling = [Caller(address) for _ in range(CHANNELS)]
        self.outcomes: dict[str, Counter[str]] = {}
        self.faults: list[str] = []
        self.left_out = self._left_out = 0
        self._refused = self._ended = 0  # since the rate was last looked at
        self._source = random.Random(seed)
        self._names = 0
        self._open: set[asyncio.Task[None]] = set()
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "stream": (40, self._stream),
            "whole answer": (20, self._whole),
            "cancel": (10, self._cancel),
            "short deadline": (5, self._deadline),
            "invalid": (12, self._invalid),
            "list": (5, self._list),
            "health": (5, self._health),
            "load and unload": (3, self._load),
        }

    async def prepare(self) -> None:
        """Asks for the known answers."""
        self.questions = make_questions(72, seed=5)
        self.alone = await ask_alone(self.callers[0], self.questions)
        self.known = await self.callers[0].generate(control(), timeout=60)

    def _caller(self) -> Caller:
        return self._source.choice(self.callers)

    def _question(self) -> tuple[pb.GenerateRequest, Outcome]:
        i = self._source.randrange(len(self.questions))
        return self.questions[i], self.alone[i]

    def _note(self, kind: str, outcome: Outcome, allowed: set[str], what: str = "") -> None:
        self.outcomes.setdefault(kind, Counter())[outcome.code] += 1
        self._refused += outcome.code == "RESOURCE_EXHAUSTED"
        self._ended += 1
        if outcome.code not in allowed or outcome.code in NEVER:
            got = f"{len(outcome.token_ids)} tokens in {outcome.seconds:.1f} s"
            self.faults.append(f"{kind} {what}: {outcome.code} {outcome.message}, {got}; {outcome.debug}")

    def _compare(self, kind: str, outcome: Outcome, alone: Outcome) -> None:
        self._note(kind, outcome, {"OK", "RESOURCE_EXHAUSTED"})
        if outcome.code == "OK" and not is_same(outcome, alone):
            self.faults.append(f"{kind}: {outcome.text!r} instead of {alone.text!r}")

    async def _stream(self) -> None:
        request, alone = self._question()
        self._compare("stream", await self._caller().stream(stream_request(request)), alone)

    async def _whole(self) -> None:
        request, alone = self._question()
        self._compare("whole answer", await self._caller().generate(request), alone)

    async def _cancel(self) -> None:
        request, _ = self._question()
        long = stream_request(request)
        long.sampling.max_tokens = 400
        caller = self._source.choice(self._cancelling)
        outcome = await caller.stream(long, cancel_after=self._source.randint(1, 6))
        # Under load many tokens come in one piece, so that an answer may be complete before.
        self._note("cancel", outcome, {"CANCELLED", "RESOURCE_EXHAUSTED", "OK"})

    async def _deadline(self) -> None:
        request, _ = self._question()
        long = stream_request(request)
        long.sampling.max_tokens = 400
        caller = self._source.choice(self._cancelling)
        outcome = await caller.stream(long, timeout=self._source.uniform(0.005, 0.3))
        self._note("short deadline", outcome, _ALLOWED)

    async def _invalid(self) -> None:
        kind = self._source.choice(INVALID)
        request = good_request()
        kind.spoil(request)
        self._note("invalid", await self._caller().generate(request), {kind.code, "RESOURCE_EXHAUSTED"}, kind.name)

    async def _list(self) -> None:
        outcome = await self._caller().call("ListAdapters", adapter_pb2.ListAdaptersRequest())
        self._note("list", outcome, {"OK"})

    async def _health(self) -> None:
        health = await self._caller().health()
        self._note("health", Outcome("OK" if health == "SERVING" else health), {"OK"})

    async def _load(self) -> None:
        self._names += 1
        name, tasks = f"new-{self._names}", self._source.choice(([], ["nlu"], ["nlu", "code"]))
        request = adapter_pb2.LoadAdapterRequest(name=name, path="pair", tasks=tasks)
        caller = self._caller()
        self._note("load", await caller.call("LoadAdapter", request), {"OK"})
        question, _ = self._question()
        named = pb.GenerateRequest()
        named.CopyFrom(question)
        named.adapter = name
        named.task_selection.Clear()
        named.task_selection.tasks.tasks.add(name="nlu")
        self._note("answer of a new adapter", await caller.generate(named), {"OK", "RESOURCE_EXHAUSTED"})
        outcome = await caller.call("UnloadAdapter", adapter_pb2.UnloadAdapterRequest(name=name))
        self._note("unload", outcome, {"OK"})

    def _any(self) -> Callable[[], Awaitable[None]]:
        weights = [weight for weight, _ in self._kinds.values()]
        return self._source.choices([call for _, call in self._kinds.values()], weights)[0]

    def _next_rate(self, rate: float) -> float:
        """More if the queue has hardly been full, less if it has been full nearly all the time, or if calls were left
        out because so many are open."""
        share = 1.0 if self.left_out > self._left_out else self._refused / max(1, self._ended)
        self._left_out = self.left_out
        self._refused = self._ended = 0
        return rate * (1.25 if share < _FULL[0] else 0.9 if share > _FULL[1] else 1.0)

    async def run(self, seconds: float, rate: float) -> list[float]:
        """Lets calls arrive for so long, at first with this rate (calls a second). Returns the rates."""
        rates = [rate]
        began = due = looked = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            if now > looked + _LOOK_SECONDS:
                looked = now
                rates.append(self._next_rate(rates[-1]))
            while due <= now:
                due += self._source.expovariate(rates[-1])
                if len(self._open) >= _MOST_OPEN:
                    self.left_out += 1
                    continue
                task = asyncio.create_task(self._guarded(self._any()))
                self._open.add(task)
                task.add_done_callback(self._open.discard)
            await asyncio.sleep(max(0.0, min(due - time.monotonic(), 0.05)))
        if self._open:
            await asyncio.wait(self._open, timeout=120)
        if self._open:
            self.faults.append(f"{len(self._open)} calls have not ended two minutes after the last arrival")
        return rates

    async def _guarded(self, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except Exception as error:
            self.faults.append(f"the generator failed: {error!r}")

    async def close(self) -> None:
        for caller in (*self.callers, *self._cancelling):
            await caller.close()


async def sample(server: CampaignServer, samples: list[tuple[float, int, int]], every: float) -> None:
    """Notes (seconds, resident bytes, unshared bytes) until it is cancelled."""
    began = time.monotonic()
    while True:
        memory = await asyncio.to_thread(server.memory)
        samples.append((time.monotonic() - began, memory["resident"], memory["unshared"]))
        await asyncio.sleep(every)


def growth(samples: list[tuple[float, int, int]], seconds: float) -> dict[str, float]:
    """Megabytes from the second minute to the last (of shorter runs: from the fifth to the last tenth)."""
    minute = min(60.0, seconds / 10)
    early = [s for s in samples if 2 * minute <= s[0] < 3 * minute]
    late = [s for s in samples if s[0] >= seconds - minute]
    grown: dict[str, float] = {}
    for i, what in ((1, "resident"), (2, "unshared")):
        before, after = (statistics.median(s[i] for s in part) / 1e6 for part in (early, late))
        grown |= {f"{what} MB, minute 2": round(before, 1), f"{what} MB, end": round(after, 1)}
        grown[f"{what} MB grown"] = round(after - before, 1)
    return grown


async def run_campaign(
    server: CampaignServer, seconds: float, rate: float = _FIRST_RATE, seed: int = 0
) -> dict[str, Any]:
    """Runs the campaign. Returns what came of it."""
    load = Load(server.address, seed)
    await load.prepare()
    samples: list[tuple[float, int, int]] = []
    every = min(_SAMPLE_SECONDS, seconds / 40)
    sampling = asyncio.create_task(sample(server, samples, every))
    rates = await load.run(seconds, rate)
    sampling.cancel()
    await asyncio.sleep(1.0)
    left = await asyncio.to_thread(server.state)
    faults = load.faults + [f"{count} left: {what}" for what, count in left.items() if count]
    faults += await is_well(load.callers[0], load.known)
    await load.close()
    memory = growth(samples, seconds)
    if memory["resident MB grown"] >= LIMIT_MB:
        faults.append(f"memory grew by {memory['resident MB grown']} MB")
    outcomes = {kind: dict(codes.most_common()) for kind, codes in sorted(load.outcomes.items())}
    return {
        "seconds": seconds,
        "arrivals a second, median": round(statistics.median(rates), 1),
        "arrivals a second, highest": round(max(rates), 1),
        "calls": sum(sum(codes.values()) for codes in load.outcomes.values()),
        "left out by the generator": load.left_out,
        "outcomes": outcomes,
        "memory": memory,
        "memory, resident MB each minute": [
            round(next((resident for at, resident, _ in samples if at >= minute), samples[-1][1]) / 1e6)
            for minute in range(0, round(seconds) + 1, 60)
        ],
        "left one second after": left,
        "faults": faults[:50],
        "number of faults": len(faults),
    }


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--kind", choices=KINDS, default="fake")
    command.add_argument("--seconds", type=float, default=600.0)
    command.add_argument(
        "--rate", type=float, default=_FIRST_RATE, help="calls a second at first (default: %(default)s)"
    )
    add_out(command, "saturation")
    options = command.parse_args()
    setup = describe()
    engine = ("--dtype", "float32", "--kv-cache-memory-bytes", str(32 << 20), "--enforce-eager", "--max-num-seqs", "64")
    with campaign_server(options.kind, engine_options=engine, seconds_per_token=0.005, max_queue=QUEUE) as server:
        say(f"{options.kind} on {server.address}")
        result = asyncio.run(run_campaign(server, options.seconds, options.rate))
    question = "Does a server that has more to do than it can grow?"
    return finish(question, setup, result, options.out, options.kind)


if __name__ == "__main__":
    sys.exit(main())
