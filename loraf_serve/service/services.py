"""The two gRPC services. A request passes admission and validation, runs in the backend, and ends in one status.

request ──▶ Admission ──▶ AdapterLibrary.lease ──▶ Validator ──▶ Backend.generate ──▶ messages
                               any exception ──▶ loraf_serve.service.status
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, closing
from typing import Any, NamedTuple, NoReturn, TypeVar

import grpc
from grpc import aio
from grpc_status.rpc_status import GRPC_DETAILS_METADATA_KEY  # type: ignore[attr-defined]  # not in grpc-stubs

from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.backends.backend import Backend, BackendUnavailable, GenerationRequest, ServedAdapter
from loraf_serve.errors import DeadlineExceeded
from loraf_serve.request.validation import Validator, request_id_problem
from loraf_serve.service import messages, status
from loraf_serve.service.admission import Admission
from loraf_serve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

log = logging.getLogger(__name__)
T = TypeVar("T")
Context = aio.ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Generate and StreamGenerate.

    Args:
        default_deadline: seconds, for requests that set no deadline; None for no limit.
        engine_gone: awaited when the backend has failed for good.

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
    ):
        self._backend = backend
        self._library = library
        self._admission = admission
        self._default_deadline = default_deadline
        self._engine_gone = engine_gone

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        builder = messages.ResponseBuilder()
        await self._run(request, context, builder.add)
        return builder.response

    # Not an asynchronous generator: if the client goes away while one is suspended in a `yield`, it is closed only when
    # it is garbage-collected. No headers are sent before the first token, so that a client may retry until then.
    async def StreamGenerate(self, request: generation_pb2.StreamGenerateRequest, context: Context) -> None:
        await self._run(request, context, context.write)

    async def _run(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest,
        context: Context,
        emit: Callable[[generation_pb2.StreamGenerateResponse], Awaitable[None]],
    ) -> None:
        """Passes the pieces of the answer to `emit`; ends the call with a status if anything is wrong."""
        refusal = await self._answer(request, context, emit)
        if refusal:
            await _abort(context, refusal)

    async def _answer(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest,
        context: Context,
        emit: Callable[[generation_pb2.StreamGenerateResponse], Awaitable[None]],
    ) -> _Refusal | None:
        """Passes the pieces of the answer to `emit`. Returns the status if anything is wrong."""
        client_id = "" if request_id_problem(request.request_id) else request.request_id
        request_id = client_id or uuid.uuid4().hex
        # The client's own deadline reaches this handler as a cancellation.
        deadline = self._default_deadline if context.time_remaining() is None else None
        try:
            async with asyncio.timeout(deadline) as timeout:
                # The lease keeps the adapter in the backend until the request has ended.
                with self._admission.enter(), self._library.lease(request.adapter) as registry:
                    valid = await self.validator.read(request, registry)
                    async with aclosing(self._pieces(valid, request_id)) as pieces:
                        async for piece in pieces:
                            await emit(piece)
        except BackendUnavailable as error:
            await self._engine_gone(error)
            return _refusal(self._admission.refusal or error, request_id)
        except TimeoutError as error:
            if deadline is not None and timeout.expired():
                return _refusal(DeadlineExceeded(deadline), request_id)
            return _refusal(error, request_id)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise  # the client's deadline has passed, or it cancelled the call, or it is gone
            return _refusal(error, request_id)  # this call was not cancelled: an internal fault
        except Exception as error:
            return _refusal(error, request_id)
        return None

    async def _pieces(
        self, request: GenerationRequest, request_id: str
    ) -> AsyncGenerator[generation_pb2.StreamGenerateResponse]:
        """Yields the backend's outputs as messages."""
        stream = messages.ResponseStream(request, request_id, self._backend.name)
        async with aclosing(self._backend.generate(request)) as outputs:
            async for output in outputs:
                message = stream.message(output)
                if message is not None:
                    yield message
        if not stream.finished:
            raise RuntimeError(f"the {self._backend.name} backend ended an answer without a finish reason")


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
        return adapter_pb2.ListAdaptersResponse(adapters=[self._message(a) for a in self._library.registry])

    async def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: Context
    ) -> adapter_pb2.GetAdapterResponse:
        try:
            return adapter_pb2.GetAdapterResponse(adapter=self._message(self._library.registry.get(request.name)))
        except Exception as error:
            refusal = _refusal(error, uuid.uuid4().hex)
        return await _abort(context, refusal)

    async def LoadAdapter(
        self, request: adapter_pb2.LoadAdapterRequest, context: Context
    ) -> adapter_pb2.LoadAdapterResponse:
        change = self._library.load(request.name, request.path, tuple(request.tasks), request.replace)
        return adapter_pb2.LoadAdapterResponse(adapter=self._message(await self._changed(context, change)))

    async def UnloadAdapter(
        self, request: adapter_pb2.UnloadAdapterRequest, context: Context
    ) -> adapter_pb2.UnloadAdapterResponse:
        unloaded = await self._changed(context, self._library.unload(request.name))
        return adapter_pb2.UnloadAdapterResponse(running_requests=unloaded.running, other_names=unloaded.other_names)

    async def _changed(self, context: Context, change: Coroutine[Any, Any, T]) -> T:
        """Returns the result of a change; ends the call with a status if the server is not serving or it fails."""
        outcome = await self._outcome(change)
        return await _abort(context, outcome) if isinstance(outcome, _Refusal) else outcome

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
            if _is_cancelled():
                raise  # the client's deadline has passed, or it cancelled the call, or it is gone
            return _refusal(self._admission.refusal or error, request_id)  # the server has cancelled the change
        except Exception as error:
            return _refusal(error, request_id)

    def _message(self, adapter: ServedAdapter) -> adapter_pb2.Adapter:
        return messages.adapter(adapter, self._library.resident_bytes(adapter))


class _Refusal(NamedTuple):
    """The status that ends a call, as arguments of `context.abort`.

    grpc keeps the exception of the latest call until the next call, and with it the frames it passed through and the
    exception that was being handled. So `abort` is called where neither can reach an adapter: otherwise a refused
    request would keep an unloaded adapter in memory.
    """

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def _refusal(error: BaseException, request_id: str) -> _Refusal:
    """The status for `error`. Logs the traceback of an unexpected one."""
    details = status.status_of(error, request_id)
    code = status.code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        log.error("request %s failed", request_id, exc_info=error)
    else:
        log.info("request %s: %s: %s", request_id, code.name, details.message)
    return _Refusal(code, details.message, ((GRPC_DETAILS_METADATA_KEY, details.SerializeToString()),))


async def _abort(context: Context, refusal: _Refusal) -> NoReturn:
    await context.abort(*refusal)
    raise AssertionError("context.abort has returned")


def _is_cancelled() -> bool:
    """Whether the current task has been cancelled, rather than something that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
