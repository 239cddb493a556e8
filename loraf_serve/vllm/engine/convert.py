"""Converts requests and outputs between the service's types and vLLM's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from loraf.errors import LorafError, Problem
from loraf_serve.backends.backend import ChoiceDelta, Output, PositionLogprobs, Sampling, TokenLogprob


def sampling_params(sampling: Sampling) -> SamplingParams:
    """Returns vLLM's parameters. Every field of `Sampling` has a counterpart."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.logprobs,
        n=sampling.n,
        ignore_eos=sampling.ignore_eos,
        skip_special_tokens=sampling.skip_special_tokens,
        output_kind=RequestOutputKind.DELTA,
    )


def request_error(error: Exception) -> LorafError:
    """Converts vLLM's error about a request, with the field's name if it is one of `Sampling`'s."""
    parameter = getattr(error, "parameter", None)
    known = parameter in {field.name for field in dataclasses.fields(Sampling)}
    message = str(error.args[0]) if error.args else str(error)
    return LorafError(Problem(message, f"sampling.{parameter}" if known else ""))


def output(request_output: RequestOutput, logprobs: int | None) -> Output:
    """Converts the increment since vLLM's last output.

    Args:
        logprobs: `Sampling.logprobs`.
    """
    choices = tuple(_choice(completion, logprobs) for completion in request_output.outputs)
    return Output(choices, request_output.num_cached_tokens or 0)


def _choice(completion: CompletionOutput, count: int | None) -> ChoiceDelta:
    token_ids = tuple(completion.token_ids)
    logprobs: tuple[PositionLogprobs, ...] = ()
    if count is not None and completion.logprobs:
        positions = zip(token_ids, completion.logprobs, strict=True)
        logprobs = tuple(_position(token_id, entries, count) for token_id, entries in positions if entries is not None)
    return ChoiceDelta(
        index=completion.index,
        text=completion.text,
        token_ids=token_ids,
        finish_reason=completion.finish_reason,
        stop_reason="" if completion.stop_reason is None else str(completion.stop_reason),
        logprobs=logprobs,
    )


def _position(chosen: int, entries: Mapping[int, Logprob], count: int) -> PositionLogprobs:
    """Converts the log-probabilities at one position of the output.

    Args:
        chosen: the sampled token.
        entries: of the `count` most likely tokens (-1 for all), and of the sampled token even if it is not among them.
    """
    converted = {
        token_id: TokenLogprob(token_id, entry.logprob, entry.rank or 0, entry.decoded_token or "")
        for token_id, entry in entries.items()
    }
    ranked = sorted(converted.values(), key=lambda entry: entry.rank)
    return PositionLogprobs(converted[chosen], tuple(ranked if count < 0 else ranked[:count]))
