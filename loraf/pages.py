"""Memory for large buffers that goes back to the system at once."""

from __future__ import annotations

import mmap

import torch


def pages(size: int) -> torch.Tensor:
    """(size,) uint8, zeros, aligned to a page, in pages of its own.

    glibc would take it from the calling thread's arena, where memory that was freed last may stay for good
    (malloc_trim leaves the top of an arena alone). NumPy would ask for huge pages, which took four times as long in a
    virtual machine. Giving a checkpoint's own back piece by piece while its operands are packed was tried: 6,720 calls
    took 0.6 s, and a load was slower by as much.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    # Private: memory that may be shared, Python's choice, is a file's and costs more.
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
