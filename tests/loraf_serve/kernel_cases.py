"""Random layers for kernel tests, the formula in NumPy's float64, and the error a kernel may have."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from loraf.matrices.sparse import SparseB
from loraf_serve.kernels import BatchWeights, Part, why_not_native
from tests.tools import needs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = (1, 3, 8, 16, 17, 32, 33, 64, 65, 100, 128, 129, 255, 256, 257, 300)
EXPONENT_BITS_OF_ULP = {torch.bfloat16: (7, -133), torch.float16: (10, -24), torch.float32: (23, -149)}


COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
# With a compiler, a missing or unusable library is a failure, not a reason to skip.
needs_native = pytest.mark.skipif(COMPILER is None and why_not_native() is not None, reason=needs("C++ compiler"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=needs("C++ compiler"))


@dataclass
class Case:
    parts: list[Part]
    x: torch.Tensor
    y: torch.Tensor  # a view with other columns before and after it
    whole_y: torch.Tensor
    batch: BatchWeights

    def fresh_y(self) -> torch.Tensor:
        """Returns another y with the same contents, strides and surrounding memory."""
        whole = self.whole_y.clone()
        return whole.as_strided(self.y.shape, self.y.stride(), self.y.storage_offset())


def random_b(generator: torch.Generator, d_out: int, rank: int, density: float, dtype: torch.dtype) -> SparseB:
    count = int(density * d_out * rank)
    positions = torch.randperm(d_out * rank, generator=generator)[:count]
    return SparseB.from_positions(positions, torch.randn(count, generator=generator).to(dtype), (d_out, rank))


def disjoint_bs(
    generator: torch.Generator, tasks: int, d_out: int, rank: int, density: float, dtype: torch.dtype
) -> list[SparseB]:
    """Returns B of each task. No position occurs twice, as in a checkpoint."""
    count = min(int(density * d_out * rank), d_out * rank // tasks)
    positions = torch.randperm(d_out * rank, generator=generator)[: tasks * count].view(tasks, count)
    return [
        SparseB.from_positions(of_task, torch.randn(count, generator=generator).to(dtype), (d_out, rank))
        for of_task in positions
    ]


def strided(generator: torch.Generator, height: int, width: int, before: int, after: int, dtype: torch.dtype):
    """Returns a (height, width) view into a wider matrix, and that matrix."""
    whole = torch.randn(height, before + width + after, generator=generator).to(dtype)
    return whole[:, before : before + width], whole


def make_case(
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    value_dtype: torch.dtype = torch.bfloat16,
    shapes: tuple[tuple[int, int], ...] = ((64, 300),),  # (rank, d_out) of each part
    d_in: int = 96,
    tasks: int = 4,
    density: float = 0.1,
    n: int = 16,
    acting: int | None = None,  # number of acting rows; None for all
    margins: tuple[int, int] = (0, 0),  # columns, rows of B
    idle: float = 0.3,  # share of weights that are zero
    disjoint: bool = False,
    sets: int | None = None,  # number of distinct rows of weights; None for as many as rows
) -> Case:
    g = torch.Generator().manual_seed(seed)
    gap, hidden = margins
    parts, offset = [], gap
    for rank, d_out in shapes:
        a = (torch.randn(rank, d_in, generator=g) / d_in**0.5).to(dtype)
        height = d_out + 2 * hidden
        b_of_tasks = (
            disjoint_bs(g, tasks, height, rank, density, value_dtype)
            if disjoint
            else [random_b(g, height, rank, density, value_dtype) for _ in range(tasks)]
        )
        parts.append(Part(a, b_of_tasks, hidden, hidden + d_out, offset))
        offset += d_out + gap
    x, _ = strided(g, n, d_in, gap, gap // 2, dtype)
    y, whole_y = strided(g, n, offset, gap, gap // 2, dtype)
    acting = n if acting is None else acting
    indices = torch.randperm(n, generator=g)[:acting].sort().values.to(torch.int32)
    weights = torch.randn(acting, tasks, generator=g)
    weights[torch.rand(acting, tasks, generator=g) < idle] = 0
    if sets is not None:
        weights = weights[:sets][torch.arange(acting) * sets // max(acting, 1)].contiguous()
    return Case(parts, x, y, whole_y, BatchWeights(indices, weights))


@st.composite
def cases(draw, most_rows: int = 40, dtypes: tuple[torch.dtype, ...] = DTYPES, disjoint: bool = False) -> Case:
    """Random cases. Disjoint ones have values in the dtype of A."""
    n = draw(st.integers(1, most_rows))
    dtype = draw(st.sampled_from(dtypes))
    return make_case(
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=dtype,
        value_dtype=dtype if disjoint else draw(st.sampled_from(DTYPES)),
        shapes=tuple(
            draw(
                st.lists(
                    st.tuples(st.sampled_from(RANKS), st.one_of(st.integers(1, 40), st.integers(200, 530))),
                    min_size=1,
                    max_size=3,
                )
            )
        ),
        d_in=draw(st.one_of(st.integers(1, 40), st.integers(500, 1030))),
        tasks=draw(st.integers(1, 10)),
        density=draw(st.sampled_from((0.0, 0.02, 0.1, 0.5))),
        n=n,
        acting=draw(st.integers(0, n)),
        margins=draw(st.tuples(st.integers(0, 5), st.integers(0, 300))),
        idle=draw(st.sampled_from((0.0, 0.3, 0.9))),
        disjoint=disjoint,
        sets=draw(st.sampled_from((None, 1, 3))) if disjoint else None,
    )


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def exact(case: Case) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns y + delta in float64, the sum of the terms' magnitudes, and the largest number of terms in a sum."""
    result = numbers(case.y).copy()
    size = np.abs(result)
    rows = case.batch.indices.numpy()
    x, w = numbers(case.x)[rows], numbers(case.batch.weights)
    terms = 0
    for part in case.parts:
        a = numbers(part.a)
        columns = slice(part.offset, part.offset + part.d_out)
        for t, b in enumerate(part.tasks):
            dense = np.zeros(b.shape)
            dense[b.rows.numpy().astype(int), b.cols.numpy().astype(int)] = numbers(b.values)
            dense = dense[part.first_row : part.stop_row]
            result[rows, columns] += w[:, t : t + 1] * (x @ a.T @ dense.T)
            size[rows, columns] += np.abs(w[:, t : t + 1]) * (np.abs(x) @ np.abs(a).T @ np.abs(dense).T)
        terms = max(terms, a.shape[1] + len(part.tasks) * part.rank)
    return result, size, terms


