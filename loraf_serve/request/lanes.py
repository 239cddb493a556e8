"""Threads in which requests are read: short requests never wait for long ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loraf_serve.request.prompts import PromptReader

T = TypeVar("T")

SHORT = 16_384  # characters; read within milliseconds


class Lanes:
    """Two threads, each with its own tokenizer: one for short requests, one for long ones.

    A client that sends many long requests delays only other long ones.

    Args:
        reader: makes a reader.
    """

    def __init__(self, reader: Callable[[], PromptReader]):
        self._lanes = {
            name: (ThreadPoolExecutor(1, thread_name_prefix=f"reading-{name}"), reader()) for name in ("short", "long")
        }

    @property
    def any_reader(self) -> PromptReader:
        """A reader for the calling thread, while no request is read in a lane."""
        return self._lanes["long"][1]

    async def run(self, characters: int, read: Callable[[PromptReader], T]) -> T:
        """Runs `read` in the lane for a request of so many characters."""
        thread, reader = self._lanes["short" if characters <= SHORT else "long"]
        return await asyncio.get_running_loop().run_in_executor(thread, read, reader)

    def close(self) -> None:
        """Ends the threads."""
        for thread, _ in self._lanes.values():
            thread.shutdown(wait=False, cancel_futures=True)
