"""Converts requests and outputs between the service's types and vLLM's."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from loraf.errors import LorafError, Problem
from loraf_serve.backends.backend import (
    ChoiceDelta,
    GenerationRequest,
    Output,
    PositionLogprobs,
    Sampling,
    TokenLogprob,
)
from loraf_serve.backends.detokenize import CONTEXT, token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.config import VllmConfig


_POSITIONS_AT_ONCE = 64  # with log-probabilities; then the loop gets a turn
_PROMPT_LOGITS = 1 << 27  # log-probabilities of a prompt that a worker computes at once, at about 10 bytes each


class _FormIsChecked(SamplingParams):
    """Parameters whose form has been checked. vLLM would check it on the service's loop, for as long as it takes."""

    def _validate_structured_outputs(self, *_: object) -> None:
        pass


def sampling_params(sampling: Sampling, form: tuple[str, str] | None = None) -> SamplingParams:
    """Returns vLLM's parameters. Every field of `Sampling` has a counterpart.

    Args:
        form: `Sampling.structured_output` as `FormChecker.check` returned it.
    """
    assert (form is None) == (sampling.structured_output is None)
    return _FormIsChecked(
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
        structured_outputs=None if form is None else _structured_outputs(*form),
        prompt_logprobs=sampling.prompt_logprobs,
        bad_words=list(sampling.bad_words),
        output_kind=RequestOutputKind.DELTA,
    )


def with_checked_form(params: SamplingParams, form: tuple[str, str] | None) -> SamplingParams:
    """Parameters that vLLM's own app has made, with a form of the answer that has been checked.

    Args:
        form: as `FormChecker.check` returned it; None for an answer of any form.
    """
    if form is None:
        params.structured_outputs = None
        return params
    checked: SamplingParams = _FormIsChecked.__new__(_FormIsChecked)
    for name in SamplingParams.__struct_fields__:
        setattr(checked, name, getattr(params, name))
    checked.structured_outputs = _structured_outputs(*form)
    return checked


def _structured_outputs(kind: str, value: str) -> StructuredOutputsParams:
    params = StructuredOutputsParams(
        regex=value if kind == "regex" else None,
        grammar=value if kind in ("ebnf", "lark") else None,  # a JSON schema comes as one
        structural_tag=value if kind == "structural_tag" else None,
    )
    params._backend = "xgrammar"  # as vLLM's own check would set it
    return params


def request_error(error: Exception) -> LorafError:
    """Converts vLLM's error about a request, with the field's name if it is one of `Sampling`'s."""
    parameter = getattr(error, "parameter", None)
    known = parameter in {field.name for field in dataclasses.fields(Sampling)}
    message = str(error.args[0]) if error.args else str(error)
    return LorafError(Problem(message, f"sampling.{parameter}" if known else ""))


def require_room_for_prompt_logprobs(config: VllmConfig, request: GenerationRequest) -> None:
    """Checks the memory that a worker needs for log-probabilities of a prompt, which vLLM does not account for.

    Raises:
        LorafError: they would take more memory than a worker can be relied on to have.
    """
    if request.sampling.prompt_logprobs is None:
        return
    vocab_size, step = config.model_config.get_vocab_size(), config.scheduler_config.max_num_batched_tokens
    most = _PROMPT_LOGITS // vocab_size
    tokens = len(request.prompt_token_ids)
    if min(tokens, step) > most:
        message = f"{tokens} tokens are too many: {most} at once fit with a vocabulary of {vocab_size}"
        remedy = f"send a shorter prompt, or serve with --max-num-batched-tokens {most} or fewer"
        raise LorafError(Problem(message, "sampling.prompt_logprobs", remedy=remedy))


def failed_within_engine(sampling: Sampling) -> Exception:
    """The error of a request that vLLM's engine core ended as failed."""
    if sampling.structured_output is None:
        return RuntimeError("vLLM ended the request as failed")
    field = f"sampling.structured_output.{sampling.structured_output.kind}"
    message = "the answer cannot keep to it with these sampling fields, or keeping to it takes too much time"
    remedy = "simplify the form; leave bad_words and logit_bias out"
    return LorafError(Problem(message, field, remedy=remedy))


