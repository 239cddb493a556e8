"""Folders whose entries are on disk when a function returns: a new name survives a crash only once its parent is.

Files are written under temporary names, which a killed process leaves behind; the next one that writes removes them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?:loraf\.json|.+\.safetensors)\.(\d+)\.tmp")  # see `temporary_name`


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


def temporary_name(target: Path) -> Path:
    """Returns the name under which this process writes a file before it takes the target's place."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Removes a checkpoint's temporary files that processes left behind which no longer run. Ignores the rest."""
    with contextlib.suppress(OSError):  # they do no harm
        for folder in folders:
            for file in folder.glob(".*.tmp"):
                match = _TEMPORARY.fullmatch(file.name)
                if match and not _is_running(int(match[1])):
                    file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether another process of this machine has this id."""
    if process == os.getpid():  # in a container the killed process may have had the same
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
