"""Admits task sets to the engine: at most as many as it has slots, each in turn.

While all slots are taken, vLLM's scheduler skips a waiting request whose LoRA is not running and starts later requests
whose LoRA is. So a steady stream for a few sets would keep every other set waiting forever. Therefore sets are admitted
here, in the order in which they began to wait; a set with a request of a lower priority number goes first. As soon as a
set waits, one admitted set is closed: its running requests finish, its new ones queue, and the next set gets its slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

_Turn = tuple[int, "asyncio.Future[None]"]  # priority, and what is waited for


class SlotAdmission:
    """Admits requests to `slots` slots. All requests of a set share its slot."""

    def __init__(self, slots: int):
        self._slots = slots
        self._running: dict[Hashable, int] = {}  # admitted set → its requests, in order of admission
        self._closed: list[Hashable] = []  # admitted sets that take no more requests, in order of closing
        self._waiting: dict[Hashable, list[_Turn]] = {}  # in the order in which sets began to wait
        self._ended: Exception | None = None

    @property
    def admitted(self) -> frozenset[Hashable]:
        return frozenset(self._running)

    def end(self, error: Exception) -> None:
        """Stops admitting: waiting and later requests raise `error`."""
        self._ended = error
        waiting, self._waiting = self._waiting, {}
        for turns in waiting.values():
            for _, turn in turns:
                if not turn.done():
                    turn.set_exception(error)

    @asynccontextmanager
    async def slot(self, key: Hashable, priority: int = 0) -> AsyncIterator[None]:
        """Waits until the set `key` has a slot, and holds it. Of the sets that wait, that with the lowest `priority` of
        a request is next."""
        await self._acquire(key, priority)
        try:
            yield
        finally:
            self._release(key)

    async def _acquire(self, key: Hashable, priority: int) -> None:
        if self._ended is not None:
            raise self._ended
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append((priority, turn))
        self._settle()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release(key)
            else:
                self._forget(key, turn)
            raise

    def _release(self, key: Hashable) -> None:
        self._running[key] -= 1
        self._settle()

    def _forget(self, key: Hashable, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(key, [])
        others = [other for other in turns if other[1] is not turn]
        if len(others) < len(turns):
            self._waiting[key] = others
            if not others:
                del self._waiting[key]
            self._settle()

    def _settle(self) -> None:
        """Updates admitted, closed and waiting sets after any change."""
        for key in [key for key, requests in self._running.items() if requests == 0]:
            del self._running[key]
            if key in self._closed:
                self._closed.remove(key)
        for key in sorted(self._waiting, key=lambda key: min(priority for priority, _ in self._waiting[key])):
            if key in self._running:
                if key not in self._closed:
                    self._admit(key)
            elif len(self._running) < self._slots:
                self._admit(key)
        without_slot = sum(key not in self._running for key in self._waiting)
        while len(self._closed) > without_slot:
            key = self._closed.pop()
            if key in self._waiting:
                self._admit(key)
        while len(self._closed) < min(without_slot, len(self._running)):
            open_sets = [key for key in self._running if key not in self._closed]
            self._closed.append(min(open_sets, key=lambda key: self._running[key]))  # likely the first to become empty

    def _admit(self, key: Hashable) -> None:
        for _, turn in self._waiting.pop(key):
            if not turn.done():  # a cancelled request has not left the queue yet
                self._running[key] = self._running.get(key, 0) + 1
                turn.set_result(None)
