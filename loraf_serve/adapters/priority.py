"""Threads that leave the processor to the engine where they share one with it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

_NICENESS = 10


def step_back(thread: int | None = None) -> None:
    """Lowers the priority of a thread, and of those that it starts from now on. Only on Linux, and for good.

    Args:
        thread: `native_id`; None: the calling one.
    """
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id() if thread is None else thread, _NICENESS)
