"""What a request for answers passes, whichever door it came through.

door ──▶ Admission, Allowances ──▶ lease ──▶ access, Validator ──▶ Backend.generate ──▶ messages ──▶ door
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from functools import partial

from loraf.errors import Problem, UnknownTask
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import Backend, BackendUnavailable, GenerationRequest, Output
from loraf_serve.errors import InvalidRequest
from loraf_serve.observe.call import Call, Observer, inform
from loraf_serve.request.validation import AnyRequest, Validator
from loraf_serve.security.allowance import Allowance, Allowances
from loraf_serve.security.permissions import Permissions
from loraf_serve.service import access, messages
from loraf_serve.service.admission import Admission
from loraf_serve.v1 import generation_pb2


class Generations:
    """Requests for answers.

    Args:
        engine_gone: awaited when the backend has failed for good.
        observers: are told of the progress of each call.
        log_texts: let observers see prompts and answers.

    Attributes:
        validator: set once the backend has started and its tokenizer is known, before admission opens.
    """

    validator: Validator

    def __init__(
        self,
        backend: Backend,
        library: AdapterLibrary,
        admission: Admission,
        engine_gone: Callable[[BackendUnavailable], Awaitable[None]],
        observers: Sequence[Observer] = (),
        log_texts: bool = False,
    ):
        self.backend = backend
        self.log_texts = log_texts
        self._library = library
        self._admission = admission
        self._allowances = Allowances()
        self._engine_gone = engine_gone
        self._observers = observers

    @contextmanager
    def entered(
        self, adapter: str, permissions: Permissions, prompts: int = 1
    ) -> Iterator[tuple[Registry, list[Allowance]]]:
        """Holds what a request needs until the context ends: a place and an allowance for each of its prompts, and a
        lease, which keeps the adapter in the backend.

        Args:
            adapter: the name in the request.

        Returns:
            The adapters that the client may use, and an allowance for each prompt.

        Raises:
            NotServing, QueueFull, RateLimited: no request is admitted now, or not that many.
            InvalidRequest: there are never places for that many prompts.
        """
        most = min(self._admission.limit, permissions.in_flight or self._admission.limit)
        if prompts > most:
            remedy = f"send at most {most} prompts in a request"
            message = f"has {prompts} prompts, and at most {most} requests may be in flight"
            raise InvalidRequest(Problem(message, "prompts", remedy=remedy))
        visible = partial(access.visible, permissions=permissions)
        with ExitStack() as held:
            for _ in range(prompts):
                held.enter_context(self._admission.enter())
            allowances = [held.enter_context(self._allowances.enter(permissions)) for _ in range(prompts)]
            yield held.enter_context(self._library.lease(adapter, visible)), allowances

    async def validated(self, request: AnyRequest, registry: Registry, permissions: Permissions) -> GenerationRequest:
        """The request, if it is valid and its client may ask for it.

        Args:
            registry: from `entered`.

        Raises:
            LorafError: as `Validator.read_now`. PermissionDenied: see `access`.
        """
        access.require_asked(request, permissions)
        valid = await self.validator.read(request, registry)
        access.require_selected(valid.task_set, permissions)
        return valid

    def begin(self, valid: GenerationRequest, allowance: Allowance) -> None:
        """Takes the prompt's tokens from the allowance, and reserves those of the answers. Raises RateLimited."""
        sampling = valid.sampling
        allowance.reserve(len(valid.prompt_token_ids) + sampling.n * sampling.max_tokens)
        allowance.take(len(valid.prompt_token_ids))

    async def pieces(
        self, request: GenerationRequest, call: Call, allowance: Allowance
    ) -> AsyncGenerator[generation_pb2.StreamGenerateResponse]:
        """Yields the backend's outputs as messages."""
        stream = messages.ResponseStream(request, call.request_id, self.backend.name)
        async with aclosing(self.backend.generate(request)) as outputs:
            async for output in outputs:
                message = stream.message(output)
                if message is not None:
                    self.note_output(call, output, allowance)
                    yield message
        if not stream.finished:
            raise RuntimeError(f"the {self.backend.name} backend ended an answer without a finish reason")

    def note_request(self, call: Call, valid: Sequence[GenerationRequest], prompt: Callable[[], str]) -> None:
        """Tells the observers that a valid request goes to the backend.

        Args:
            valid: one for each prompt of the request; all for the same set.
            prompt: makes the text that observers may see, if they may.
        """
        first = valid[0]
        call.answering = time.perf_counter()
        call.adapter = first.adapter.name if first.adapter else ""
        call.task_set = "base" if first.task_set.is_base else str(first.task_set)
        call.prompt_tokens = sum(len(request.prompt_token_ids) for request in valid)
        if self.log_texts:
            call.prompt = prompt()
        inform(self._observers, "answering", call)

    def note_output(self, call: Call, output: Output, allowance: Allowance) -> None:
        """Takes the output's tokens from the allowance and tells the observers of them."""
        text = "".join(choice.text for choice in output.choices if choice.index == 0) if self.log_texts else ""
        count = sum(len(choice.token_ids) for choice in output.choices)
        self.note_tokens(call, count, output.cached_prompt_tokens, text, allowance)

    def note_tokens(self, call: Call, count: int, cached: int, text: str, allowance: Allowance) -> None:
        """As `note_output`.

        Args:
            count: of new tokens.
            cached: tokens of the prompt that the backend had in its cache.
            text: what is new of the first answer; noted only if texts are logged.
        """
        allowance.take(count)
        call.cached_prompt_tokens = max(call.cached_prompt_tokens, cached)
        if self.log_texts:
            call.answer += text
        if not count:
            return
        since, call.last_token = call.last_token, time.perf_counter()
        call.first_token = call.first_token or call.last_token
        call.completion_tokens += count
        inform(self._observers, "tokens", call, count, since)

    async def shown(self, error: Exception, permissions: Permissions) -> Exception:
        """The error that the client gets for `error`. Learns from it if the engine is gone."""
        if isinstance(error, BackendUnavailable):
            await self._engine_gone(error)
            return self._admission.refusal or error
        if isinstance(error, UnknownTask | InvalidRequest):
            return access.without_other_tasks(error, permissions)
        return error
