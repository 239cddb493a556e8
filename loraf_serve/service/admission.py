"""Admits requests: none while the server loads or drains, otherwise up to a limit at a time.

grpc's `maximum_concurrent_rpcs` is not used because it would count health checks too.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Iterator
from contextlib import contextmanager

from loraf_serve.errors import NotServing, QueueFull

_SMOOTHING = 0.1  # weight of the newest request in the mean duration
_FIRST_GUESS = 1.0  # seconds; mean duration before any request has ended
_RETRY_BOUNDS = (0.1, 60.0)  # seconds


class _State(enum.Enum):
    LOADING = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


class Admission:
    """Counts requests in flight (waiting and running). Used on one asyncio loop.

    Args:
        limit: maximum number of requests in flight.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_flight = 0
        self._state = _State.LOADING
        self._reason = "the model is still loading"
        self._mean_seconds = _FIRST_GUESS
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        return self._state is _State.OPEN

    @property
    def refusal(self) -> NotServing | None:
        """Why no request is admitted; None if requests are admitted as long as there is a place."""
        return None if self.is_open else NotServing(self._reason)

    def open(self) -> None:
        """Admits requests from now on. No-op if closed."""
        if self._state is _State.LOADING:
            self._state = _State.OPEN

    def close(self, reason: str) -> None:
        """Refuses all requests from now on, for good. No-op if already closed: the first reason stays."""
        if self._state is not _State.CLOSED:
            self._state, self._reason = _State.CLOSED, reason

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Holds a place for one request.

        Raises:
            NotServing: loading or closed.
            QueueFull: no place is free.
        """
        if self.refusal:
            raise self.refusal
        if self.in_flight >= self.limit:
            raise QueueFull(self.limit, self.retry_after())
        self.in_flight += 1
        self._empty.clear()
        began = time.monotonic()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._mean_seconds += _SMOOTHING * (time.monotonic() - began - self._mean_seconds)
            if self.in_flight == 0:
                self._empty.set()

    def retry_after(self) -> float:
        """Estimated seconds until a place is free.

        Little's law: `limit` requests of mean duration d in flight free a place every d / limit seconds.
        """
        low, high = _RETRY_BOUNDS
        return min(max(self._mean_seconds / self.limit, low), high)

    async def wait_empty(self, seconds: float) -> bool:
        """Waits up to `seconds` until no request is in flight. Returns whether that is so."""
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            return False
        return True
