"""The interface of a kernel: parts of a layer, the weights of a batch, and an operand that adds the delta.

    y[i, offset_p : offset_p + d_out_p] += Σ_t w[i, t] · B_tp · (A_p · x[i])    for each row i of the batch, each part p

Sums are kept in float32. The sum with y is rounded once, to nearest, ties to even. Other rows of y are not touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from loraf.matrices.sparse import SparseB

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Part:
    """One module of an adapter within an engine's layer, which may be fused and may be split over workers.

    Attributes:
        a: (rank, d_in), contiguous, in the engine's dtype. Copied, so it may be freed after `prepare`.
        tasks: B of each task, in the checkpoint's order, each of shape (rows of the whole module, rank). They must be
            free of faults: `SparseB.fault` is checked when a checkpoint is read, and not again here.
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
class BatchWeights:
    """The rows of a batch that an adapter acts on, with their task weights. Built once per step, read by every layer.

    Attributes:
        indices: (m,) int32, the rows, ascending.
        weights: (m, T) float32, task weight · α/r.
        count: m.
        tasks: T.
        stop: one more than the last index.
        indices_address, weights_address: of the tensors' memory.

    Raises:
        ValueError: wrong dtype, layout or order.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    # Stored, so that a call per layer reads plain numbers.
    count: int = field(init=False)
    tasks: int = field(init=False)
    stop: int = field(init=False)
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
        rows = indices.tolist()
        if any(a >= b for a, b in zip(rows, rows[1:], strict=False)) or (rows and rows[0] < 0):
            raise ValueError("indices must be ascending and not negative")
        values = {
            "count": len(rows),
            "tasks": weights.shape[1],
            "stop": rows[-1] + 1 if rows else 0,
            "indices_address": indices.data_ptr(),
            "weights_address": weights.data_ptr(),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


class Operand(ABC):
    """An adapter's parts of one layer, packed for one kernel. Thread-safe.

    Attributes:
        nbytes: bytes of memory held.
        device: the device that computes.
    """

    nbytes: int
    device = torch.device("cpu")

    @abstractmethod
    def add_delta(self, y: torch.Tensor, x: torch.Tensor, batch: BatchWeights) -> None:
        """Adds the delta to rows of y in place. The formula is at the top of this file.

        With the native kernel a row's result has the same bits regardless of the other rows and the number of threads.

        Args:
            y: (n, columns) in the dtype of A, last dimension contiguous, any row stride.
            x: (n, d_in), with the same requirements. Must not overlap y.
            batch: one weight for each task of the parts.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """


@dataclass(frozen=True)
class Extent:
    """The shapes and dtype that the tensors of a call must have.

    Attributes:
        columns: the minimum for y.
    """

    dtype: torch.dtype
    d_in: int
    columns: int
    tasks: int

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Extent:
        """Checks the parts against each other.

        Raises:
            ValueError: lists every mismatch.
        """
        if not parts:
            raise ValueError("no parts")
        first = parts[0]
        faults = [f"part {i}: {text}" for i, part in enumerate(parts) for text in _faults(part, first)]
        spans = sorted((part.offset, part.offset + part.d_out) for part in parts)
        if any(stop > start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False)):
            faults.append("two parts add to the same columns")
        if faults:
            raise ValueError("; ".join(faults))
        return cls(first.a.dtype, first.a.shape[1], max(stop for _, stop in spans), len(first.tasks))

    def check(self, y: torch.Tensor, x: torch.Tensor, batch: BatchWeights) -> tuple[int, int]:
        """Returns the row strides of y and x. Runs for each layer of each step, so it reads few tensor attributes.

        Between two layers the base model's weights evict everything else from the caches, so every first access is
        slow: an empty call took 42 µs, 21 of them in ctypes and 3 to 7 for each kind of attribute.

        Raises:
            ValueError: the tensors do not fit the operand.
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
            and n == height >= batch.stop
            and batch.tasks == self.tasks
            and (y_column == 1 or columns == 1)
            and (x_column == 1 or d_in == 1)
        ):
            return y_row, x_row
        raise ValueError(
            f"y {tuple(y.shape)} {y.dtype} strides {y.stride()}, x {tuple(x.shape)} {x.dtype} strides {x.stride()}, "
            f"rows up to {batch.stop}, {batch.tasks} tasks do not fit an operand of {self}"
        )


def _faults(part: Part, first: Part) -> list[str]:
    faults = []
    a = part.a
    if a.ndim != 2 or a.dtype not in DTYPES or not a.is_contiguous() or a.device.type != "cpu" or not a.numel():
        return ["A must be a contiguous matrix of bfloat16, float16 or float32 in main memory"]
    if not part.tasks:
        faults.append("no tasks")
    if a.dtype != first.a.dtype or a.shape[1] != first.a.shape[1]:
        faults.append("A differs from the first part's in dtype or d_in")
    if len(part.tasks) != len(first.tasks):
        faults.append(f"{len(part.tasks)} tasks, but the first part has {len(first.tasks)}")
    if not 0 <= part.first_row < part.stop_row or part.offset < 0:
        faults.append(f"rows {part.first_row} to {part.stop_row} at offset {part.offset}")
    for t, b in enumerate(part.tasks):
        if b.shape[1] != part.rank or b.shape[0] < part.stop_row:
            faults.append(
                f"B of task {t} has shape {b.shape}, but A is {tuple(a.shape)}, and {part.stop_row} rows are needed"
            )
    return faults
