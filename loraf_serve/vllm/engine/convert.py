"""Converts requests and outputs between the service's types and vLLM's."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from loraf.errors import LorafError, Problem
from loraf_serve.backends.backend import ChoiceDelta, Output, PositionLogprobs, Sampling, TokenLogprob
from loraf_serve.backends.detokenize import CONTEXT, token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


class Converter:
    """Converts the outputs of one request, in their order.

    Args:
        tokenizer: of the model.
        logprobs: `Sampling.logprobs`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, logprobs: int | None):
        self._tokenizer = tokenizer
        self._count = logprobs
        self._answers: defaultdict[int, list[int]] = defaultdict(list)  # index → tokens so far

    def output(self, request_output: RequestOutput) -> Output:
        """Converts the increment since vLLM's last output."""
        choices = tuple(self._choice(completion) for completion in request_output.outputs)
        return Output(choices, request_output.num_cached_tokens or 0)

    def _choice(self, completion: CompletionOutput) -> ChoiceDelta:
        token_ids = tuple(completion.token_ids)
        logprobs: tuple[PositionLogprobs, ...] = ()
        if self._count is not None and completion.logprobs:
            before = self._answers[completion.index]
            positions = zip(token_ids, completion.logprobs, strict=True)
            logprobs = tuple(
                self._position([*before, *token_ids[:n]], token_id, entries)
                for n, (token_id, entries) in enumerate(positions)
                if entries is not None
            )
            before += token_ids
            del before[:-CONTEXT]
        return ChoiceDelta(
            index=completion.index,
            text=completion.text,
            token_ids=token_ids,
            finish_reason=completion.finish_reason,
            stop_reason="" if completion.stop_reason is None else str(completion.stop_reason),
            logprobs=logprobs,
        )

    def _position(self, before: list[int], chosen: int, entries: Mapping[int, Logprob]) -> PositionLogprobs:
        """Converts the log-probabilities at one position of the output.

        Args:
            before: the last tokens before it, at least CONTEXT or all.
            chosen: the sampled token.
            entries: of the most likely tokens, as many as requested (-1 for all), and of the sampled token even if it
                is not among them.
        """
        assert self._count is not None
        converted = {
            token_id: TokenLogprob(
                token_id, entry.logprob, entry.rank or 0, token_text(self._tokenizer, before, token_id)
            )
            for token_id, entry in entries.items()
        }
        ranked = sorted(converted.values(), key=lambda entry: entry.rank)
        return PositionLogprobs(converted[chosen], tuple(ranked if self._count < 0 else ranked[: self._count]))
