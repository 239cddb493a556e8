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
from loraf_serve.limits import (
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_BAD_WORDS_TOKENS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from loraf_serve.request import structured_output
from loraf_serve.v1 import generation_pb2 as pb

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
    "prompt_logprobs": (lambda v: v <= MAX_LOGPROBS, f"at most {MAX_LOGPROBS}"),
    "n": (lambda v: 1 <= v <= MAX_N, f"from 1 to {MAX_N}"),
}
_SCALARS = (*_RANGES, "min_tokens", "ignore_eos", "skip_special_tokens")

Tokenize = Callable[[str], list[list[int]]]


def read(
    params: pb.SamplingParams,
    vocab_size: int,
    end_tokens: Collection[int] = (),
    bad_word_tokens: Tokenize = lambda _: [],
) -> Sampling:
    """Fills in the defaults and checks every field.

    Args:
        vocab_size: number of token ids that the model can hold. `top_k` counts as off if it keeps them all.
        end_tokens: the model's own; min_tokens excludes them and the stop tokens.
        bad_word_tokens: `loraf_serve.backends.bad_words.token_sequences`, with the model's tokenizer.

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
    for name in ("logprobs", "prompt_logprobs"):
        if vocab_size < scalars.get(name, 0) <= MAX_LOGPROBS:
            message = f"{scalars[name]} is more than the model's {vocab_size} tokens"
            check(False, name, message, f"use at most {vocab_size}")
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

    form = structured_output.read(params.structured_output, problems) if params.HasField("structured_output") else None
    result = Sampling(
        **scalars,
        stop=stop,
        stop_token_ids=stop_ids,
        logit_bias=bias,
        structured_output=form,
        bad_words=tuple(dict.fromkeys(params.bad_words)),
    )
    ends = {*stop_ids, *end_tokens} if result.min_tokens else set()
    problems += _bad_words(params, vocab_size, ends, bad_word_tokens)
    if params.HasField("structured_output"):
        remedy = "leave it out, or structured_output"
        check(not result.min_tokens, "min_tokens", "the form of the answer says when it may end", remedy)
        message = "the form of the answer says when it ends"
        check(not result.ignore_eos, "ignore_eos", message, remedy)
        message, remedy = "the model has no end token, which would end the answer", "serve a model that has one"
        check(bool(end_tokens), "structured_output", message, remedy)
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


def _bad_words(params: pb.SamplingParams, vocab_size: int, ends: Collection[int], tokens: Tokenize) -> list[Problem]:
    """The problems with bad_words.

    Args:
        ends: tokens that min_tokens excludes beside them.
    """
    field = "sampling.bad_words"
    words = params.bad_words
    if len(words) > MAX_BAD_WORDS:
        return [Problem(f"has {len(words)} texts", field, remedy=f"use at most {MAX_BAD_WORDS}")]
    problems = []
    sequences: list[list[int]] = []
    for i, word in enumerate(words):
        where = f"{field}[{i}]"
        if not 0 < len(word) <= MAX_BAD_WORD_LENGTH:
            problems.append(Problem(f"has {len(word)} characters", where, remedy=f"use 1 to {MAX_BAD_WORD_LENGTH}"))
            continue
        spellings = tokens(word)
        unknown = next((token for sequence in spellings for token in sequence if not 0 <= token < vocab_size), None)
        if not spellings:
            problems.append(Problem("has no tokens", where, remedy="leave it out"))
        elif unknown is not None:
            message = f"has a token (id {unknown}) that the model does not have: its vocabulary has {vocab_size} tokens"
            problems.append(Problem(message, where, remedy="leave it out"))
        sequences += spellings
    count = sum(map(len, sequences))
    if count > MAX_BAD_WORDS_TOKENS:
        problems.append(Problem(f"has {count} tokens", field, remedy=f"use at most {MAX_BAD_WORDS_TOKENS}"))
    if words and len({sequence[-1] for sequence in sequences}.union(ends)) >= vocab_size:
        problems.append(Problem(f"can exclude all {vocab_size} tokens", field, remedy="name fewer"))
    return problems
