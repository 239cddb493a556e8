"""Folders whose entries are on disk when a function returns: a new name survives a crash only once its parent is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def make_durably(folder: Path) -> list[Path]:
    """Creates a folder, and those above it that are missing, and flushes their names to disk.

    Returns:
        What was created, from the top down.

    Raises:
        OSError: it cannot be created, or the disk fails.
    """
    missing = [path for path in (*reversed(folder.absolute().parents), folder.absolute()) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in dict.fromkeys(path.parent for path in missing):
        with contextlib.suppress(PermissionError):  # a parent in which one may write, but not list
            flush_folder(parent)
    return missing


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
