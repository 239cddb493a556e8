"""The two gRPC services. A request passes admission and validation, runs in the backend, and ends in one status.

gate ──▶ Admission, Allowances ──▶ lease ──▶ access, Validator ──▶ Backend.generate ──▶ messages ──▶ Outbox
                               any exception ──▶ refusal, status
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, closing, nullcontext
from functools import partial
from typing import Any, TypeVar

from loraf.errors import UnknownTask
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.backends.backend import Backend, BackendUnavailable, GenerationRequest, Output, ServedAdapter
from loraf_serve.errors import DeadlineExceeded, InvalidRequest
from loraf_serve.observe.call import Call, Observer, current, inform
from loraf_serve.request.validation import Validator
from loraf_serve.security.allowance import Allowances
from loraf_serve.service import access, messages
from loraf_serve.service.admission import Admission
from loraf_serve.service.gate import PERMISSIONS
from loraf_serve.service.outbox import Outbox
from loraf_serve.service.refusal import Context, Refusal, abort, refusal_of
from loraf_serve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

T = TypeVar("T")


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Generate and StreamGenerate.

    Args:
        default_deadline: seconds, for requests that set no deadline; None for no limit.
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
        default_deadline: float | None,
        engine_gone: Callable[[BackendUnavailable], Awaitable[None]],
        observers: Sequence[Observer] = (),
        log_texts: bool = False,
    ):
        self._backend = backend
        self._library = library
        self._admission = admission
        self._allowances = Allowances()
        self._default_deadline = default_deadline
        self._engine_gone = engine_gone
        self._observers = observers
        self._log_texts = log_texts

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        builder = messages.ResponseBuilder()
        refusal = await self._answer(request, context, builder.add, nullcontext())
        if refusal:
            await abort(context, refusal)
        return builder.response

    # Not an asynchronous generator: if the client goes away while one is suspended in a `yield`, it is closed only when
    # it is garbage-collected. No headers are sent before the first token, so that a client may retry until then.
    async def StreamGenerate(self, request: generation_pb2.StreamGenerateRequest, context: Context) -> None:
        outbox = Outbox[generation_pb2.StreamGenerateResponse](context.write)
        refusal = await self._answer(request, context, outbox.put, outbox)
        if refusal:
            await abort(context, refusal)

    async def _answer(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest,
        context: Context,
        emit: Callable[[generation_pb2.StreamGenerateResponse], Awaitable[None]],
        sending: AbstractAsyncContextManager[object],
    ) -> Refusal | None:
        """Passes the pieces of the answer to `emit`, within `sending`. Returns the status if anything is wrong."""
        call, permissions = current(), PERMISSIONS.get()
        # The client's own deadline reaches this handler as a cancellation.
        deadline = self._default_deadline if context.time_remaining() is None else None
        try:
            async with asyncio.timeout(deadline) as timeout:
                # The lease keeps the adapter in the backend until the request has ended.
                with (
                    self._admission.enter(),
                    self._allowances.enter(permissions) as allowance,
                    self._library.lease(request.adapter, partial(access.visible, permissions=permissions)) as registry,
                ):
                    access.require_asked(request, permissions)
                    valid = await self.validator.read(request, registry)
                    access.require_selected(valid, permissions)
                    sampling = valid.sampling
                    allowance.reserve(len(valid.prompt_token_ids) + sampling.n * sampling.max_tokens)
                    allowance.take(len(valid.prompt_token_ids))
                    self._note_request(call, request, valid)
                    async with sending, aclosing(self._pieces(valid, call, allowance.take)) as pieces:
                        async for piece in pieces:
                            await emit(piece)
        except BackendUnavailable as error:
            await self._engine_gone(error)
            return refusal_of(self._admission.refusal or error, call.request_id)
        except TimeoutError as error:
            if deadline is not None and timeout.expired():
                return refusal_of(DeadlineExceeded(deadline), call.request_id)
            return refusal_of(error, call.request_id)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise  # the client's deadline has passed, or it cancelled the call, or it is gone
            return refusal_of(error, call.request_id)  # this call was not cancelled: an internal fault
        except (UnknownTask, InvalidRequest) as error:
            return refusal_of(access.without_other_tasks(error, permissions), call.request_id)
        except Exception as error:
            return refusal_of(error, call.request_id)
        return None

    async def _pieces(
        self, request: GenerationRequest, call: Call, take: Callable[[int], None]
    ) -> AsyncGenerator[generation_pb2.StreamGenerateResponse]:
        """Yields the backend's outputs as messages."""
        stream = messages.ResponseStream(request, call.request_id, self._backend.name)
        async with aclosing(self._backend.generate(request)) as outputs:
            async for output in outputs:
                message = stream.message(output)
                if message is not None:
                    count = sum(len(choice.token_ids) for choice in output.choices)
                    take(count)
                    self._note_tokens(call, output, count)
                    yield message
        if not stream.finished:
            raise RuntimeError(f"the {self._backend.name} backend ended an answer without a finish reason")

    def _note_request(
        self,
        call: Call,
        request: generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest,
        valid: GenerationRequest,
    ) -> None:
        """Tells the observers that a valid request goes to the backend."""
        call.answering = time.perf_counter()
        call.adapter = valid.adapter.name if valid.adapter else ""
        call.task_set = "base" if valid.task_set.is_base else str(valid.task_set)
        call.prompt_tokens = len(valid.prompt_token_ids)
        if self._log_texts:
            call.prompt = request.prompt or str(request.messages or request.prompt_token_ids)
        inform(self._observers, "answering", call)

    def _note_tokens(self, call: Call, output: Output, count: int) -> None:
        """Tells the observers that tokens are ready."""
        call.cached_prompt_tokens = max(call.cached_prompt_tokens, output.cached_prompt_tokens)
        if self._log_texts:
            call.answer += "".join(choice.text for choice in output.choices if choice.index == 0)
        if not count:
            return
        since, call.last_token = call.last_token, time.perf_counter()
        call.first_token = call.first_token or call.last_token
        call.completion_tokens += count
        inform(self._observers, "tokens", call, count, since)


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """Lists, loads and unloads adapters.

    Args:
        engine_gone: awaited when the backend has failed for good.
    """

    def __init__(
        self,
        library: AdapterLibrary,
        admission: Admission,
        engine_gone: Callable[[BackendUnavailable], Awaitable[None]],
    ):
        self._library = library
        self._admission = admission
        self._engine_gone = engine_gone

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        adapters = access.visible(self._library.registry, PERMISSIONS.get())
        return adapter_pb2.ListAdaptersResponse(adapters=[self._message(adapter) for adapter in adapters])

    async def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: Context
    ) -> adapter_pb2.GetAdapterResponse:
        try:
            PERMISSIONS.get().require_adapter(request.name, "name")
            return adapter_pb2.GetAdapterResponse(adapter=self._message(self._library.registry.get(request.name)))
        except Exception as error:
            refusal = refusal_of(error, current().request_id)
        return await abort(context, refusal)

    async def LoadAdapter(
        self, request: adapter_pb2.LoadAdapterRequest, context: Context
    ) -> adapter_pb2.LoadAdapterResponse:
        change = self._library.load(request.name, request.path, tuple(request.tasks), request.replace)
        adapter = await self._changed(context, change, request.name, request.tasks)
        return adapter_pb2.LoadAdapterResponse(adapter=self._message(adapter))

    async def UnloadAdapter(
        self, request: adapter_pb2.UnloadAdapterRequest, context: Context
    ) -> adapter_pb2.UnloadAdapterResponse:
        unloaded = await self._changed(context, self._library.unload(request.name), request.name, ())
        names = filter(PERMISSIONS.get().may_use, unloaded.other_names)
        return adapter_pb2.UnloadAdapterResponse(running_requests=unloaded.running, other_names=names)

    async def _changed(self, context: Context, change: Coroutine[Any, Any, T], name: str, tasks: Sequence[str]) -> T:
        """Returns the result of a change to the adapter of that name, with these tasks; ends the call with a status if
        the client may not change it, the server is not serving, or it fails."""
        outcome = await self._outcome(change, name, tasks)
        return await abort(context, outcome) if isinstance(outcome, Refusal) else outcome

    async def _outcome(self, change: Coroutine[Any, Any, T], name: str, tasks: Sequence[str]) -> T | Refusal:
        request_id, permissions = current().request_id, PERMISSIONS.get()
        try:
            with closing(change):
                access.require_change(name, tasks, permissions)
                if self._admission.refusal:
                    raise self._admission.refusal
                return await change
        except BackendUnavailable as error:
            await self._engine_gone(error)
            return refusal_of(self._admission.refusal or error, request_id)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise  # the client's deadline has passed, or it cancelled the call, or it is gone
            return refusal_of(self._admission.refusal or error, request_id)  # the server has cancelled the change
        except UnknownTask as error:
            return refusal_of(access.without_other_tasks(error, permissions), request_id)
        except Exception as error:
            return refusal_of(error, request_id)

    def _message(self, adapter: ServedAdapter) -> adapter_pb2.Adapter:
        sets = self._library.registry.sets_of(adapter).values()
        description = messages.adapter(adapter, self._library.resident_bytes(adapter), sets)
        return access.shown(description, PERMISSIONS.get())


def _is_cancelled() -> bool:
    """Whether the current task has been cancelled, rather than something that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
