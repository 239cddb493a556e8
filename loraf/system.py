"""What loraf needs from the operating system: memory that goes back to it, and work on all processors.

NumPy, hashing and `loraf.matrices.native` release the GIL, so `in_threads` runs them in parallel.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def pages(size: int) -> torch.Tensor:
    """Allocates a large buffer outside the heap, so that its memory returns to the system when it is freed.

    glibc would take it from the calling thread's arena, where the memory freed last may stay for good (malloc_trim
    leaves the top of an arena alone). NumPy would ask for huge pages, which took four times as long in a virtual
    machine. Returning a checkpoint's buffers piece by piece while its operands are packed was tried: 6,720 calls took
    0.6 s, and a load was slower by as much.

    Args:
        size: in bytes.

    Returns:
        (size,) uint8 zeros, aligned to a page.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    # Private: a shared mapping, Python's default, is backed by a file and costs more.
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def trim_heap() -> None:
    """Returns freed memory of the heap to the system, which glibc keeps when it was freed in small pieces.

    May take long; may be called on any thread. No-op where the C library has no malloc_trim (musl, macOS).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def processors() -> int:
    """Number of processors that the calling thread, and threads that it starts, may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Applies `function` to every item, on as many threads as there are processors.

    Returns:
        The results, in the order of the items.

    Raises:
        The exception of the first item that failed. Items not yet started are then skipped.
    """
    items = list(items)
    threads = min(processors(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="loraf") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
