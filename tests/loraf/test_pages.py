import psutil
import pytest

from loraf.pages import pages


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
