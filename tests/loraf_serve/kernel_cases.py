"""Random layers for the tests of kernels, the formula in NumPy's float64, and how far a kernel may be from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from loraf.sparse import SparseB
from loraf_serve.kernels import Part, Rows, why_not_native

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = (1, 3, 8, 16, 17, 32, 33, 64, 65, 100, 128, 129, 255, 256, 257, 300)
EXPONENT_BITS_OF_ULP = {torch.bfloat16: (7, -133), torch.float16: (10, -24), torch.float32: (23, -149)}


COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
# Where there is a compiler, a library that is missing or unusable is a failure, and no reason to skip.
needs_native = pytest.mark.skipif(
    COMPILER is None and why_not_native() is not None, reason="no C++ compiler, so no native kernel"
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@dataclass
class Case:
    parts: list[Part]
    x: torch.Tensor
    y: torch.Tensor  # a view with other columns before and after it
    whole_y: torch.Tensor
    rows: Rows

    def fresh_y(self) -> torch.Tensor:
        """Another y with the same contents, strides and surroundings."""
        whole = self.whole_y.clone()
        return whole.as_strided(self.y.shape, self.y.stride(), self.y.storage_offset())


def random_b(generator: torch.Generator, d_out: int, rank: int, density: float, dtype: torch.dtype) -> SparseB:
    count = int(density * d_out * rank)
    flat = torch.randperm(d_out * rank, generator=generator)[:count]
    return SparseB.from_flat(flat, torch.randn(count, generator=generator).to(dtype), (d_out, rank))


def disjoint_bs(
    generator: torch.Generator, tasks: int, d_out: int, rank: int, density: float, dtype: torch.dtype
) -> list[SparseB]:
    """B of each task; no position twice, as in a checkpoint."""
    count = min(int(density * d_out * rank), d_out * rank // tasks)
    flat = torch.randperm(d_out * rank, generator=generator)[: tasks * count].view(tasks, count)
    return [
        SparseB.from_flat(of_task, torch.randn(count, generator=generator).to(dtype), (d_out, rank)) for of_task in flat
    ]


def strided(generator: torch.Generator, height: int, width: int, before: int, after: int, dtype: torch.dtype):
    """A (height, width) view into a wider matrix, and that matrix."""
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
    acting: int | None = None,  # rows
    margins: tuple[int, int] = (0, 0),  # columns, rows of B
    idle: float = 0.3,  # share of weights that are zero
    disjoint: bool = False,
    sets: int | None = None,  # distinct rows of weights; None: as many as rows
) -> Case:
    g = torch.Generator().manual_seed(seed)
    gap, hidden = margins
    parts, offset = [], gap
    for rank, d_out in shapes:
        a = (torch.randn(rank, d_in, generator=g) / d_in**0.5).to(dtype)
        height = d_out + 2 * hidden
        several = (
            disjoint_bs(g, tasks, height, rank, density, value_dtype)
            if disjoint
            else [random_b(g, height, rank, density, value_dtype) for _ in range(tasks)]
        )
        parts.append(Part(a, several, hidden, hidden + d_out, offset))
        offset += d_out + gap
    x, _ = strided(g, n, d_in, gap, gap // 2, dtype)
    y, whole_y = strided(g, n, offset, gap, gap // 2, dtype)
    acting = n if acting is None else acting
    indices = torch.randperm(n, generator=g)[:acting].sort().values.to(torch.int32)
    weights = torch.randn(acting, tasks, generator=g)
    weights[torch.rand(acting, tasks, generator=g) < idle] = 0
    if sets is not None:
        weights = weights[:sets][torch.arange(acting) * sets // max(acting, 1)].contiguous()
    return Case(parts, x, y, whole_y, Rows(indices, weights))


@st.composite
def cases(draw, most_rows: int = 40, dtypes: tuple[torch.dtype, ...] = DTYPES, disjoint: bool = False) -> Case:
    """Disjoint ones have values in the dtype of A."""
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
    """y + delta in float64, the sum of the magnitudes of all that is added, and the most terms of a sum."""
    result = numbers(case.y).copy()
    size = np.abs(result)
    rows = case.rows.indices.numpy()
    x, w = numbers(case.x)[rows], numbers(case.rows.weights)
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


def allowed(case: Case, given: torch.Tensor, rounded: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The right result, and how far from it a float32 sum, rounded once to the dtype of y, may be.

    A sum of n terms in float32, each term a product, in any order and fused or not, is wrong by at most
    n·u / (1 − n·u) of the sum of magnitudes, u = 2^-24 (Higham, Accuracy and Stability, 3.1). On the way from x to y
    a term takes part in at most d_in + T·rank + 4 roundings (the products with x, B and w, and the sum with y make
    four), so n is that. Long sums are held to 1e-5 instead, which is less. The last rounding adds half a unit in the
    last place of the result, whose exponent is that of the larger of the right and the given one.

    Args:
        rounded: how far a kernel may round A x besides, relative to it.
    """
    right, size, terms = exact(case)
    roundings = terms + 4
    accumulated = min(roundings * 2.0**-24 / (1 - roundings * 2.0**-24), 1e-5) * size
    bits, least = EXPONENT_BITS_OF_ULP[given.dtype]
    magnitude = np.maximum(np.maximum(np.abs(right), np.abs(numbers(given))), 2.0**-140)
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
    """All but the acting rows in the parts' columns: the same bits, also in the memory around y."""
    storage = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())
    expected = case.whole_y.clone()
    view = expected.as_strided(y.shape, y.stride(), y.storage_offset())
    for part in case.parts:
        columns = slice(part.offset, part.offset + part.d_out)
        view[case.rows.indices.long(), columns] = y[case.rows.indices.long(), columns]
    assert torch.equal(bits(storage), bits(expected.view(-1)))
