"""Random requests that try to end the engine: ids, tokens and numbers at the edges of what the model can hold.

    python -m tests.loraf_serve.hostile_requests --requests 10000 --backend merged resident slots \\
        --json benchmarks/results/hostile-requests.json

Each request must be answered or refused, other clients must not notice, and the engine must live.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from tests.loraf_serve.odd_models import FIRST, ODD_CONTEXT, ODD_MODELS, OddModel, make_odd_model
from tests.standins import random_checkpoint

BACKENDS = ("merged", "resident", "slots")
VLLM_OPTIONS = (
    *("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)),
    *("--enforce-eager", "--max-num-seqs", "16"),
)
REFUSALS = ("INVALID_ARGUMENT", "NOT_FOUND")
CONTROL: dict[str, Any] = {
    "prompt_token_ids": [1, 0, 1],
    "base": True,
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
}
CLIENTS = 8  # requests at once
_STREAM_TOKENS = 100
_HUGE = 2**32 - 1
_EDGE = 64  # vLLM pads an embedding to a multiple of this


def _numbers(v: int) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Sampling field → values that a model with `v` tokens can hold, values that it cannot. Some of the former are
    valid in company only."""
    most = min(v, 20)
    return {
        "max_tokens": ((1, 2, 8, _HUGE), (0,)),
        "min_tokens": ((0, 1, 2), (ODD_CONTEXT, _HUGE)),
        "temperature": ((0, 0.01, 0.5, 1, 2), (-1, 1e-9, 2.1, math.nan, math.inf)),
        "top_p": ((1e-9, 0.5, 1), (0, 1.1, math.nan)),
        "top_k": ((-1, 0, 1, v - 1, v, v + 1, 1000, 2**31 - 1), (-2, -(2**31))),
        "min_p": ((0, 0.5, 1), (-0.1, 1.1, math.nan)),
        "seed": ((0, 1, 2**63 - 1), (-1, -(2**63))),
        "repetition_penalty": ((0.01, 0.5, 1, 100), (0, -1, 101, math.nan)),
        "presence_penalty": ((-2, 0, 2), (2.1, math.inf)),
        "frequency_penalty": ((-2, 0, 2), (-2.1, -math.inf)),
        "logprobs": ((0, 1, most - 1, most), (most + 1, 21, _HUGE)),
        "prompt_logprobs": ((0, 1, most), (most + 1, 21, _HUGE)),
        "priority": ((-1000, -1, 0, 1000), (-1001, 2**31 - 1, -(2**31))),
        "n": ((1, 2, 16), (0, 17, _HUGE)),
    }


FORMS: tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]] = (  # those that an engine keeps to, and others
    (
        {"regex": "[ab]+"},
        {"choice": ["a", "ab", "c"]},
        {"grammar": 'root ::= "a" root | "b"'},
        {"json_schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    ),
    (
        {"regex": "("},
        {"regex": "(?=a)b"},
        {"regex": "(a*" * 400 + ")*" * 400},
        {"choice": []},
        {"choice": ["a", "a"]},
        {"grammar": "root ::= foo"},
        {"grammar": "\0"},
        {"json_schema": "{"},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"type": "array", "minItems": 10**9}},
        {"json_schema": '{"a":' * 100 + "1" + "}" * 100},
    ),
)
BAD_WORDS = (("a", "ab", "c d"), ("", "   ", "x" * 257))
TOOLS = (({"name": "f", "parameters": {"type": "object"}},), ({"name": "f g"}, {"name": "f", "parameters": "["}))

# Arguments of `Client.generate` that are refused: the fields that the refusal names.
INVALID: tuple[tuple[dict[str, Any], str], ...] = (
    ({"regex": "a\0"}, "sampling.structured_output.regex"),
    ({"grammar": " "}, "sampling.structured_output.grammar"),
    ({"json_schema": "[]"}, "sampling.structured_output.json_schema"),
    ({"json_schema": '{"a":' * 100 + "1" + "}" * 100}, "sampling.structured_output.json_schema"),
    ({"choice": ["a", "a"]}, "sampling.structured_output.choice.texts[1]"),
    ({"prompt_logprobs": 21}, "sampling.prompt_logprobs"),
    ({"bad_words": ["a", ""]}, "sampling.bad_words[1]"),
    ({"bad_words": ["a"] * 65}, "sampling.bad_words"),
    ({"priority": 1001}, "priority"),
    ({"tools": [{"name": "f"}]}, "tools"),
)


