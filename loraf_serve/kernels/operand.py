"""What a kernel is given and what it gives: parts of a layer, rows of a batch, an operand that adds a delta.

    y[i, offset_p : offset_p + d_out_p] += Σ_t w[i, t] · B_tp · (A_p · x[i])      for every row i of Rows, every part p

Sums are kept in float32; the sum with y is rounded once, to nearest, ties to even. Other rows of y are not touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from loraf.sparse import SparseB

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Part:
    """One module of an adapter within a layer of the engine, which may be fused and may be split over workers.

    Attributes:
        a: (rank, d_in), contiguous, in the engine's dtype. It is copied, so it may be freed after `prepare`.
        tasks: B of each task, in the checkpoint's order, each of shape (rows of the whole module, rank) and without a
            fault (`SparseB.fault`, which the reading of a checkpoint asks for; it is not asked again).
        first_row, stop_row: the rows of B that this worker holds; d_out = stop_row − first_row.
        offset: the first column of the layer's output that this part adds to.
    """

    a: torch.Tensor
    tasks: Sequence[SparseB]
    first_row: int
    stop_row: int
    offset: int

    @property
    def d_out(self) -> int:
        return self.stop_row - self.first_row

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch that an adapter acts on. Made once a step, read by every layer.

    Attributes:
        indices: (m,) int32, ascending.
        weights: (m, T) float32, task weight · α/r.

    Raises:
        ValueError: another dtype, layout or order.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    # Kept here so that a call for a layer reads plain numbers.
    count: int = field(init=False)
    tasks: int = field(init=False)
    stop: int = field(init=False)  # one more than the last index
    indices_address: int = field(init=False)
    weights_address: int = field(init=False)

    def __post_init__(self) -> None:
        indices, weights = self.indices, self.weights
        if indices.dtype != torch.int32 or indices.ndim != 1 or not indices.is_contiguous():
            raise ValueError("indices must be a contiguous int32 vector")
        if weights.dtype != torch.float32 or weights.ndim != 2 or not weights.is_contiguous():
            raise ValueError("weights must be a contiguous float32 matrix")
        if weights.shape[0] != indices.shape[0]:
            raise ValueError(f"{indices.shape[0]} indices but {weights.shape[0]} rows of weights")
        plain = indices.tolist()
        if any(a >= b for a, b in zip(plain, plain[1:], strict=False)) or (plain and plain[0] < 0):
            raise ValueError("indices must be ascending and not negative")
        values = {
            "count": len(plain),
            "tasks": weights.shape[1],
            "stop": plain[-1] + 1 if plain else 0,
            "indices_address": indices.data_ptr(),
            "weights_address": weights.data_ptr(),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


class Operand(ABC):
    """An adapter's parts of one layer, packed for one kernel. Calls may come from several threads at once.

    Attributes:
        nbytes: bytes of memory held.
        device: where it computes.
    """

    nbytes: int
    device = torch.device("cpu")

    @abstractmethod
    def add_delta(self, y: torch.Tensor, x: torch.Tensor, rows: Rows) -> None:
        """Adds the delta to rows of y in place; the formula is at the top of this file.

        The native kernel gives a row the same bits whatever the other rows are and however many threads there are.

        Args:
            y: (n, columns) in the dtype of A, last dimension contiguous, any row stride.
            x: (n, d_in) likewise; must not overlap y.
            rows: with one weight for each task of the parts.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """


@dataclass(frozen=True)
class Extent:
    """What the tensors of a call must look like."""

    dtype: torch.dtype
    d_in: int
    columns: int  # at least
    tasks: int

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Extent:
        """Checks the parts against each other.

        Raises:
            ValueError: with what does not fit, all of it.
        """
        if not parts:
            raise ValueError("no parts")
        first = parts[0]
        wrong = [f"part {i}: {text}" for i, part in enumerate(parts) for text in _faults(part, first)]
        spans = sorted((part.offset, part.offset + part.d_out) for part in parts)
        if any(stop > start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False)):
            wrong.append("two parts add to the same columns")
        if wrong:
            raise ValueError("; ".join(wrong))
        return cls(first.a.dtype, first.a.shape[1], max(stop for _, stop in spans), len(first.tasks))

    def check(self, y: torch.Tensor, x: torch.Tensor, rows: Rows) -> tuple[int, int]:
        """The row strides of y and x. It runs for each layer of each step, so it asks a tensor for little.

        Between two layers the weights of the base model go through the caches, so every first look at something costs:
        42 µs for a call that does nothing were measured, 21 of them in ctypes, 3 to 7 for each kind of question.

        Raises:
            ValueError: the call's tensors do not fit.
        """
        n, d_in = x.shape
        height, columns = y.shape
        x_row, x_column = x.stride()
        y_row, y_column = y.stride()
        if (
            y.dtype is self.dtype
            and x.dtype is self.dtype
            and d_in == self.d_in
            and columns >= self.columns
            and n == height >= rows.stop
            and rows.tasks == self.tasks
            and (y_column == 1 or columns == 1)
            and (x_column == 1 or d_in == 1)
        ):
            return y_row, x_row
        raise ValueError(
            f"y {tuple(y.shape)} {y.dtype} strides {y.stride()}, x {tuple(x.shape)} {x.dtype} strides {x.stride()}, "
            f"rows up to {rows.stop}, {rows.tasks} tasks do not fit an operand of {self}"
        )


def _faults(part: Part, first: Part) -> list[str]:
    found = []
    a = part.a
    if a.ndim != 2 or a.dtype not in DTYPES or not a.is_contiguous() or a.device.type != "cpu" or not a.numel():
        return ["A must be a contiguous matrix of bfloat16, float16 or float32 in main memory"]
    if not part.tasks:
        found.append("no tasks")
    if a.dtype != first.a.dtype or a.shape[1] != first.a.shape[1]:
        found.append("A differs from the first part's in dtype or d_in")
    if len(part.tasks) != len(first.tasks):
        found.append(f"{len(part.tasks)} tasks, the first part has {len(first.tasks)}")
    if not 0 <= part.first_row < part.stop_row or part.offset < 0:
        found.append(f"rows {part.first_row} to {part.stop_row} at offset {part.offset}")
    for t, b in enumerate(part.tasks):
        if b.shape[1] != part.rank or b.shape[0] < part.stop_row:
            found.append(
                f"B of task {t} has shape {b.shape}, A is {tuple(a.shape)}, rows up to {part.stop_row} are needed"
            )
    return found