class Converter:
    """Converts the outputs of one request, in their order.

    Args:
        tokenizer: of the model.
        logprobs, prompt_logprobs: as in `Sampling`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, logprobs: int | None, prompt_logprobs: int | None = None):
        self._tokenizer = tokenizer
        self._count = logprobs
        self._prompt_count = prompt_logprobs
        self._answers: defaultdict[int, list[int]] = defaultdict(list)  # index → tokens so far

    async def outputs(self, request_output: RequestOutput) -> AsyncGenerator[Output]:
        """Converts the increment since vLLM's last output. With log-probabilities each answer comes alone, and the loop
        gets turns: a reader that was late finds many tokens in one increment."""
        cached = request_output.num_cached_tokens or 0
        prompt_logprobs = await self._prompt_logprobs(request_output)
        if self._count is None:
            choices = tuple(self._choice(completion, ()) for completion in request_output.outputs)
            yield Output(choices, cached, prompt_logprobs)
            return
        for completion in request_output.outputs:
            logprobs = await self._logprobs(completion, self._count)
            yield Output((self._choice(completion, logprobs),), cached, prompt_logprobs)
            prompt_logprobs = ()

    async def _prompt_logprobs(self, request_output: RequestOutput) -> tuple[PositionLogprobs | None, ...]:
        """The log-probabilities of the prompt, the first time that vLLM has them; () otherwise."""
        rows = request_output.prompt_logprobs
        if self._prompt_count is None or not rows:
            return ()
        count, self._prompt_count = self._prompt_count, None  # each of the `n` answers brings them
        prompt = list(request_output.prompt_token_ids or ())
        positions: list[PositionLogprobs | None] = []
        for i, (token, row) in enumerate(zip(prompt, rows, strict=True)):
            before = prompt[max(0, i - CONTEXT) : i]
            positions.append(None if row is None else self._position(before, token, row, count))
            if i % _POSITIONS_AT_ONCE == 0:
                await asyncio.sleep(0)  # a long prompt has many
        return tuple(positions)

    async def _logprobs(self, completion: CompletionOutput, count: int) -> tuple[PositionLogprobs, ...]:
        """The log-probabilities of an answer's new tokens."""
        before, new = self._answers[completion.index], list(completion.token_ids)
        answer = [*before, *new]
        positions = []
        for i, (token_id, entries) in enumerate(zip(new, completion.logprobs or (), strict=bool(completion.logprobs))):
            place = len(before) + i
            if entries is not None:
                positions.append(self._position(answer[max(0, place - CONTEXT) : place], token_id, entries, count))
            if i % _POSITIONS_AT_ONCE == _POSITIONS_AT_ONCE - 1:
                await asyncio.sleep(0)
        self._answers[completion.index] = answer[-CONTEXT:]
        return tuple(positions)

    def _choice(self, completion: CompletionOutput, logprobs: tuple[PositionLogprobs, ...]) -> ChoiceDelta:
        return ChoiceDelta(
            index=completion.index,
            text=completion.text,
            token_ids=tuple(completion.token_ids),
            finish_reason=completion.finish_reason,
            stop_reason="" if completion.stop_reason is None else str(completion.stop_reason),
            logprobs=logprobs,
        )

    def _position(self, before: list[int], chosen: int, entries: Mapping[int, Logprob], count: int) -> PositionLogprobs:
        """Converts the log-probabilities at one position.

        Args:
            before: the last tokens before it, at least CONTEXT or all.
            chosen: the sampled token, or that of the prompt.
            entries: of the most likely tokens, as many as requested (-1 for all), and of `chosen` even if it
                is not among them.
            count: how many of the most likely tokens were requested, -1 for all.
        """
        converted = {
            token_id: TokenLogprob(
                token_id, entry.logprob, entry.rank or 0, token_text(self._tokenizer, before, token_id)
            )
            for token_id, entry in entries.items()
        }
        ranked = sorted(converted.values(), key=lambda entry: entry.rank)
        return PositionLogprobs(converted[chosen], tuple(ranked if count < 0 else ranked[:count]))
