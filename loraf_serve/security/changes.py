"""Notices that files have changed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_LOOK_SECONDS = 1.0  # at least, between looks at the disk


class Changes:
    """Whether any of some files has changed since the last look. May be used from several threads.

    A replaced link is a change too: that is how Kubernetes replaces secrets.

    Args:
        files: are looked at now.
        seconds: least time between looks.
    """

    def __init__(self, files: Sequence[Path], seconds: float = _LOOK_SECONDS):
        self._files = tuple(files)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._state = self._look()
        self._next = time.monotonic() + seconds

    def seen(self) -> bool:
        """Whether a file has changed since this last returned True, or since the beginning."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return False
            self._next = now + self._seconds
            before, self._state = self._state, self._look()
            return self._state != before

    def forget(self) -> None:
        """Makes the next look see a change, because this one could not be used."""
        with self._lock:
            self._state = ()

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_identity, self._files))


def _identity(file: Path) -> tuple[int, int, int] | None:
    try:
        info = os.stat(file)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size
