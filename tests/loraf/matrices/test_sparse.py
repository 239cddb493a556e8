"""SparseB: coordinates in the smallest index dtype, and every fault of untrusted data reported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf.matrices.sparse import SparseB, index_dtype

pytestmark = pytest.mark.usefixtures("with_and_without_library")


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.uint16),
        (65_536, torch.uint16),
        (65_537, torch.int32),
        (2**31, torch.int32),
    ],
)
def test_index_dtype_is_the_smallest(size, dtype):
    assert index_dtype(size) == dtype
    assert torch.iinfo(dtype).max >= size - 1


@st.composite
def masks(draw):
    d_out = draw(st.sampled_from([1, 2, 7, 256, 257, 300, 65_536, 65_537, 100_000]))
    rank = draw(st.sampled_from([1, 3, 16, 256, 257, 300]))
    size = d_out * rank
    corners = st.sampled_from([0, size - 1, size // 2, min(rank, size - 1), max(0, size - rank)])
    positions = draw(st.lists(st.one_of(st.integers(0, size - 1), corners), max_size=40, unique=True))
    values = draw(st.lists(st.floats(-100, 100, width=16), min_size=len(positions), max_size=len(positions)))
    return (d_out, rank), dict(zip(positions, values, strict=True))


@settings(deadline=None)
@given(masks(), st.sampled_from([torch.float32, torch.float16]))
def test_from_positions_in_any_order_and_back(case, dtype):
    (d_out, rank), entries = case
    positions = torch.tensor(list(entries), dtype=torch.int64)
    b = SparseB.from_positions(positions, torch.tensor(list(entries.values()), dtype=dtype), (d_out, rank))
    expected = sorted((position // rank, position % rank, value) for position, value in entries.items())
    assert list(zip(b.rows.tolist(), b.cols.tolist(), b.values.tolist(), strict=True)) == expected
    assert b.positions.tolist() == sorted(entries)
    assert b.rows.dtype == index_dtype(d_out)
    assert b.cols.dtype == index_dtype(rank)
    assert b.values.dtype == dtype
    assert b.fault() is None


def test_a_zero_value_stays_in_the_mask():
    b = SparseB.from_positions(torch.tensor([5, 1]), torch.tensor([0.0, -0.0]), (2, 4))
    assert b.positions.tolist() == [1, 5]
    assert len(b.values) == 2
    assert not b.dense().any()


def test_dense_by_hand():
    b = SparseB.from_positions(torch.tensor([3, 0, 4]), torch.tensor([3.0, 1.0, 2.0], dtype=torch.bfloat16), (2, 3))
    assert b.dense().tolist() == [[1, 0, 0], [3, 2, 0]]
    assert b.dense().dtype == torch.float32
    assert b.dense(torch.bfloat16).dtype == torch.bfloat16


def test_values_are_detached():
    values = torch.ones(2, requires_grad=True)
    b = SparseB.from_positions(torch.tensor([1, 0]), values, (2, 2))
    assert not b.values.requires_grad
    with torch.no_grad():
        values.zero_()
    assert b.values.tolist() == [1, 1]


def tensors(rows=(0, 0, 2), cols=(0, 3, 1), values=(1.0, 2.0, 3.0), row_dtype=torch.uint8, col_dtype=torch.uint8):
    return torch.tensor(rows, dtype=row_dtype), torch.tensor(cols, dtype=col_dtype), torch.tensor(values)


SMALL = (3, 4)


@pytest.mark.parametrize(
    ("rows", "cols", "values", "fault"),
    [
        ((0, 0, 2), (0, 3, 1), (1.0, 2.0), "not three vectors of one length"),
        ((0, 0, 3), (0, 3, 1), (1.0, 2.0, 3.0), "a row lies outside"),
        ((0, 0, 2), (0, 4, 1), (1.0, 2.0, 3.0), "a column lies outside"),
        ((0, 0, 2), (3, 0, 1), (1.0, 2.0, 3.0), "not unique and sorted"),
        ((2, 0, 0), (1, 0, 3), (1.0, 2.0, 3.0), "not unique and sorted"),
        ((0, 0, 0), (0, 3, 3), (1.0, 2.0, 3.0), "not unique and sorted"),
        ((0, 0, 2), (0, 3, 1), (1.0, float("nan"), 3.0), "not finite"),
        ((0, 0, 2), (0, 3, 1), (1.0, float("inf"), 3.0), "not finite"),
        ((0, 0, 2), (0, 3, 1), (1, 2, 3), "values are torch.int64"),
    ],
)
def test_each_fault_is_reported(rows, cols, values, fault):
    assert fault in SparseB(*tensors(rows, cols, values), SMALL).fault()


def test_a_valid_matrix_has_no_fault():
    assert SparseB(*tensors(), SMALL).fault() is None


def test_wrong_shapes_and_dtypes_are_reported():
    rows, cols, values = tensors()
    assert "vectors" in SparseB(rows.view(3, 1), cols.view(3, 1), values.view(3, 1), SMALL).fault()
    assert "vectors" in SparseB(rows[0], cols[0], values[0], SMALL).fault()
    assert "index dtype" in SparseB(rows.to(torch.int32), cols, values, SMALL).fault()
    assert "index dtype" in SparseB(rows, cols.to(torch.float32), values, SMALL).fault()
    assert "index dtype" in SparseB(rows, cols, values, (300, 4)).fault()
    for dtype in (torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool):
        assert f"values are {dtype}" in SparseB(rows, cols, values.to(dtype), SMALL).fault()


def test_negative_coordinates_of_a_large_matrix_are_reported():
    """int32 is the only signed index dtype."""
    shape = (70_000, 70_000)
    wide = {"row_dtype": torch.int32, "col_dtype": torch.int32}
    assert SparseB(*tensors(**wide), shape).fault() is None
    assert "a row lies outside" in SparseB(*tensors(rows=(-1, 0, 2), **wide), shape).fault()
    assert "a column lies outside" in SparseB(*tensors(cols=(-1, 3, 1), **wide), shape).fault()


def test_an_empty_mask_is_valid():
    b = SparseB.from_positions(torch.empty(0, dtype=torch.int64), torch.empty(0), (5, 4))
    assert b.fault() is None
    assert b.dense().tolist() == [[0.0] * 4] * 5
