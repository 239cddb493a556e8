"""What every call passes before its service, and what is noted at its end.

call ──▶ observers ──▶ token ──▶ bytes to a message, without unknown fields ──▶ service ──▶ status ──▶ observers

Health checks need no token: probes carry none.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from itertools import islice
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc import aio
from grpc_health.v1 import health

from loraf.errors import Problem
from loraf_serve.errors import InvalidRequest
from loraf_serve.observe.call import CURRENT, Call, Observer, inform
from loraf_serve.request.validation import request_id_problem
from loraf_serve.security.permissions import Permissions
from loraf_serve.security.tokens import Tokens
from loraf_serve.service.accepting import ExecuteBatchError
from loraf_serve.service.refusal import Context, Refusal, abort, refusal_of, request_id_metadata

PERMISSIONS: ContextVar[Permissions] = ContextVar("permissions")
"""What the client of the running call may do."""

Deserializer = Callable[[bytes], Message]


class Gate(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs only
    """Wraps every method of every service.

    Args:
        tokens: who may call; None: everybody may do everything.
        observers: are told of every call but health checks.
    """

    def __init__(self, tokens: Tokens | None = None, observers: Sequence[Observer] = ()):
        self._tokens = tokens
        self._observers = tuple(observers)

    async def intercept_service(  # type: ignore[override]  # grpc-stubs do not know that a method may be unknown
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the method's handler with everything around it; None if there is no such method."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        details: Any = handler_call_details
        method: str = details.method
        metadata = {key.lower(): value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        if handler.request_streaming:
            return self._streaming(handler, method, metadata)
        answer = handler.unary_stream if handler.response_streaming else handler.unary_unary
        is_health = method.startswith(f"/{health.SERVICE_NAME}/")

        async def call(raw: bytes, context: Context) -> Any:
            if is_health:
                return await self._unobserved(answer, raw, handler.request_deserializer, context)
            return await self._observed(answer, raw, handler.request_deserializer, context, Call(method, metadata))

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(call, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)

    async def _observed(
        self, answer: Callable[..., Awaitable[Any]], raw: bytes, read: Deserializer, context: Context, call: Call
    ) -> Any:
        CURRENT.set(call)
        inform(self._observers, "began", call)
        try:
            entered = self._enter(raw, read, call)
            if isinstance(entered, Refusal):
                await abort(context, entered)
            context.set_trailing_metadata((request_id_metadata(call.request_id),))
            outcome = await _outcome(answer, entered, context, call)
            return await abort(context, outcome) if isinstance(outcome, Refusal) else outcome
        except asyncio.CancelledError:
            left = context.time_remaining()
            call.code = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
            raise
        except ExecuteBatchError:
            call.code = "CANCELLED"
            raise
        finally:
            code = context.code()
            call.code = call.code or (code.name if isinstance(code, grpc.StatusCode) else "OK")
            call.ended = time.perf_counter()
            inform(self._observers, "ended", call)

    def _enter(self, raw: bytes, read: Deserializer, call: Call) -> Message | Refusal:
        """The request, after its client's permissions are known; or why the call ends here."""
        try:
            permissions = self._tokens.permissions_of(call.metadata.get("authorization")) if self._tokens else _ALL
            call.client = permissions.client
            PERMISSIONS.set(permissions)
            request = parse(raw, read)
            client_id = getattr(request, "request_id", "")
            if client_id and not request_id_problem(client_id):
                call.request_id = client_id
            return request
        except Exception as error:
            return refusal_of(error, call.request_id)

    async def _unobserved(
        self, answer: Callable[..., Awaitable[Any]], raw: bytes, read: Deserializer, context: Context
    ) -> Any:
        request: Message | Refusal
        try:
            request = parse(raw, read)
        except InvalidRequest as error:
            request = refusal_of(error, Call("").request_id)
        if isinstance(request, Refusal):
            await abort(context, request)
        return await answer(request, context)

    def _streaming(self, handler: Any, method: str, metadata: dict[str, str]) -> grpc.RpcMethodHandler[Any, Any]:
        """Reflection: the only method here to which clients send a stream."""
        answer, read = handler.stream_stream, handler.request_deserializer
        assert handler.response_streaming and inspect.isasyncgenfunction(answer)

        async def requests(raws: AsyncIterator[bytes], context: Context, call: Call) -> AsyncIterator[Message]:
            async for raw in raws:
                refusal = None
                try:
                    request = parse(raw, read)
                except InvalidRequest as error:
                    refusal = refusal_of(error, call.request_id)
                if refusal:
                    await abort(context, refusal)
                yield request

        async def stream(raws: AsyncIterator[bytes], context: Context) -> AsyncIterator[Message]:
            call, refusal = Call(method, metadata), None
            inform(self._observers, "began", call)
            try:
                try:
                    if self._tokens:
                        call.client = self._tokens.permissions_of(metadata.get("authorization")).client
                except Exception as error:
                    refusal = refusal_of(error, call.request_id)
                if refusal:
                    await abort(context, refusal)
                async for response in answer(requests(raws, context, call), context):
                    yield response
            except (asyncio.CancelledError, GeneratorExit):
                call.code = "CANCELLED"
                raise
            finally:
                code = context.code()
                call.code = call.code or (code.name if isinstance(code, grpc.StatusCode) else "OK")
                call.ended = time.perf_counter()
                inform(self._observers, "ended", call)

        return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)


_ALL = Permissions()


async def _outcome(answer: Callable[..., Awaitable[Any]], request: Any, context: Context, call: Call) -> Any:
    """What a service answers, or how the call ends if it fails. Services end calls with a status themselves: another
    exception is a fault of the program, and gRPC would send its text."""
    try:
        return await answer(request, context)
    except (aio.AbortError, ExecuteBatchError):  # an intended status, or a client that is gone
        raise
    except Exception as error:
        return refusal_of(error, call.request_id)


def parse(raw: bytes, read: Deserializer) -> Message:
    """The message that `raw` holds.

    Raises:
        InvalidRequest: it holds none, or has a field that this release does not know: leaving it out could answer
            another question than was asked.
    """
    try:
        request = read(raw)
    except DecodeError:
        raise InvalidRequest(Problem("the bytes are not a message of this type", remedy=_SAME_PROTO)) from None
    size = request.ByteSize()
    request.DiscardUnknownFields()
    if request.ByteSize() != size:
        field = _unknown_field(read(raw)) or "request"
        raise InvalidRequest(Problem("is not a field that this server knows", field, remedy=_SAME_PROTO))
    return request


_MOST_LOOKED_AT = 10_000  # messages in a request, when the path of an unknown field is looked for
_SAME_PROTO = "use the proto files of the server's release"


def _unknown_field(request: Message) -> str | None:
    """Path of an unknown field, with its number as its name; None if it was not found among the first messages."""
    waiting = deque([("", request)])
    for _ in range(_MOST_LOOKED_AT):
        if not waiting:
            break
        path, message = waiting.popleft()
        unknown: Any = UnknownFieldSet(message)
        if len(unknown):
            return f"{path}{unknown[0].field_number}"
        for field, value in message.ListFields():
            if field.message_type is None or field.message_type.GetOptions().map_entry:
                continue
            if not field.is_repeated:
                waiting.append((f"{path}{field.name}.", value))
                continue
            parts = islice(value, _MOST_LOOKED_AT - len(waiting))
            waiting.extend((f"{path}{field.name}[{i}].", part) for i, part in enumerate(parts))
    return None
