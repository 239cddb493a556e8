"""Notifies the service, through a named pipe, that something in a worker is over.

Polling a worker through vLLM costs it a second of a processor each time, because after a call it busy-waits for the
next one. Waiting on the pipe costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path


class Notice:
    """The waiting end, on an asyncio loop. Used as a context manager.

    Attributes:
        path: to pass to `give`, in any process on this machine.
    """

    def __enter__(self) -> Notice:
        self._given = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="loraf-"))
            self.path = str(Path(folder) / "notice")
            os.mkfifo(self.path, 0o600)
            # Also open for writing: otherwise the pipe reads as ended whenever no worker has it open.
            self._pipe = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
            undo.callback(os.close, self._pipe)
            self._loop.add_reader(self._pipe, self._read)
            undo.callback(self._loop.remove_reader, self._pipe)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    async def wait(self, seconds: float) -> None:
        """Waits until `give` is called, but no longer than `seconds`. Returns at once if it was since the last wait."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._given.wait(), seconds)
        self._given.clear()

    def _read(self) -> None:
        os.read(self._pipe, 4096)
        self._given.set()


def give(path: str) -> None:
    """Wakes the waiter at `path`. No-op if there is none: a waiter also polls from time to time."""
    with contextlib.suppress(OSError):
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(pipe, b".")
        finally:
            os.close(pipe)
