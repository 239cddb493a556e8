"""A gRPC server that survives calls of methods whose names are not text.

grpc.aio (seen in 1.85) decodes the name of an unregistered method where an exception ends the loop that accepts calls:
one request without a token would stop the server. Here such calls are answered UNIMPLEMENTED without reading the name.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Sequence
from typing import Any

from grpc import aio

log = logging.getLogger(__name__)
cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")  # has no types

ExecuteBatchError: type[Exception] = cygrpc.ExecuteBatchError
"""What grpc raises when a message or status cannot be sent, because the client is gone."""

_RELIED_ON = ("_handle_rpc", "_schedule_rpc_coro", "_MethodResolver")


def survives_hostile_names() -> bool:
    """Whether this release of grpc has what `make_server` relies on. Without it, the server is grpc's own."""
    server: Any = cygrpc.AioServer
    return all(hasattr(cygrpc, name) for name in _RELIED_ON) and hasattr(server, "_make_request_call_future")


def make_server(interceptors: Sequence[Any], options: Sequence[tuple[str, int]]) -> aio.Server:
    """`grpc.aio.server`. Its methods must be registered, as generated code does."""
    if not survives_hostile_names():
        log.warning("this release of grpcio is not protected against calls of methods whose names are not text")
        return aio.server(interceptors=interceptors, options=options)
    stock = cygrpc.AioServer
    try:
        cygrpc.AioServer = _AcceptingServer  # grpc has no setting for it
        return aio.server(interceptors=interceptors, options=options)
    finally:
        cygrpc.AioServer = stock


if survives_hostile_names():

    class _AcceptingServer(cygrpc.AioServer):  # type: ignore[misc]  # without types
        """grpc's loop waits for one future per registered method, and one for all other calls."""

        def _make_request_call_future(self, method: bytes | None) -> asyncio.Task[Any]:
            if method is not None:
                call: asyncio.Task[Any] = super()._make_request_call_future(method)
                return call
            return asyncio.get_running_loop().create_task(self._refuse_unregistered())

        async def _refuse_unregistered(self) -> None:
            """Answers every call of an unregistered method. Never returns, so that grpc's loop sees none of them."""
            loop = asyncio.get_running_loop()
            answers = set()
            nothing: Any = cygrpc._MethodResolver([], {})
            while True:
                call = await self._request_call()
                answer = cygrpc._handle_rpc("", nothing, (), call, loop, False)
                task = loop.create_task(cygrpc._schedule_rpc_coro(answer, call, loop, ""))
                answers.add(task)
                task.add_done_callback(answers.discard)
