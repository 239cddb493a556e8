"""Random requests that try to end the engine: ids, tokens and numbers at the edges of what the model can hold.

    python -m tests.loraf_serve.hostile_requests --requests 10000 --backend merged

Each request must be answered or refused, other clients must not notice, and the engine must live.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraf_serve.adapters.adapter_spec import check_adapters
from loraf_serve.backends import vocabulary
from loraf_serve.backends.backend import Backend
from loraf_serve.client import Client, ServiceError
from tests.loraf_serve.harness import Running, serving
from tests.loraf_serve.odd_models import BEYOND, ODD_CONTEXT, ODD_LETTERS, ODD_VOCAB_SIZE, make_odd_model
from tests.standins import random_checkpoint

BACKENDS = ("merged", "resident", "slots")
VLLM_OPTIONS = (
    *("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)),
    *("--enforce-eager", "--max-num-seqs", "16"),
)
REFUSALS = ("INVALID_ARGUMENT", "NOT_FOUND")
CONTROL: dict[str, Any] = {"prompt": "abcabc", "base": True, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
CLIENTS = 8  # requests at once
_STREAM_TOKENS = 100

V = ODD_VOCAB_SIZE
_HUGE = 2**32 - 1
_GOOD_IDS = (0, 1, 3, 7, V - 1)
_BAD_IDS = (V, V + 1, 63, 64, V + len(BEYOND) - 1, 400, 2**31, _HUGE)
# field → values that the model can hold, values that it cannot. Some values are valid in company only.
_NUMBERS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "max_tokens": ((1, 2, 8, _HUGE), (0,)),
    "min_tokens": ((0, 1, 2), (ODD_CONTEXT, _HUGE)),
    "temperature": ((0, 0.01, 0.5, 1, 2), (-1, 1e-9, 2.1, math.nan, math.inf)),
    "top_p": ((1e-9, 0.5, 1), (0, 1.1, math.nan)),
    "top_k": ((-1, 0, 1, V - 1, V, V + 1, 1000, 2**31 - 1), (-2, -(2**31))),
    "min_p": ((0, 0.5, 1), (-0.1, 1.1, math.nan)),
    "seed": ((0, 1, 2**63 - 1), (-1, -(2**63))),
    "repetition_penalty": ((0.01, 0.5, 1, 100), (0, -1, 101, math.nan)),
    "presence_penalty": ((-2, 0, 2), (2.1, math.inf)),
    "frequency_penalty": ((-2, 0, 2), (-2.1, -math.inf)),
    "logprobs": ((0, 1, V - 1, V), (V + 1, 20, 21, _HUGE)),
    "n": ((1, 2, 16), (0, 17, _HUGE)),
}


def random_request(source: random.Random) -> dict[str, Any]:
    """Returns arguments of `Client.generate`. A third of the requests has nothing bad in it."""
    bad = source.choice((0.0, 0.05, 0.3))  # probability that a part is bad

    def is_bad() -> bool:
        return source.random() < bad

    def some_id() -> int:
        return source.choice(_BAD_IDS if is_bad() else _GOOD_IDS)

    def text() -> str:
        pieces = [source.choice((*BEYOND, "é", "\0")) if is_bad() else source.choice(ODD_LETTERS) for _ in range(6)]
        return "".join(pieces[: source.randint(1, 6)])

    request: dict[str, Any] = {"prompt": text()}
    kind = source.choice(("prompt", "prompt", "messages", "prompt_token_ids"))
    if kind == "messages":
        roles = ("system", "user") if bad else ("user",)
        request = {"messages": [{"role": source.choice(roles), "content": text()} for _ in range(source.randint(1, 2))]}
    elif kind == "prompt_token_ids":
        request = {"prompt_token_ids": [some_id() for _ in range(source.randint(1, 5))]}
    request |= source.choice(({"base": True}, {}, {"tasks": ["a"]}, {"tasks": {"a": 0.5, "b": -1.0}}))
    for name, (good_values, bad_values) in _NUMBERS.items():
        if source.random() < 0.3:
            request[name] = source.choice(bad_values if is_bad() else good_values)
    if source.random() < 0.3:
        every_id = list(range(V))
        request["stop_token_ids"] = every_id if is_bad() else [some_id() for _ in range(source.randint(1, 4))]
    if source.random() < 0.3:
        biases = (-100, 100, 101, math.nan, math.inf) if is_bad() else (-100, -1, 0, 1, 100)
        request["logit_bias"] = {some_id(): source.choice(biases) for _ in range(source.randint(1, 4))}
    if source.random() < 0.2:
        request["stop"] = [text() for _ in range(source.randint(1, 3))]
    for name in ("ignore_eos", "skip_special_tokens"):
        if source.random() < 0.3:
            request[name] = source.random() < 0.5
    return request


@dataclass
class Result:
    """What came of a campaign.

    Attributes:
        outcomes: how many requests ended with each status; "OK" for an answer.
        faults: what must not happen, in words.
        streams: how many streams of another client ended normally meanwhile.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    streams: int = 0


