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

    A client's tokens are a bucket: it holds a minute's tokens when full and fills evenly. A request reserves what it
    may take at most. It is admitted while the bucket holds more than others have reserved; so one request may take more
    than there is, because an answer's length is not known beforehand, and the next ones wait until it is made up for.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._in_flight: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()  # tokens of requests in flight that have not been taken yet
        self._buckets: dict[str, tuple[float, float]] = {}  # client → tokens left, and when

    @contextmanager
    def enter(self, permissions: Permissions) -> Iterator[Allowance]:
        """Holds a place for one request, to the end of the context.

        Raises:
            RateLimited: one of the client's limits is reached.
        """
        client, limit = permissions.client, permissions.in_flight
        if limit is not None and self._in_flight[client] >= limit:
            raise RateLimited(f"this token has {limit} requests in flight, which is its limit", _IN_FLIGHT_RETRY)
        self._require_tokens(permissions)
        allowance = Allowance(self, permissions)
        self._in_flight[client] += 1
        try:
            yield allowance
        finally:
            self._release(client, allowance.reserved)
            self._in_flight[client] -= 1
            if not self._in_flight[client]:
                del self._in_flight[client]

    def _require_tokens(self, permissions: Permissions) -> None:
        client, per_minute = permissions.client, permissions.tokens_per_minute
        if per_minute is None:
            return
        left = self._left(client, per_minute)
        if left <= 0:
            seconds = max((1 - left) * _MINUTE / per_minute, 0.1)
            raise RateLimited(f"this token has used its {per_minute} tokens a minute", seconds)
        if left <= self._reserved[client]:
            message = f"requests in flight may take the {per_minute} tokens a minute of this token"
            raise RateLimited(message, _IN_FLIGHT_RETRY)

    def _release(self, client: str, tokens: int) -> None:
        self._reserved[client] -= tokens
        if self._reserved[client] <= 0:
            del self._reserved[client]

    def _left(self, client: str, per_minute: int) -> float:
        """Tokens in the client's bucket now."""
        left, since = self._buckets.get(client, (float(per_minute), self._now()))
        return min(left + (self._now() - since) * per_minute / _MINUTE, float(per_minute))


class Allowance:
    """What one request takes of its client's tokens. Made by `Allowances.enter`.

    Attributes:
        reserved: tokens that it has reserved and not taken.
    """

    def __init__(self, all_of_them: Allowances, permissions: Permissions):
        self._all, self._permissions = all_of_them, permissions
        self.reserved = 0

    def reserve(self, tokens: int) -> None:
        """Keeps tokens for this request: the most that it may take. Raises RateLimited."""
        if self._permissions.tokens_per_minute is None:
            return
        self._all._require_tokens(self._permissions)
        self.reserved += tokens
        self._all._reserved[self._permissions.client] += tokens

    def take(self, tokens: int) -> None:
        """Takes tokens from the bucket, first those that are reserved."""
        client, per_minute = self._permissions.client, self._permissions.tokens_per_minute
        if per_minute is None:
            return
        self._all._buckets[client] = (self._all._left(client, per_minute) - tokens, self._all._now())
        kept = min(tokens, self.reserved)
        self.reserved -= kept
        self._all._release(client, kept)
