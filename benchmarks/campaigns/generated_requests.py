"""100,000 generated requests: each valid one is answered, each invalid one is refused with its code and its field.

    python -m benchmarks.campaigns.generated_requests                                   # on the fake backend
    python -m benchmarks.campaigns.generated_requests --kind resident --requests 5000 --connections 500

Hypothesis makes requests from the protocol's messages: every field, every way to select a set, forms of answers, tools,
bad words, log-probabilities, priorities. Half of them get one to three of the mistakes that are listed in
tests/loraf_serve/invalid_requests.py. Beside them come connections whose HTTP/2 is broken or hostile: every one of
attacks.py in turn, and the bytes of a valid call with a few changed. Meanwhile another client streams and must notice
nothing. No call may end with UNKNOWN, or with INTERNAL by the service (gRPC's core itself says INTERNAL of headers that
it cannot read), and after each hundred the server serves and answers as before.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import grpc
import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.campaigns.attacks import ATTACKS, damaged, valid_bytes
from benchmarks.campaigns.calls import NEVER, Caller, control, is_well, stream_request
from benchmarks.campaigns.frames import Connection
from benchmarks.campaigns.reporting import add_out, describe, finish, say
from benchmarks.campaigns.stand import ENGINE_OPTIONS, CampaignServer, campaign_server
from benchmarks.campaigns.strategies import ADAPTER_REQUESTS, Asked, requests

AT_ONCE = 32
_CHECK_EVERY = 100  # requests, or damaged connections
_ADAPTER_EVERY = 25  # requests
_PART = 2000  # requests that hypothesis makes in one run
_INTERNAL, _UNKNOWN = "13", "2"


class Campaign:
    """Sends requests on a loop of its own, in a thread, while hypothesis makes them.

    Attributes:
        outcomes: code → how many requests; `statuses`: the same of the raw connections.
        faults: what must not happen, in words.
    """

    def __init__(self, server: CampaignServer):
        self._server = server
        self.outcomes: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.fields: set[str] = set()
        self.mistakes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.streams = 0
        self.sent = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._places = threading.Semaphore(AT_ONCE)
        self._callers = self._run(self._connect())
        self._known = self._run(self._callers[0].generate(control(), timeout=60))
        self._over = False
        self._neighbour = asyncio.run_coroutine_threadsafe(self._stream(), self._loop)

    async def _connect(self) -> list[Caller]:
        return [Caller(self._server.address) for _ in range(4)]

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(300)

    async def _stream(self) -> None:
        """Another client, which must notice nothing."""
        caller = Caller(self._server.address)
        request = stream_request(control())
        while not self._over:
            outcome = await caller.stream(request, timeout=60)
            self.streams += 1
            if (outcome.code, outcome.token_ids) != ("OK", self._known.token_ids):
                self.faults.append(f"the other client: {outcome.code} {outcome.message} {outcome.token_ids}")
            await asyncio.sleep(0.1)
        await caller.close()

    def _submit(self, coroutine: Any) -> None:
        self._places.acquire()
        self.sent += 1

        def done(future: Future[None]) -> None:
            self._places.release()
            if error := future.exception():
                self.faults.append(f"the campaign itself failed: {error!r}")

        asyncio.run_coroutine_threadsafe(coroutine, self._loop).add_done_callback(done)
        if self.sent % _CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Whether the server is well."""
        faults = self._run(is_well(self._callers[0], self._known))
        self.faults += [f"after {self.sent} requests: {fault}" for fault in faults]

    def ask(self, asked: Asked) -> None:
        """Sends a request as soon as there is room."""
        self._submit(self._ask(asked, self._callers[self.sent % len(self._callers)]))

    async def _ask(self, asked: Asked, caller: Caller) -> None:
        if asked.streams:
            outcome = await caller.stream(stream_request(asked.request), timeout=120)
        else:
            outcome = await caller.generate(asked.request, timeout=120)
        self.outcomes[outcome.code] += 1
        self.mistakes.update(mistake.name for mistake in asked.mistakes)
        self.fields.update(outcome.fields)
        names = set(outcome.fields) or {outcome.message.partition(": ")[0]}
        right = outcome.code == asked.code
        if asked.code == "OK":
            right = right and outcome.finished
        elif asked.code == "INVALID_ARGUMENT":
            right = right and bool(names) and names <= asked.fields
        else:
            right = right and outcome.message.startswith(tuple(asked.fields))
        if not right or outcome.code in NEVER:
            wanted = f"{asked.code} {sorted(asked.fields)}"
            got = f"{outcome.code} {outcome.message} {outcome.fields}"
            mistakes = [mistake.name for mistake in asked.mistakes]
            self.faults.append(f"{got} instead of {wanted}; {mistakes}: {str(asked.request)[:600]}")

    def ask_adapters(self, stub: str, request: Any) -> None:
        """Calls a method of AdapterService."""
        self._submit(self._ask_adapters(stub, request, self._callers[self.sent % len(self._callers)]))

    async def _ask_adapters(self, stub: str, request: Any, caller: Caller) -> None:
        outcome = await caller.call(stub, request, timeout=60)
        self.outcomes[outcome.code] += 1
        if outcome.code != "OK":
            self.faults.append(f"{stub}: {outcome.code} {outcome.message}")

    def attack(self, name: str) -> None:
        """Makes one of the attacks, and looks whether the server is well."""
        connection = Connection(self._server.address)
        try:
            ATTACKS[name](connection, control().SerializeToString())
        except Exception as error:  # our own state machine may refuse what was sent or came back
            self.statuses[f"not sent: {type(error).__name__}"] += 1
        finally:
            connection.close()
        self._note(name, connection)
        self.check()

    def damage(self, number: int, data: bytes, source: random.Random) -> None:
        """Sends the bytes of a valid call with a few changed."""
        connection = Connection(self._server.address)
        connection.send(damaged(data, source))
        deadline = time.monotonic() + 0.05
        while not connection.closed and time.monotonic() < deadline:
            connection.receive(deadline - time.monotonic())
        connection.close()
        self._note(f"damaged bytes {number}", connection)
        if number % _CHECK_EVERY == 0:
            self.check()

    def _note(self, name: str, connection: Connection) -> None:
        statuses = connection.statuses()
        gone = connection.closed or connection.going_away
        names = [grpc_name(status.code) + ("" if status.by_service else ", by gRPC's core") for status in statuses]
        self.statuses.update(names or ["connection ended" if gone else "no status"])
        for status in statuses:
            # gRPC's core says INTERNAL of headers and compression that it cannot read.
            if status.code == _UNKNOWN or (status.code == _INTERNAL and status.by_service):
                self.faults.append(f"{name}: {grpc_name(status.code)} {status.message}")

    def finish(self) -> None:
        """Waits for everything that is under way."""
        for _ in range(AT_ONCE):
            self._places.acquire()
        self._over = True
        self._neighbour.result(120)
        self.check()

        async def close() -> None:
            for caller in self._callers:
                await caller.close()

        self._run(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def grpc_name(code: str) -> str:
    """The name of a status by its number."""
    return next((status.name for status in grpc.StatusCode if str(status.value[0]) == code), code)


def send_generated(campaign: Campaign, count: int, seed: int) -> None:
    """Lets hypothesis make so many requests and sends them."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(asked=requests(), adapters=ADAPTER_REQUESTS)
    def send(asked: Asked, adapters: tuple[str, Any]) -> None:
        campaign.ask(asked)
        if campaign.sent % _ADAPTER_EVERY == 0:
            campaign.ask_adapters(*adapters)

    send()


def run_campaign(
    server: CampaignServer, count: int, connections: int, seed: int = 0, minutes: float = math.inf
) -> dict[str, Any]:
    """Runs the campaign. Returns what came of it.

    Args:
        minutes: after which no more requests are generated.
    """
    campaign = Campaign(server)
    began = time.monotonic()
    # Hypothesis remembers what it has made, so that one long run of it would need much memory.
    for start in range(0, count, _PART):
        send_generated(campaign, min(_PART, count - start), seed + start)
        sent, seconds = campaign.sent, time.monotonic() - began
        say(f"{sent} requests in {seconds:.0f} s, {len(campaign.faults)} faults")
        if seconds > 60 * minutes:
            break
    source = random.Random(seed)
    attacks = source.sample(list(ATTACKS), min(connections, len(ATTACKS)))
    for name in attacks:
        campaign.attack(name)
    body = control().SerializeToString()
    data = valid_bytes(body)
    for number in range(max(0, connections - len(attacks))):
        campaign.damage(number, data, source)
    campaign.finish()
    time.sleep(1.0)
    left = server.state()
    campaign.faults += [f"{number} left: {what}" for what, number in left.items() if number]
    return {
        "requests": sent,
        "outcomes": dict(campaign.outcomes.most_common()),
        "kinds of mistakes": len(campaign.mistakes),
        "fewest requests with one kind": min(campaign.mistakes.values(), default=0),
        "fields named": len(campaign.fields),
        "connections": connections,
        "kinds of attacks": len(attacks),
        "ends of calls on connections made by hand": dict(campaign.statuses.most_common()),
        "streams of another client": campaign.streams,
        "seconds": round(time.monotonic() - began, 1),
        "left after the last": left,
        "faults": campaign.faults[:50],
        "number of faults": len(campaign.faults),
    }


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # merged keeps to no form of an answer, and has no priorities.
    command.add_argument("--kind", choices=("fake", "resident"), default="fake")
    command.add_argument("--requests", type=int, default=96_000)
    command.add_argument("--connections", type=int, default=4_000)
    command.add_argument("--minutes", type=float, default=math.inf, help="ends the generated requests (default: never)")
    command.add_argument("--seed", type=int, default=0)
    add_out(command, "generated-requests")
    options = command.parse_args()
    setup = describe() | {"seed": options.seed}
    with campaign_server(options.kind, engine_options=(*ENGINE_OPTIONS, "--max-num-seqs", "32")) as server:
        say(f"{options.kind} on {server.address}")
        result = run_campaign(server, options.requests, options.connections, options.seed, options.minutes)
    question = "Is every valid request answered, and every invalid one refused with its code and field?"
    return finish(question, setup, result, options.out, options.kind)


if __name__ == "__main__":
    sys.exit(main())
