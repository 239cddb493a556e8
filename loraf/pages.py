"""Memory for large buffers that goes back to the system at once, whole or in parts."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_DONTNEED = 4  # Linux's MADV_DONTNEED


def pages(size: int) -> torch.Tensor:
    """(size,) uint8, zeros, aligned to a page, in pages of its own.

    glibc would take it from the calling thread's arena, where memory that was freed last may stay for good
    (malloc_trim leaves the top of an arena alone). NumPy would ask for huge pages, which took four times as long in a
    virtual machine.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def release(tensor: torch.Tensor) -> None:
    """Gives the pages that lie wholly within a tensor back to the system; its numbers are lost. Only on Linux.

    Args:
        tensor: contiguous, in main memory that is no map of a file, used by nobody any more.
    """
    if sys.platform != "linux":
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _DONTNEED)
