"""The two gRPC services. A request passes admission and validation, runs in the backend, and ends in one status.

gate ──▶ services ──▶ answering ──▶ generations (what every door's requests pass) ──▶ messages ──▶ Outbox
                               any exception ──▶ refusal, status
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, closing, nullcontext
from functools import partial
from typing import Any, TypeVar

from loraf.errors import UnknownTask
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.backends.backend import BackendUnavailable, ServedAdapter
from loraf_serve.observe.call import current
from loraf_serve.security.permissions import Permissions
from loraf_serve.service import access, messages
from loraf_serve.service.admission import Admission
from loraf_serve.service.answering import Emit, Question, answer, is_cancelled
from loraf_serve.service.gate import PERMISSIONS
from loraf_serve.service.generations import Generations
from loraf_serve.service.outbox import Outbox
from loraf_serve.service.refusal import Context, Refusal, abort, refusal_of
from loraf_serve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

T = TypeVar("T")


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Generate and StreamGenerate.

    Args:
        default_deadline: seconds, for requests that set no deadline; None for no limit.
    """

    def __init__(self, generations: Generations, default_deadline: float | None):
        self._generations = generations
        self._default_deadline = default_deadline

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
        emit: Emit,
        sending: AbstractAsyncContextManager[object],
    ) -> Refusal | None:
        question = Question(
            request.adapter, partial(self._generations.validated, request), partial(_prompt_text, request)
        )
        return await answer(self._generations, self._default_deadline, question, context, emit, sending)


def _prompt_text(request: generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest) -> str:
    return request.prompt or str(request.messages or request.prompt_token_ids)


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
        return listed(self._library, PERMISSIONS.get())

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
        outcome = await self.outcome(change, name, tasks)
        return await abort(context, outcome) if isinstance(outcome, Refusal) else outcome

    async def outcome(
        self,
        change: Coroutine[Any, Any, T],
        name: str,
        tasks: Sequence[str],
        shown: Callable[[BaseException], BaseException] = lambda error: error,
    ) -> T | Refusal:
        """The result of a change to the adapter of that name, with these tasks; or how the call ends, because the
        client may not change it, the server is not serving, or it failed.

        Args:
            shown: an error → the error with the fields that the client knows.
        """
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
            if is_cancelled():
                raise  # the client's deadline has passed, or it cancelled the call, or it is gone
            return refusal_of(self._admission.refusal or error, request_id)  # the server has cancelled the change
        except UnknownTask as error:
            return refusal_of(shown(access.without_other_tasks(error, permissions)), request_id)
        except Exception as error:
            return refusal_of(shown(error), request_id)

    def _message(self, adapter: ServedAdapter) -> adapter_pb2.Adapter:
        return described(adapter, self._library, PERMISSIONS.get())


def listed(library: AdapterLibrary, permissions: Permissions) -> adapter_pb2.ListAdaptersResponse:
    """The loaded adapters, as far as a client may know of them."""
    adapters = access.visible(library.registry, permissions)
    return adapter_pb2.ListAdaptersResponse(adapters=[described(a, library, permissions) for a in adapters])


def described(adapter: ServedAdapter, library: AdapterLibrary, permissions: Permissions) -> adapter_pb2.Adapter:
    """A loaded adapter, as far as a client may know of it."""
    sets = access.visible(library.registry, permissions).sets_of(adapter).values()
    return access.shown(messages.adapter(adapter, library.resident_bytes(adapter), sets), permissions)
