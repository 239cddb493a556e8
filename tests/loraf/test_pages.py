import sys

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraf.pages import pages, release


@pytest.mark.parametrize("size", [0, 1, 63, 4097, 1 << 20])
def test_zeros_of_that_size_that_may_be_written(size: int) -> None:
    made = pages(size)
    assert made.shape == (size,) and not made.any() and made.data_ptr() % 64 == 0
    made.fill_(7)
    assert (made == 7).all()


def test_the_system_has_them_back_when_the_last_view_is_gone() -> None:
    process = psutil.Process()
    view = pages(1 << 26).fill_(1)[: 1 << 20]
    with_them = process.memory_info().rss
    assert view[-1] == 1
    del view
    assert with_them - process.memory_info().rss > 0.9 * (1 << 26)


@pytest.mark.skipif(sys.platform != "linux", reason="release does something on Linux only")
def test_released_pages_are_the_system_s_and_what_lies_beside_them_stays() -> None:
    process = psutil.Process()
    size = 1 << 26
    for whole in (pages(size + 10_000), torch.empty(size + 10_000, dtype=torch.uint8)):
        whole.fill_(5)
        with_them = process.memory_info().rss
        release(whole[5000 : 5000 + size])
        assert with_them - process.memory_info().rss > 0.9 * size
        assert (whole[:5000] == 5).all() and (whole[5000 + size :] == 5).all()


@given(st.integers(0, 9000), st.integers(0, 20_000))
def test_only_what_lies_within_is_lost(begin: int, size: int) -> None:
    whole = pages(30_000).fill_(5)
    release(whole[begin : begin + size])
    assert (whole[:begin] == 5).all() and (whole[begin + size :] == 5).all()
    assert {*whole[begin : begin + size].tolist()} <= {0, 5}
