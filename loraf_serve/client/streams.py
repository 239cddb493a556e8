"""Streams of pieces: what `stream` of both clients returns."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

import grpc

from loraf_serve.client.errors import service_error
from loraf_serve.client.results import Answer, Piece, answer_of, joined, pieces_of
from loraf_serve.v1.generation_pb2 import StreamGenerateResponse

# The generators know no stream, so that a stream that nobody holds is closed at once: without a circle of references.


def _read(start: Callable[[], Any], address: str, messages: list[StreamGenerateResponse]) -> Generator[Piece]:
    call = start()
    try:
        for message in call:
            messages.append(message)
            yield from pieces_of(message)
    except grpc.RpcError as error:
        raise service_error(error, address) from None
    finally:
        call.cancel()


async def _read_async(
    start: Callable[[], Any], address: str, messages: list[StreamGenerateResponse]
) -> AsyncGenerator[Piece]:
    call = start()
    try:
        async for message in call:
            messages.append(message)
            for piece in pieces_of(message):
                yield piece
    except grpc.RpcError as error:
        raise service_error(error, address) from None
    finally:
        call.cancel()


class Stream(Iterator[Piece]):
    """The pieces of an answer as they are generated. The request is sent when the first one is asked for.

    Leaving the loop early, or `close`, cancels the request.
    """

    def __init__(self, start: Callable[[], Any], address: str):
        self._messages: list[StreamGenerateResponse] = []
        self._pieces = _read(start, address, self._messages)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._pieces.close()

    def answer(self) -> Answer:
        """Reads the pieces that are left, and returns the whole answer. Raises ServiceError."""
        for _ in self._pieces:
            pass
        return answer_of(joined(self._messages))


class AsyncStream(AsyncIterator[Piece]):
    """As `Stream`, for `async for` and `async with`."""

    def __init__(self, start: Callable[[], Any], address: str):
        self._messages: list[StreamGenerateResponse] = []
        self._pieces = _read_async(start, address, self._messages)

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels the request unless it has ended."""
        await self._pieces.aclose()

    async def answer(self) -> Answer:
        """Reads the pieces that are left, and returns the whole answer. Raises ServiceError."""
        async for _ in self._pieces:
            pass
        return answer_of(joined(self._messages))