def random_request(source: random.Random, odd: OddModel) -> dict[str, Any]:
    """Returns arguments of `Client.generate`. A third of the requests has nothing bad in it."""
    bad = source.choice((0.0, 0.05, 0.3))  # probability that a part is bad
    v = odd.vocab_size
    padded = -(-v // _EDGE) * _EDGE

    def is_bad() -> bool:
        return source.random() < bad

    def some_id() -> int:
        good_ids, bad_ids = (0, 1, v // 2, v - 1), (v, v + 1, padded - 1 + (padded == v), padded, v + 99, 2**31, _HUGE)
        return source.choice(bad_ids if is_bad() else good_ids)

    def text() -> str:
        pieces = [source.choice(odd.bad if is_bad() else odd.good) for _ in range(6)]
        return "".join(pieces[: source.randint(1, 6)])

    request: dict[str, Any] = {"prompt": text()}
    kind = source.choice(("prompt", "prompt", "messages", "prompt_token_ids"))
    if kind == "messages":
        roles = ("system", "user") if bad else ("user",)
        request = {"messages": [{"role": source.choice(roles), "content": text()} for _ in range(source.randint(1, 2))]}
    elif kind == "prompt_token_ids":
        request = {"prompt_token_ids": [some_id() for _ in range(source.randint(1, 5))]}
    request |= source.choice(({"base": True}, {}, {"tasks": ["a"]}, {"tasks": {"a": 0.5, "b": -1.0}}))
    for name, (good_values, bad_values) in _numbers(v).items():
        if source.random() < 0.3:
            request[name] = source.choice(bad_values if is_bad() else good_values)
    if source.random() < 0.3:
        request["stop_token_ids"] = list(range(v)) if is_bad() else [some_id() for _ in range(source.randint(1, 4))]
    if source.random() < 0.3:
        biases = (-100, 100, 101, math.nan, math.inf) if is_bad() else (-100, -1, 0, 1, 100)
        request["logit_bias"] = {some_id(): source.choice(biases) for _ in range(source.randint(1, 4))}
    if source.random() < 0.2:
        request["stop"] = [text() for _ in range(source.randint(1, 3))]
    if source.random() < 0.1:
        request |= source.choice(FORMS[is_bad()])
    if source.random() < 0.1:
        request["bad_words"] = [source.choice(BAD_WORDS[is_bad()]) for _ in range(source.randint(1, 3))]
    if kind == "messages" and source.random() < 0.1:
        request["tools"] = [source.choice(TOOLS[is_bad()])]
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


def run_campaign(client: Client, count: int, seed: int, odd: OddModel = ODD_MODELS[FIRST]) -> Result:
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
        list(pool.map(ask, range(count), (random_request(source, odd) for _ in range(count))))
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
def odd_server(kind: str, folder: Path, name: str = FIRST) -> Iterator[Running]:
    """A server with an odd model and a checkpoint of two tasks.

    Args:
        kind: one of BACKENDS.
        folder: an empty folder for the model and the checkpoint.
        name: of one of ODD_MODELS.
    """
    model = make_odd_model(folder / "model", name)
    random_checkpoint(folder / "ck", model, tasks=("a", "b"), rank=8)
    adapters = check_adapters([f"ck={folder / 'ck'}"], model)
    backend = _backend(kind, model)
    with serving(backend, adapters, warm=False, vocab_size=vocabulary.vocab_size(model)) as running:
        running.call(running.server.warm_up(), 600)
        yield running


def _backend(kind: str, model: Path) -> Backend:
    if kind == "merged":
        from loraf_serve.backends.merged import MergedBackend

        return MergedBackend(model, "float32")
    from loraf_serve.vllm.engine.backends import ResidentBackend, SlotsBackend

    return {"resident": ResidentBackend, "slots": SlotsBackend}[kind](model, VLLM_OPTIONS, 8)


def _campaign(kind: str, name: str, count: int, seed: int) -> dict[str, Any]:
    """Runs one campaign. Returns what came of it, as JSON has it."""
    with tempfile.TemporaryDirectory() as folder, odd_server(kind, Path(folder), name) as running:
        began = time.monotonic()
        result = run_campaign(running.client, count, seed, ODD_MODELS[name])
        seconds = time.monotonic() - began
    outcomes = dict(result.outcomes.most_common())
    print(f"{kind}, {name}: {count} requests in {seconds:.0f} s: {outcomes}; {result.streams} streams", flush=True)
    print("\n".join(result.faults) or "no faults", flush=True)
    return {
        "requests": count,
        "outcomes": outcomes,
        "faults": result.faults,
        "streams of another client": result.streams,
        "seconds": round(seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaigns. Returns 1 if anything happened that must not."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--requests", type=int, default=1000, help="in all, for each backend (default: 1000)")
    command.add_argument("--backend", choices=BACKENDS, nargs="+", default=["merged"])
    command.add_argument("--model", choices=ODD_MODELS, nargs="+", default=list(ODD_MODELS), help="(default: all)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", type=Path, help="file to add the results to")
    options = command.parse_args(argv)
    faults = 0
    for kind, name in itertools.product(options.backend, options.model):
        result = _campaign(kind, name, -(-options.requests // len(options.model)), options.seed)
        faults += len(result["faults"])
        if options.json:
            _store(options.json, kind, name, {"seed": options.seed, **_setup(), **result})
    return 1 if faults else 0


def _setup() -> dict[str, Any]:
    import transformers
    import vllm

    from benchmarks import measuring

    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    return {"machine": measuring.machine(), "commit": measuring.commit(), **versions}


def _store(file: Path, kind: str, name: str, result: dict[str, Any]) -> None:
    stored = json.loads(file.read_text()) if file.exists() else {"question": "Can a request end the engine?"}
    stored.setdefault(kind, {})[name] = result
    file.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