def allowed(case: Case, y: torch.Tensor, rounded: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the right result, and the error that a float32 sum, rounded once to the dtype of y, may have.

    A float32 sum of n products, in any order and fused or not, has an error of at most n·u / (1 − n·u) times the sum of
    magnitudes, u = 2^-24 (Higham, Accuracy and Stability, 3.1). From x to y a term goes through at most
    d_in + T·rank + 4 roundings (four for the products with x, B and w and the sum with y), so n is that. Long sums are
    held to the smaller bound 1e-5. The last rounding adds half a unit in the last place of the result, with the
    exponent of the larger of the right result and y.

    Args:
        rounded: relative error that a kernel may add by rounding A x.
    """
    right, size, terms = exact(case)
    roundings = terms + 4
    accumulated = min(roundings * 2.0**-24 / (1 - roundings * 2.0**-24), 1e-5) * size
    bits, least = EXPONENT_BITS_OF_ULP[y.dtype]
    magnitude = np.maximum(np.maximum(np.abs(right), np.abs(numbers(y))), 2.0**-140)
    half_ulp = 0.5 * np.exp2(np.maximum(np.floor(np.log2(magnitude)) - bits, least))
    return right, accumulated + rounded * size + half_ulp


def assert_right(case: Case, y: torch.Tensor, rounded: float = 0.0) -> None:
    right, tolerance = allowed(case, y, rounded)
    worst = np.abs(numbers(y) - right) / tolerance
    assert worst.max(initial=0) <= 1, (
        f"{worst.max():.3g} times the allowed error at {np.unravel_index(worst.argmax(), worst.shape)}"
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_rest_untouched(case: Case, y: torch.Tensor) -> None:
    """All other elements, including the memory around y, must have the same bits as before."""
    storage = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())
    expected = case.whole_y.clone()
    view = expected.as_strided(y.shape, y.stride(), y.storage_offset())
    for part in case.parts:
        columns = slice(part.offset, part.offset + part.d_out)
        view[case.batch.indices.long(), columns] = y[case.batch.indices.long(), columns]
    assert torch.equal(bits(storage), bits(expected.view(-1)))
