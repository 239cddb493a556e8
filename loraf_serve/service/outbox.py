"""Messages on their way to a client that may read more slowly than they are made."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from loraf_serve.errors import ReadsTooSlowly

MAX_WAITING_BYTES = 8 << 20  # of one answer, beyond what gRPC and the network have taken
STALL_SECONDS = 60.0  # in which a client takes nothing
_ROOM_SECONDS = 1.0  # to make room when that many bytes wait


class Sized(Protocol):
    """A message that knows its size."""

    def ByteSize(self) -> int: ...


M = TypeVar("M", bound=Sized)


class Outbox(Generic[M]):
    """Writes messages in their order while the next ones are made.

    Leaving the context waits until all are written, also after an error of the maker of the messages; not if the client
    is gone or reads too slowly.

    Args:
        write: sends one message; returns when the transport has taken it.
    """

    def __init__(self, write: Callable[[M], Awaitable[None]]):
        self._write = write
        self._waiting: deque[tuple[M, int]] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self._written = asyncio.Event()
        self._complete = False

    async def __aenter__(self) -> Outbox[M]:
        self._writer = asyncio.create_task(self._write_all())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, asyncio.CancelledError | TimeoutError | ReadsTooSlowly):
                self._complete = True
                self._news.set()
                await self._writer
        finally:
            self._writer.cancel()
            if self._writer.done() and not self._writer.cancelled():
                self._writer.exception()  # seen, or less important than the error that ends the context

    async def put(self, message: M) -> None:
        """Adds a message.

        Raises:
            ReadsTooSlowly: more than MAX_WAITING_BYTES would wait, or the client has taken nothing for STALL_SECONDS.
        """
        if self._writer.done():
            await self._writer  # raises what it failed with
        size = message.ByteSize()
        if self._waiting and self._bytes + size > MAX_WAITING_BYTES:
            await self._wait_for_room(size)
        self._waiting.append((message, size))
        self._bytes += size
        self._news.set()

    async def _wait_for_room(self, size: int) -> None:
        """A burst is given a moment: the client may only not have had its turn yet. Raises ReadsTooSlowly."""
        try:
            async with asyncio.timeout(_ROOM_SECONDS):
                while self._waiting and self._bytes + size > MAX_WAITING_BYTES:
                    self._written.clear()
                    await self._written.wait()
        except TimeoutError:
            waiting = f"more than {MAX_WAITING_BYTES:,} bytes of the answer wait for the client to read them"
            raise ReadsTooSlowly(waiting) from None

    async def _write_all(self) -> None:
        while True:
            while self._waiting:
                message, size = self._waiting[0]  # counts until it is written
                try:
                    async with asyncio.timeout(STALL_SECONDS):
                        await self._write(message)
                except TimeoutError:
                    message_text = f"the client has read nothing for {STALL_SECONDS:g} s"
                    raise ReadsTooSlowly(message_text) from None
                self._waiting.popleft()
                self._bytes -= size
                self._written.set()
            if self._complete:
                return
            self._news.clear()
            await self._news.wait()
