"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
from grpc import aio

from loraf_serve.client import calls
from loraf_serve.client.connection import Connection
from loraf_serve.client.errors import DeadlineExceeded, ServiceError, Unavailable, service_error
from loraf_serve.client.request_message import request_of
from loraf_serve.client.results import AdapterList, Answer, ServerInfo
from loraf_serve.client.streams import AsyncStream
from loraf_serve.v1 import adapter_pb2, generation_pb2

T = TypeVar("T")


class AsyncClient(Connection):
    """`Client` for asyncio: the same arguments, methods and errors.

        async with AsyncClient("127.0.0.1:50051") as client:
            answer = await client.generate("2 + 3 =", tasks=["math"])
            async for piece in client.stream("2 + 3 =", tasks=["math"]):
                print(piece, end="", flush=True)

    Use it as an asynchronous context manager, or await `close`. It may be made anywhere; it connects at its first call
    and belongs to the event loop of that call. Cancelling the task that awaits an answer cancels the request.
    """

    _loop: asyncio.AbstractEventLoop | None = None
    _channel: aio.Channel | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Requests that still run are cancelled."""
        if self._channel:
            await self._channel.close(grace=None)

    async def generate(self, prompt: str | None = None, *, timeout: float | None = None, **request: Any) -> Answer:
        """As `Client.generate`."""
        return await self._call(calls.generate(prompt, request), timeout)

    def stream(self, prompt: str | None = None, *, timeout: float | None = None, **request: Any) -> AsyncStream:
        """As `Client.stream`, for `async for`; not to be awaited itself."""
        message = request_of(generation_pb2.StreamGenerateRequest, prompt, **request)
        limits = self._limits(timeout)
        return AsyncStream(lambda: self._connected().generation.StreamGenerate(message, **limits), self.address)

    async def adapters(self, *, timeout: float | None = None) -> AdapterList:
        """As `Client.adapters`."""
        return await self._call(calls.list_adapters(), timeout)

    async def load_adapter(
        self,
        name: str,
        path: str,
        tasks: Sequence[str] | None = None,
        replace: bool = False,
        *,
        timeout: float | None = None,
    ) -> adapter_pb2.Adapter:
        """As `Client.load_adapter`."""
        return await self._call(calls.load_adapter(name, path, tasks, replace), timeout)

    async def unload_adapter(self, name: str, *, timeout: float | None = None) -> adapter_pb2.UnloadAdapterResponse:
        """As `Client.unload_adapter`."""
        return await self._call(calls.unload_adapter(name), timeout)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """As `Client.server_info`."""
        return await self._call(calls.server_info(), timeout)

    async def health(self, *, timeout: float | None = None) -> str:
        """As `Client.health`."""
        return await self._call(calls.health(), timeout)

    async def wait_until_serving(self, timeout: float | None = None) -> None:
        """As `Client.wait_until_serving`."""
        waiting = calls.Waiting(timeout)
        while (outcome := await self._probe(waiting.probe_seconds())) != calls.SERVING:
            await asyncio.sleep(waiting.pause_after(outcome))

    async def _probe(self, timeout: float) -> str | ServiceError:
        try:
            return await self.health(timeout=timeout)
        except (Unavailable, DeadlineExceeded) as error:
            return error

    async def _call(self, call: calls.UnaryCall[T], timeout: float | None) -> T:
        try:
            response = await call.method(self._connected())(call.request, **self._limits(timeout))
        except grpc.RpcError as error:
            raise service_error(error, self.address) from None
        return call.read(response)

    def _connected(self) -> calls.Stubs:
        """The stubs of this event loop; connects at the first call."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            if self._credentials:
                self._channel = aio.secure_channel(self.address, self._credentials, self._options)
            else:
                self._channel = aio.insecure_channel(self.address, self._options)
            self._loop, self._stubs = loop, calls.Stubs(self._channel)
        elif self._loop is not loop:
            raise RuntimeError("this AsyncClient belongs to another event loop; make one for each loop")
        return self._stubs
