"""Requests in flight and tokens a minute of each client. Used on one asyncio loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraf_serve.errors import RateLimited
from loraf_serve.security.permissions import Permissions

_MINUTE = 60.0  # seconds
_IN_FLIGHT_RETRY = 1.0  # seconds, after a client's limit on requests in flight


class Allowances:
    """What every client has left of its limits.

    A client's tokens are a bucket: it holds a minute's tokens when full, fills evenly, and may go below zero by the
    request that empties it, because an answer's length is not known beforehand. While it is empty, requests wait.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._in_flight: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}  # client → tokens left, and when

    @contextmanager
    def enter(self, permissions: Permissions) -> Iterator[Callable[[int], None]]:
        """Holds a place for one request. Yields a function that takes tokens from the client's bucket.

        Raises:
            RateLimited: one of the client's limits is reached.
        """
        client, limit = permissions.client, permissions.in_flight
        if limit is not None and self._in_flight[client] >= limit:
            raise RateLimited(f"this token has {limit} requests in flight, which is its limit", _IN_FLIGHT_RETRY)
        per_minute = permissions.tokens_per_minute
        if per_minute is not None and (left := self._left(client, per_minute)) <= 0:
            seconds = max((1 - left) * _MINUTE / per_minute, 0.1)
            raise RateLimited(f"this token has used its {per_minute} tokens a minute", seconds)

        def take(tokens: int) -> None:
            if per_minute is not None:
                self._buckets[client] = (self._left(client, per_minute) - tokens, self._now())

        self._in_flight[client] += 1
        try:
            yield take
        finally:
            self._in_flight[client] -= 1
            if not self._in_flight[client]:
                del self._in_flight[client]

    def _left(self, client: str, per_minute: int) -> float:
        """Tokens in the client's bucket now."""
        left, since = self._buckets.get(client, (float(per_minute), self._now()))
        return min(left + (self._now() - since) * per_minute / _MINUTE, float(per_minute))
