"""256 streams at once over several task sets: each gets what the same request gives alone, none is mixed or lost.

    python -m benchmarks.campaigns.streams --rounds 8       # about 10 minutes on two cores

Every request is asked for alone first. The prompts begin alike, and each comes with several sets and with two adapters,
so that what the prefix cache holds of one set would be noticed in the answer of another. Half of the answers are
greedy, half are sampled with a seed. Each round sends all streams at once, over eight connections, in another order.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from typing import Any

from benchmarks.campaigns.calls import Caller, Outcome, control, is_well, stream_request
from benchmarks.campaigns.questions import SELECTIONS, ask_alone, is_same, make_questions
from benchmarks.campaigns.reporting import add_out, describe, finish, say
from benchmarks.campaigns.stand import ENGINE_OPTIONS, KINDS, LookedInto, campaign_server

STREAMS = 256
CONNECTIONS = 8
LENGTHS = (48, 96)  # tokens of an answer: the first streams are not over before the last have begun
PREFIX = 140  # tokens: more than a block of vLLM's prefix cache, which is 128 on a CPU


async def run_campaign(
    server: LookedInto,
    streams: int = STREAMS,
    rounds: int = 1,
    lengths: tuple[int, int] = LENGTHS,
    prefix: int = PREFIX,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs the campaign. Returns what came of it."""
    source = random.Random(seed)
    callers = [Caller(server.address) for _ in range(CONNECTIONS)]
    requests = make_questions(streams, seed, *lengths, prefix)
    known = await callers[0].generate(control(), timeout=60)
    alone = await ask_alone(callers[0], requests)
    say(f"{streams} requests asked alone")
    outcomes: list[tuple[Outcome, Outcome]] = []
    most, seconds = 0, []
    for number in range(rounds):
        order = source.sample(range(streams), streams)
        began = time.monotonic()
        calls = [
            asyncio.ensure_future(callers[place % CONNECTIONS].stream(stream_request(requests[i]), timeout=300))
            for place, i in enumerate(order)
        ]
        while not all(call.done() for call in calls):
            most = max(most, (await asyncio.to_thread(server.state))["admission"])
            await asyncio.wait(calls, timeout=0.05)
        outcomes += [(await call, alone[i]) for call, i in zip(calls, order, strict=True)]
        seconds.append(round(time.monotonic() - began, 1))
        say(f"round {number + 1} of {rounds}: {seconds[-1]} s")
    await asyncio.sleep(1.0)
    left = await asyncio.to_thread(server.state)
    different = [(outcome, own) for outcome, own in outcomes if not is_same(outcome, own)]
    faults = [f"{got.code} {got.message} {got.text!r} instead of {own.text!r}" for got, own in different]
    faults += [f"{count} left: {what}" for what, count in left.items() if count]
    faults += await is_well(callers[0], known)
    for caller in callers:
        await caller.close()
    return {
        "streams at once": streams,
        "most in flight in the server": most,
        "rounds": rounds,
        "streams": len(outcomes),
        "task sets": len(SELECTIONS),
        "different answers alone": len({own.text for own in alone}),
        "as alone": len(outcomes) - len(different),
        "codes": dict(Counter(outcome.code for outcome, _ in outcomes)),
        "prompt tokens from the prefix cache": sum(outcome.cached for outcome, _ in outcomes),
        "seconds of each round": seconds,
        "left one second after": left,
        "faults": faults,
    }


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--kind", choices=KINDS, default="resident")
    command.add_argument("--streams", type=int, default=STREAMS)
    command.add_argument("--rounds", type=int, default=8)
    add_out(command, "streams")
    options = command.parse_args()
    setup = describe()
    engine = (*ENGINE_OPTIONS, "--max-num-seqs", "256")
    with campaign_server(options.kind, engine_options=engine) as server:
        say(f"{options.kind} on {server.address}")
        result = asyncio.run(run_campaign(server, options.streams, options.rounds))
    question = "Is any of 256 streams at once mixed with another, or lost?"
    return finish(question, setup, result, options.out, options.kind)


if __name__ == "__main__":
    sys.exit(main())
