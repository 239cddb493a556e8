"""The engine as vLLM's app sees it: a request goes through the backend, which gives it its task set."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from loraf.errors import LorafError, Problem
from loraf_serve.backends.backend import GenerationRequest, StructuredOutput
from loraf_serve.backends.detokenize import CONTEXT, token_text
from loraf_serve.vllm.engine import convert
from loraf_serve.vllm.http.admitted import ADMITTED, Admitted

if TYPE_CHECKING:
    from loraf_serve.vllm.engine.vllm_backend import VllmBackend

_POSITIONS_AT_ONCE = 64  # whose texts are made; then the loop gets a turn


class EngineForApp:
    """What vLLM's serving classes use of an engine, and nothing more: no method that loads, sleeps or resets.

    Args:
        backend: started.
    """

    def __init__(self, backend: VllmBackend):
        self._backend = backend
        engine = backend.engine
        self.vllm_config = engine.vllm_config
        self.model_config = engine.model_config
        self.renderer = engine.renderer
        self.input_processor = engine.input_processor

    @property
    def errored(self) -> bool:
        """Whether the engine has died. The app asks before it renders a prompt."""
        return self._backend.engine.errored

    @property
    def dead_error(self) -> BaseException:
        """What the app raises then."""
        return self._backend.engine.dead_error

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """The service has admitted the request."""

    async def is_tracing_enabled(self) -> bool:
        """The service has its own traces."""
        return False

    async def abort(self, request_id: object) -> None:
        """A request is aborted by closing its iterator."""

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **_: object,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates the answers to one prompt of the admitted request.

        Args:
            prompt: one of `Admitted.inputs`.
            sampling_params: made by the app from fields that the service has checked.
            reasoning_ended, reasoning_parser_kwargs: the app's, for models that reason.

        Adapter, set and priority are those of the admitted request, whatever the app says.

        Raises:
            Exception: the request has failed; `Admitted.error` says why.
        """
        admitted = ADMITTED.get()
        place = next(i for i, given in enumerate(admitted.inputs) if given is prompt)
        reasoning = {"reasoning_ended": reasoning_ended, "reasoning_parser_kwargs": reasoning_parser_kwargs}
        try:
            answers = self._answers(admitted, place, prompt, sampling_params, reasoning)
            async with aclosing(admitted.running(answers)) as outputs:
                async for output in outputs:
                    yield output
        except Exception as error:
            raise admitted.failed(error) from None

    async def _answers(
        self, admitted: Admitted, place: int, prompt: Any, params: SamplingParams, reasoning: Mapping[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        request = admitted.requests[place]
        streams = params.output_kind is RequestOutputKind.DELTA
        params = await self._checked(params, request, admitted.form)
        texts = _Texts(self._backend.tokenizer, request.prompt_token_ids)
        whole: RequestOutput | None = None
        async with aclosing(self._backend.outputs(request, prompt, params, **reasoning)) as outputs:
            async for output in outputs:
                await texts.add(output)
                text = "".join(choice.text for choice in output.outputs if choice.index == 0)
                count = sum(len(choice.token_ids) for choice in output.outputs)
                admitted.tokens(place, count, output.num_cached_tokens or 0, text)
                if streams:
                    yield output
                elif whole is None:
                    whole = output
                else:
                    whole.add(output, aggregate=True)
        if whole is not None:
            whole.outputs.sort(key=lambda choice: choice.index)
            yield whole

    async def _checked(
        self, params: SamplingParams, request: GenerationRequest, form: tuple[str, str] | None
    ) -> SamplingParams:
        """The app's parameters, with a form of the answer that has been tried, and with every output as it comes: the
        service counts tokens while they are generated."""
        params.output_kind = RequestOutputKind.DELTA
        params.max_tokens = request.sampling.max_tokens
        params.stop = list(request.sampling.stop)
        if params.structured_outputs is not None and form is None:  # of a tool that must be called
            wanted = form_of(params.structured_outputs)
            form = await self._backend.checked_form(wanted, request.sampling.stop_token_ids)
        return convert.with_checked_form(params, form)


def form_of(params: StructuredOutputsParams) -> StructuredOutput:
    """The form that the app's parser of tools asks for. Raises LorafError: it is none that can be checked."""
    if params.json is not None:
        text = params.json if isinstance(params.json, str) else json.dumps(params.json)
        return StructuredOutput("json_schema", text)
    if params.regex is not None:
        return StructuredOutput("regex", params.regex)
    if params.grammar is not None:
        return StructuredOutput("grammar", params.grammar)
    if params.structural_tag is not None:
        return StructuredOutput("structural_tag", params.structural_tag)
    message = "the server's parser of tools asks for a form of the answer that loraf-serve cannot check"
    raise LorafError(Problem(message, "tool_choice", remedy="use auto or none, or tools without strict"))


class _Texts:
    """Fills in the texts of single tokens, with log-probabilities. vLLM's own would raise for tokens that the model has
    and the tokenizer has not, and drops the space before a word.

    Args:
        prompt: token ids.
    """

    def __init__(self, tokenizer: Any, prompt: tuple[int, ...]):
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._answers: dict[int, list[int]] = {}  # index → the last tokens so far
        self._has_prompt = False

    async def add(self, output: RequestOutput) -> None:
        """Fills in those of the next output."""
        rows = output.prompt_logprobs
        if rows and not self._has_prompt:
            self._has_prompt = True
            for i, row in enumerate(rows):
                self._fill(list(self._prompt[max(0, i - CONTEXT) : i]), row)
                if i % _POSITIONS_AT_ONCE == _POSITIONS_AT_ONCE - 1:
                    await asyncio.sleep(0)
        for choice in output.outputs:
            if not choice.logprobs:
                continue
            before = self._answers.get(choice.index, [])
            answer = [*before, *choice.token_ids]
            for i, entries in enumerate(choice.logprobs):
                place = len(before) + i
                self._fill(answer[max(0, place - CONTEXT) : place], entries)
                if i % _POSITIONS_AT_ONCE == _POSITIONS_AT_ONCE - 1:
                    await asyncio.sleep(0)
            self._answers[choice.index] = answer[-CONTEXT:]

    def _fill(self, before: list[int], entries: Mapping[int, Logprob] | None) -> None:
        for token, entry in (entries or {}).items():
            entry.decoded_token = token_text(self._tokenizer, before, token)
