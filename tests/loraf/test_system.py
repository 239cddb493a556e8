from __future__ import annotations

import threading
import time

import psutil
import pytest

from loraf.system import in_threads, pages, processors, trim_heap


@pytest.mark.parametrize("size", [0, 1, 63, 4097, 1 << 20])
def test_pages_are_writable_zeros_of_the_given_size(size: int) -> None:
    buffer = pages(size)
    assert buffer.shape == (size,) and not buffer.any() and buffer.data_ptr() % 64 == 0
    buffer.fill_(7)
    assert (buffer == 7).all()


def test_pages_return_to_the_system_with_the_last_view() -> None:
    process = psutil.Process()
    view = pages(1 << 26).fill_(1)[: 1 << 20]
    resident = process.memory_info().rss
    assert view[-1] == 1
    del view
    assert resident - process.memory_info().rss > 0.9 * (1 << 26)


def test_the_heap_can_be_trimmed() -> None:
    """It must not raise, whatever the C library offers."""
    trim_heap()


def test_results_of_threads_are_in_order() -> None:
    assert processors() >= 1
    assert in_threads(lambda i: i * i, range(100)) == [i * i for i in range(100)]
    assert in_threads(str, []) == []


def test_the_first_failure_is_raised() -> None:
    def fail_from_three(i: int) -> int:
        if i >= 3:
            raise ValueError(i)
        return i

    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="^3$"):
        in_threads(fail_from_three, range(50))
    deadline = time.monotonic() + 10  # threads that have started an item finish it
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
