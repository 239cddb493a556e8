"""The two gRPC services. A request passes admission and validation, runs in the backend, and ends in one status.

request ──▶ Admission ──▶ Library.lease ──▶ Validator ──▶ Backend.generate ──▶ messages
                               any exception ──▶ loraf_serve.service.status
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, closing
from typing import Any, NamedTuple, TypeVar

import grpc
from grpc_status.rpc_status import GRPC_DETAILS_METADATA_KEY

from loraf_serve.adapters.library import Library
from loraf_serve.backends.backend import Backend, BackendUnavailable, GenerationRequest, ServedAdapter
from loraf_serve.errors import DeadlineExceeded
from loraf_serve.request.validation import Validator, request_id_problem
from loraf_serve.service import messages, status
from loraf_serve.service.admission import Admission
from loraf_serve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

log = logging.getLogger(__name__)
T = TypeVar("T")


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Generate and StreamGenerate.

    Args:
        default_deadline: seconds for requests that bring no deadline of their own; None: as long as they take.
        engine_gone: awaited when the backend says that it cannot answer any more.

    Attributes:
        validator: set when the backend has started and its tokenizer is known, before admission opens.
    """

    validator: Validator

    def __init__(
        self,
        backend: Backend,
        library: Library,
        admission: Admission,
        default_deadline: float | None,
        engine_gone: Callable[[BackendUnavailable], Awaitable[None]],
    ):
        self._backend = backend
        self._library = library
        self._admission = admission
        self._default_deadline = default_deadline
        self._engine_gone = engine_gone

    async def Generate(self, request: generation_pb2.GenerateRequest, context) -> generation_pb2.GenerateResponse:
        answer = messages.Answer()
        await self._run(request, context, answer.add)
        return answer.response

    # Not an asynchronous generator: one that is suspended in a `yield` when the client goes away is closed only when
    # it is collected. No headers are sent before the first token, so that a client may retry until then.
    async def StreamGenerate(self, request: generation_pb2.StreamGenerateRequest, context) -> None:
        await self._run(request, context, context.write)

    async def _run(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest,
        context: grpc.aio.ServicerContext,
        emit: Callable[[generation_pb2.StreamGenerateResponse], Awaitable[None]],
    ) -> None:
        """Feeds `emit` the pieces of the answer; ends the call with a status if anything is wrong."""
        refusal = await self._answer(request, context, emit)
        if refusal:
            await context.abort(*refusal)

    async def _answer(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest,
        context: grpc.aio.ServicerContext,
        emit: Callable[[generation_pb2.StreamGenerateResponse], Awaitable[None]],
    ) -> _Refusal | None:
        """Feeds `emit` the pieces of the answer. Returns what is wrong, if anything is."""
        client_id = "" if request_id_problem(request.request_id) else request.request_id
        request_id = client_id or uuid.uuid4().hex
        # A deadline of the client's own reaches this handler as a cancellation.
        deadline = self._default_deadline if context.time_remaining() is None else None
        try:
            async with asyncio.timeout(deadline) as timeout:
                # The lease outlasts the backend's work: until then the adapter that the name means now stays there.
                with self._admission.enter(), self._library.lease(request.adapter) as registry:
                    valid = await self.validator.read(request, registry)
                    async with aclosing(self._pieces(valid, request_id)) as pieces:
                        async for piece in pieces:
                            await emit(piece)
        except BackendUnavailable as error:
            await self._engine_gone(error)
            return _refusal(self._admission.refusal or error, request_id)
        except TimeoutError as error:
            return _refusal(DeadlineExceeded(deadline) if timeout.expired() else error, request_id)
        except asyncio.CancelledError as error:
            if asyncio.current_task().cancelling():
                raise  # the client's deadline went by, or it cancelled, or is gone
            return _refusal(error, request_id)  # nobody cancelled this call: a fault inside
        except Exception as error:
            return _refusal(error, request_id)
        return None

    async def _pieces(
        self, request: GenerationRequest, request_id: str
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """The backend's outputs as messages."""
        stream = messages.Stream(request, request_id, self._backend.name)
        async with aclosing(self._backend.generate(request)) as outputs:
            async for output in outputs:
                message = stream.message(output)
                if message is not None:
                    yield message
        if not stream.finished:
            raise RuntimeError(f"the {self._backend.name} backend ended an answer without a finish reason")


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """What is loaded, and changing it.

    Args:
        engine_gone: awaited when the backend says that it cannot answer any more.
    """

    def __init__(
        self, library: Library, admission: Admission, engine_gone: Callable[[BackendUnavailable], Awaitable[None]]
    ):
        self._library = library
        self._admission = admission
        self._engine_gone = engine_gone

    async def ListAdapters(self, request, context) -> adapter_pb2.ListAdaptersResponse:
        return adapter_pb2.ListAdaptersResponse(adapters=[self._message(a) for a in self._library.registry])

    async def GetAdapter(self, request, context) -> adapter_pb2.GetAdapterResponse:
        try:
            return adapter_pb2.GetAdapterResponse(adapter=self._message(self._library.registry.get(request.name)))
        except Exception as error:
            refusal = _refusal(error, uuid.uuid4().hex)
        await context.abort(*refusal)

    async def LoadAdapter(self, request: adapter_pb2.LoadAdapterRequest, context) -> adapter_pb2.LoadAdapterResponse:
        change = self._library.load(request.name, request.path, tuple(request.tasks), request.replace)
        return adapter_pb2.LoadAdapterResponse(adapter=self._message(await self._changed(context, change)))

    async def UnloadAdapter(
        self, request: adapter_pb2.UnloadAdapterRequest, context
    ) -> adapter_pb2.UnloadAdapterResponse:
        found = await self._changed(context, self._library.unload(request.name))
        return adapter_pb2.UnloadAdapterResponse(running_requests=found.running, other_names=found.other_names)

    async def _changed(self, context: grpc.aio.ServicerContext, change: Coroutine[Any, Any, T]) -> T:
        """What the change gives; ends the call with a status if the server does not serve, or if it fails."""
        outcome = await self._outcome(change)
        if isinstance(outcome, _Refusal):
            await context.abort(*outcome)
        return outcome

    async def _outcome(self, change: Coroutine[Any, Any, T]) -> T | _Refusal:
        request_id = uuid.uuid4().hex
        try:
            with closing(change):
                if self._admission.refusal:
                    raise self._admission.refusal
                return await change
        except BackendUnavailable as error:
            await self._engine_gone(error)
            return _refusal(self._admission.refusal or error, request_id)
        except asyncio.CancelledError as error:
            if asyncio.current_task().cancelling():
                raise  # the client's deadline went by, or it cancelled, or is gone
            return _refusal(self._admission.refusal or error, request_id)  # the server has ended the change
        except Exception as error:
            return _refusal(error, request_id)

    def _message(self, adapter: ServedAdapter) -> adapter_pb2.Adapter:
        return messages.adapter(adapter, self._library.resident_bytes(adapter))


class _Refusal(NamedTuple):
    """The status that ends a call: what `context.abort` takes.

    grpc keeps the exception of the latest call until the next call comes, and with it the frames that it passed through
    and the exception that was being handled. `abort` is therefore called where neither can reach an adapter: a refused
    request would keep one in memory after it is unloaded.
    """

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def _refusal(error: BaseException, request_id: str) -> _Refusal:
    """The status for `error`; logs what nobody expected."""
    found = status.status_of(error, request_id)
    code = status.code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        log.error("request %s failed", request_id, exc_info=error)
    else:
        log.info("request %s: %s: %s", request_id, code.name, found.message)
    return _Refusal(code, found.message, ((GRPC_DETAILS_METADATA_KEY, found.SerializeToString()),))