def run_campaign(client: Client, count: int, seed: int) -> Result:
    """Sends `count` requests, `CLIENTS` at once, while another client streams."""
    result, over = Result(), threading.Event()
    source = random.Random(seed)

    def ask(number: int, request: dict[str, Any]) -> None:
        try:
            client.generate(**request)
        except ServiceError as error:
            result.outcomes[error.code] += 1
            if error.code not in REFUSALS:
                result.faults.append(f"request {number}: {error}: {request}")
        else:
            result.outcomes["OK"] += 1

    def stream() -> None:
        options = CONTROL | {"max_tokens": _STREAM_TOKENS}
        while not over.is_set():
            try:
                reasons = [piece.finish_reason for piece in client.stream(**options)]
            except ServiceError as error:
                result.faults.append(f"the other client's stream: {error}")
                return
            if reasons[-1] != "length":
                result.faults.append(f"the other client's stream ended with {reasons[-1]!r}")
            result.streams += 1

    before = client.generate(**CONTROL).token_ids
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        other = pool.submit(stream)
        list(pool.map(ask, range(count), (random_request(source) for _ in range(count))))
        over.set()
        other.result()
    if client.health() != "SERVING":
        result.faults.append(f"health is {client.health()}")
        return result
    after = client.generate(**CONTROL).token_ids
    if after != before:
        result.faults.append(f"the control request was answered with {before} before and {after} after")
    return result


@contextmanager
def odd_server(kind: str, folder: Path) -> Iterator[Running]:
    """A server with the odd model and a checkpoint of two tasks.

    Args:
        kind: one of BACKENDS.
        folder: an empty folder for the model and the checkpoint.
    """
    model = make_odd_model(folder / "model")
    random_checkpoint(folder / "ck", model, tasks=("a", "b"), rank=8)
    adapters = check_adapters([f"ck={folder / 'ck'}"], model)
    backend = _backend(kind, model)
    with serving(backend, adapters, warm=False, vocab_size=vocabulary.vocab_size(model)) as running:
        running.call(running.server.warm_up(), 300)
        yield running


def _backend(kind: str, model: Path) -> Backend:
    if kind == "merged":
        from loraf_serve.backends.merged import MergedBackend

        return MergedBackend(model, "float32")
    from loraf_serve.vllm.engine.backends import ResidentBackend, SlotsBackend

    return {"resident": ResidentBackend, "slots": SlotsBackend}[kind](model, VLLM_OPTIONS, 8)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a campaign. Returns 1 if anything happened that must not."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--requests", type=int, default=1000)
    command.add_argument("--backend", choices=BACKENDS, default="merged")
    command.add_argument("--seed", type=int, default=0)
    options = command.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, odd_server(options.backend, Path(folder)) as running:
        began = time.monotonic()
        result = run_campaign(running.client, options.requests, options.seed)
        seconds = time.monotonic() - began
    outcomes = ", ".join(f"{code} {count}" for code, count in result.outcomes.most_common())
    print(f"{options.requests} requests to {options.backend} in {seconds:.0f} s: {outcomes}; {result.streams} streams")
    print("\n".join(result.faults) or "no faults")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
