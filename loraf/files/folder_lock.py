"""A lock on a checkpoint's folder: one process at a time writes to it. Readers need none, since every file is replaced
as a whole.

    <folder>/.lock      JSON: who writes; removed at the end. Not part of the checkpoint.

The lock is the operating system's (flock), so it ends with the process, however that ends, and a file left behind by a
killed one stops nobody. Network file systems pass flock on to their servers; on one that does not know it, nothing is
locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from loraf.errors import CheckpointError, Problem
from loraf.files.bounded_file import read_bounded
from loraf.files.durable_folder import make_durably

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]  # a module otherwise

FILE_NAME = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_LONGEST = 4096  # bytes of the file

_held: Counter[str] = Counter()  # folder → how often this process holds it
_holding = threading.Lock()


@contextlib.contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Holds the lock of a folder, which is created if missing, and removed at the end if it is empty then.

    The process that holds it may take it again.

    Args:
        purpose: the command that writes, such as `loraf-train run`.

    Raises:
        CheckpointError: another process holds it; names that process. Or the folder cannot be written.
    """
    key = os.path.realpath(folder)
    with _holding:
        first = not _held[key]
        created = _make(folder) if first else []
        descriptor = _take(folder, purpose) if first else None
        _held[key] += 1
    try:
        yield
    finally:
        with _holding:
            _held[key] -= 1
            if descriptor is not None:
                _give_back(folder, descriptor)
            with contextlib.suppress(OSError):
                for made in reversed(created):
                    made.rmdir()


def _make(folder: Path) -> list[Path]:
    """Creates a folder. Returns what was created, from the top down. Raises CheckpointError."""
    try:
        return make_durably(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _take(folder: Path, purpose: str) -> int | None:
    """Returns the descriptor of the locked file, or None if the file system has no locks. Raises CheckpointError."""
    path = folder / FILE_NAME
    while fcntl is not None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise CheckpointError(_taken(folder)) from None
            if error.errno in _NOT_SUPPORTED:
                break
            raise _unwritable(path, error) from None
        if _is_still(path, descriptor):
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now(), "command": purpose}
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
            return descriptor
        os.close(descriptor)  # its holder removed it in the meantime
    return None


def _give_back(folder: Path, descriptor: int) -> None:
    path = folder / FILE_NAME
    with contextlib.suppress(OSError):
        if _is_still(path, descriptor):  # before it is unlocked: afterwards it may be another process's
            path.unlink()
    os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _taken(folder: Path) -> Problem:
    message = f"another process is writing to it{_holder(folder / FILE_NAME)}"
    remedy = "wait until it has ended, or stop it; for a second run at the same time, name another folder"
    return Problem(message, file=str(folder), remedy=remedy)


def _holder(path: Path) -> str:
    """Says who holds a lock, as far as its file tells."""
    try:
        holder = json.loads(read_bounded(path, _LONGEST))
        command, pid, host, since = (ascii(holder[name]).strip("'") for name in ("command", "pid", "host", "since"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" ({command}, process {pid} on {host}, since {since})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    remedy = "free disk space or choose a writable folder, then run the same command again"
    return CheckpointError(Problem(f"cannot be written ({error.strerror or error})", file=str(path), remedy=remedy))
