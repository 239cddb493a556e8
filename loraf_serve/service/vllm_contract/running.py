"""Requests that run, so that their clients can end them by their ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager

from loraf_serve.v1 import generation_pb2 as pb


class RunningRequest:
    """A request that `abort` ends as the backend would end it: each answer that has not ended ends with ABORTED."""

    def __init__(self, request_id: str, client: str):
        self.key = (client, request_id)
        self._aborted = False
        self._work: asyncio.Task[None] | None = None

    def abort(self) -> None:
        """Ends the request. Idempotent."""
        self._aborted = True
        if self._work:
            self._work.cancel()

    async def pieces(
        self, source: AsyncGenerator[pb.StreamGenerateResponse], n: int
    ) -> AsyncGenerator[pb.StreamGenerateResponse]:
        """Yields the pieces of `source` until they end or the request is aborted, and closes it.

        Args:
            n: number of answers.
        """
        # Read in a task of its own, so that it can be stopped while it waits for the backend.
        queue: asyncio.Queue[pb.StreamGenerateResponse | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async with aclosing(source):
                    if self._aborted:
                        return
                    async for piece in source:
                        queue.put_nowait(piece)
            finally:
                queue.put_nowait(None)

        self._work = asyncio.create_task(read())
        unfinished = set(range(n))
        try:
            while (piece := await queue.get()) is not None:
                unfinished -= {choice.index for choice in piece.choices if choice.finish_reason}
                yield piece
            await asyncio.wait({self._work})
            if not (self._aborted and self._work.cancelled()):
                await self._work  # raises what it failed with
            if self._aborted and unfinished:
                ended = [pb.Choice(index=i, finish_reason=pb.FINISH_REASON_ABORTED) for i in sorted(unfinished)]
                yield pb.StreamGenerateResponse(choices=ended)
        finally:
            self._work.cancel()
            await asyncio.wait({self._work})


class RunningRequests:
    """The requests of all clients. Used on one asyncio loop."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str], list[RunningRequest]] = {}

    @contextmanager
    def entered(self, request_id: str, client: str) -> Iterator[RunningRequest]:
        """Holds a request that can be aborted until the context ends. Ids need not be unique.

        Args:
            client: name of the client's token.
        """
        request = RunningRequest(request_id, client)
        same = self._requests.setdefault(request.key, [])
        same.append(request)
        try:
            yield request
        finally:
            same.remove(request)
            if not same:
                del self._requests[request.key]

    def abort(self, request_ids: Iterable[str], client: str) -> None:
        """Ends the client's requests with these ids; other ids are skipped."""
        for request_id in request_ids:
            for request in self._requests.get((client, request_id), ()):
                request.abort()
