"""A word from a worker that something is over, by a named pipe.

Asking a worker through vLLM costs it a second of a processor each time: after an answer it looks for the next call in a
loop. Waiting for the pipe costs nobody anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path


class Notice:
    """The waiting end, on an asyncio loop. Used as a context.

    Attributes:
        path: for `give`, in any process of this machine.
    """

    def __enter__(self) -> Notice:
        self._given = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="loraf-"))
            self.path = str(Path(folder) / "notice")
            os.mkfifo(self.path, 0o600)
            # Open for writing as well: otherwise it reads as ended whenever no worker has it open.
            self._pipe = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
            undo.callback(os.close, self._pipe)
            self._loop.add_reader(self._pipe, self._read)
            undo.callback(self._loop.remove_reader, self._pipe)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    async def wait(self, seconds: float) -> None:
        """Until `give` is called, or was since the last wait; at most so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._given.wait(), seconds)
        self._given.clear()

    def _read(self) -> None:
        os.read(self._pipe, 4096)
        self._given.set()


def give(path: str) -> None:
    """Wakes who waits at `path`. Nothing if nobody does any more: whoever waits looks for itself now and then."""
    with contextlib.suppress(OSError):
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(pipe, b".")
        finally:
            os.close(pipe)
