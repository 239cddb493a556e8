"""Lowers the priority of threads that share a processor with the engine."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

_NICENESS = 10


def step_back(thread: int | None = None) -> None:
    """Lowers the priority of a thread, and of threads that it starts afterwards, for good. No-op except on Linux.

    Args:
        thread: its `native_id`; None for the calling thread.
    """
    if sys.platform == "linux":  # elsewhere this would affect the whole process
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id() if thread is None else thread, _NICENESS)
