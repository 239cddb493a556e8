"""Passes outputs from the thread that decodes to the coroutine that reads them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from loraf_serve.backends.backend import ChoiceDelta, Output, PositionLogprobs


class OutputQueue:
    """The outputs of one request. Unread ones are joined, so the queue never takes more memory than the answers.

    Create it on the loop that reads. `put` and `end` may be called from any thread and never block.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._lock = threading.Lock()  # guards everything below
        self._deltas: list[ChoiceDelta] = []
        self._prompt_logprobs: tuple[PositionLogprobs | None, ...] = ()
        self._ended = False
        self._error: Exception | None = None
        self._waking = False

    def put(self, deltas: Sequence[ChoiceDelta], prompt_logprobs: Sequence[PositionLogprobs | None] = ()) -> None:
        """Adds new parts of the answers, and the prompt's log-probabilities with the first."""
        with self._lock:
            self._deltas += deltas
            self._prompt_logprobs = self._prompt_logprobs or tuple(prompt_logprobs)
            self._wake_reader()

    def end(self, error: Exception | None) -> None:
        """Ends the queue. The reader gets what is left, then `error` if there is one."""
        with self._lock:
            self._ended, self._error = True, error
            self._wake_reader()

    def _wake_reader(self) -> None:
        if self._waking or self._loop.is_closed():
            return
        self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop was closed in between: there is no reader
            return

    async def get(self) -> Output | None:
        """The next output; None at the end. Raises the error that the queue ended with."""
        while True:
            with self._lock:
                self._wake.clear()
                self._waking = False
                deltas, self._deltas = self._deltas, []
                prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
                ended, error = self._ended, self._error
            if deltas:
                return Output(tuple(joined(deltas)), prompt_logprobs=prompt_logprobs)
            if error is not None:
                raise error
            if ended:
                return None
            await self._wake.wait()


def joined(deltas: Sequence[ChoiceDelta]) -> list[ChoiceDelta]:
    """Joins the deltas of each answer into one, in the order in which the answers first appear."""
    by_index: dict[int, list[ChoiceDelta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [_join(parts) for parts in by_index.values()]


def _join(parts: Sequence[ChoiceDelta]) -> ChoiceDelta:
    last = parts[-1]
    return ChoiceDelta(
        index=last.index,
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=tuple(position for part in parts for position in part.logprobs),
    )
