"""Validates SamplingParams: vLLM's defaults for unset fields, and limits that hold for every backend.

Where vLLM has a range, it is used here, so that a value that passes is neither refused nor silently changed there.
Other limits prevent overflow, or requests that cost the server too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from loraf.errors import Problem
from loraf_serve.backends.backend import Sampling
from loraf_serve.errors import InvalidRequest
from loraf_serve.v1 import generation_pb2 as pb

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
# Below this, other than 0, vLLM raises the temperature to it with a warning (float16 logits would overflow).
MIN_TEMPERATURE = 0.01

# field → (test, description of the range)
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_tokens": (lambda v: v >= 1, "at least 1"),
    "temperature": (lambda v: v == 0 or MIN_TEMPERATURE <= v <= 2, f"0 (greedy), or from {MIN_TEMPERATURE} to 2"),
    "top_p": (lambda v: 0 < v <= 1, "greater than 0, at most 1"),
    "top_k": (lambda v: v >= -1, "0 or -1 (off), or at least 1"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "seed": (lambda v: v >= 0, "at least 0"),
    "repetition_penalty": (lambda v: 0.01 <= v <= 100, "from 0.01 to 100"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
    "logprobs": (lambda v: v <= MAX_LOGPROBS, f"at most {MAX_LOGPROBS}"),
    "n": (lambda v: 1 <= v <= MAX_N, f"from 1 to {MAX_N}"),
}
_SCALARS = (*_RANGES, "min_tokens", "ignore_eos", "skip_special_tokens")


def read(params: pb.SamplingParams, vocab_size: int, end_tokens: Collection[int] = ()) -> Sampling:
    """Fills in the defaults and checks every field.

    Args:
        vocab_size: number of token ids that the model can hold. `top_k` counts as off if it keeps them all.
        end_tokens: the model's own; min_tokens excludes them and the stop tokens.

    Raises:
        InvalidRequest: every violation; fields are named like `sampling.top_p`.
    """
    problems: list[Problem] = []

    def check(holds: bool, field: str, message: str, remedy: str) -> None:
        if not holds:
            problems.append(Problem(message, f"sampling.{field}", remedy=remedy))

    scalars = {name: getattr(params, name) for name in _SCALARS if params.HasField(name)}
    for name, (in_range, allowed) in _RANGES.items():
        if name in scalars:
            # nan is in no range: each of its comparisons is false
            check(in_range(scalars[name]), name, f"{scalars[name]:g} is out of range", f"use a value {allowed}")
    if vocab_size < scalars.get("logprobs", 0) <= MAX_LOGPROBS:
        message = f"{scalars['logprobs']} is more than the model's {vocab_size} tokens"
        check(False, "logprobs", message, f"use at most {vocab_size}")
    if scalars.get("top_k", 0) == -1 or scalars.get("top_k", 0) >= vocab_size:
        scalars["top_k"] = 0
    stop = tuple(dict.fromkeys(params.stop))
    check(len(stop) <= MAX_STOPS, "stop", f"has {len(stop)} texts", f"use at most {MAX_STOPS}")
    for i, text in enumerate(params.stop[:MAX_STOPS]):
        holds = 0 < len(text) <= MAX_STOP_LENGTH
        check(holds, f"stop[{i}]", f"has {len(text)} characters", f"use 1 to {MAX_STOP_LENGTH}")

    in_vocabulary = f"use ids from 0 to {vocab_size - 1}"
    stop_ids = tuple(dict.fromkeys(params.stop_token_ids))
    message, remedy = f"has {len(stop_ids)} ids", f"use at most {MAX_STOP_TOKEN_IDS}"
    check(len(stop_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", message, remedy)
    for i, token in enumerate(params.stop_token_ids[:MAX_STOP_TOKEN_IDS]):
        check(token < vocab_size, f"stop_token_ids[{i}]", f"{token} is not in the vocabulary", in_vocabulary)

    message, remedy = f"has {len(params.logit_bias)} entries", f"use at most {MAX_LOGIT_BIASES}"
    check(len(params.logit_bias) <= MAX_LOGIT_BIASES, "logit_bias", message, remedy)
    bias = dict(sorted(params.logit_bias.items())[:MAX_LOGIT_BIASES])
    for token, value in bias.items():
        check(token < vocab_size, f"logit_bias[{token}]", "is not in the vocabulary", in_vocabulary)
        holds = math.isfinite(value) and abs(value) <= 100
        check(holds, f"logit_bias[{token}]", f"{value:g} is out of range", "use a value from -100 to 100")

    result = Sampling(**scalars, stop=stop, stop_token_ids=stop_ids, logit_bias=bias)
    allowed = f"use at most max_tokens, which is {result.max_tokens}"
    check(result.min_tokens <= result.max_tokens, "min_tokens", f"{result.min_tokens} is out of range", allowed)
    if result.min_tokens and len({*stop_ids, *end_tokens}) >= vocab_size:
        message = f"with min_tokens they and the model's end tokens exclude all {vocab_size} tokens"
        check(False, "stop_token_ids", message, "name fewer, or leave min_tokens out")
    message, remedy = "greedy answers to the same prompt are all equal", "use n = 1, or a temperature above 0"
    check(result.temperature != 0 or result.n == 1, "n", message, remedy)
    if problems:
        raise InvalidRequest(problems)
    return result
