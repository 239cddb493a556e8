"""Opens files that may be anything: a pipe, on which reading would never end, or a device without an end."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def open_regular(path: Path) -> FileIO:
    """Opens a regular file for reading, without a buffer.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
        ValueError: the path is invalid (it contains a null byte).
    """
    mode = os.stat(path).st_mode  # before it is opened: opening a pipe would wait for a writer
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return FileIO(path, "rb")


def read_bounded(path: Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes.

    Raises:
        OSError: as `open_regular`, or the file is larger.
        ValueError: as `open_regular`.
    """
    with open_regular(path) as stream:
        size = os.stat(stream.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read", str(path))
        data = bytearray()
        while len(data) <= size and (piece := stream.read(size + 1 - len(data))):
            data += piece
        if len(data) > size:  # it grows while it is read
            raise OSError(errno.EBUSY, "it was changed while it was read", str(path))
        return bytes(data)
