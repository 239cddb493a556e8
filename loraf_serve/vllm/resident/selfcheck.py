"""Compares an operand's output with ΔW, so that a wrong kernel is found before it serves a request.

For two runs of rows of every part, one at random and the last, the operand must add to zeros

    y[o] = Σ_t w_t Σ_(o,j in mask t) B_t[o, j] Σ_k A[j, k] x[k]        in float64, from the checkpoint's own coordinates

The tolerance covers rounding: half a unit of the engine's dtype in the result, and the error of float32 sums, relative
to Σ_t |w_t| Σ |B_t[o, j]| ‖A[j]‖ ‖x‖.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from loraf.matrices.sparse import SparseB
from loraf_serve import kernels
from loraf_serve.vllm.worker.parts import LayerPart

_ROWS = 16  # in a run
_COLUMNS = 4096  # of A at a time
_SUM_ERROR = 1e-4  # relative; float32 sums of 16,384 numbers stay below it


def difference(
    operand: kernels.Operand,
    layer_parts: Sequence[LayerPart],
    projections: Mapping[str, torch.Tensor],
    tasks: Mapping[str, Mapping[str, SparseB]],
    output_size: int,
    seed: int,
) -> str | None:
    """Returns a description of what is wrong with an operand, or None if it is right.

    Args:
        projections: module → its whole A, (rank, d_in) in the engine's dtype.
        tasks: task → module → B, as in the checkpoint.
        output_size: of the layer in this worker.
        seed: of the random inputs, weights and rows.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = projections[layer_parts[0].module].dtype
    width = layer_parts[0].columns[1] - layer_parts[0].columns[0]
    x = torch.randn(3, width, generator=generator).to(dtype)
    weights = torch.randn(2, len(tasks), generator=generator)
    y = torch.zeros(3, output_size, dtype=dtype, device=operand.device)
    # Row 1 is a base row.
    operand.add_delta(y, x.to(operand.device), kernels.BatchWeights(torch.tensor([0, 2], dtype=torch.int32), weights))
    y = y.cpu()
    if y[1].any():
        return "adds to a row of the base model"
    inputs, deltas = x[[0, 2]], y[[0, 2]]
    touched = torch.zeros(output_size, dtype=torch.bool)
    for part in layer_parts:
        z, z_size = _shrink(projections[part.module][:, slice(*part.columns)], inputs)
        first, stop = part.rows
        touched[part.offset : part.offset + stop - first] = True
        middle = int(torch.randint(first, max(first + 1, stop - _ROWS), (1,), generator=generator))
        runs = [(start, min(start + _ROWS, stop)) for start in sorted({middle, max(first, stop - _ROWS)})]
        rows = torch.cat([torch.arange(*run) for run in runs])  # the last rows, because kernels treat a remainder there
        expected, size = _expand([modules[part.module] for modules in tasks.values()], runs, weights, z, z_size)
        actual = deltas[:, rows + (part.offset - first)].double()
        wrong = ~((actual - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + _SUM_ERROR * size)
        if wrong.any():
            i, column = wrong.nonzero()[0].tolist()
            actual_text = f"adds {actual[i, column].item():.6g} in row {rows[column]} of {part.module}"
            return f"{actual_text} where ΔW gives {expected[i, column].item():.6g}"
    if not touched.all() and deltas[:, ~touched].any():
        return "adds to an output that the adapter does not touch"
    return None


def _shrink(a: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns Σ_k A[j, k] x[i, k] and ‖A[j]‖ ‖x[i]‖, both (rows of x, rank) float64.

    Takes some columns at a time, because reused memory is in the cache and need not be cleared by the system.
    """
    z = torch.zeros(len(x), len(a), dtype=torch.float64)
    square = torch.zeros(len(a))
    for a_columns, x_columns in zip(torch.split(a, _COLUMNS, 1), torch.split(x.float(), _COLUMNS, 1), strict=True):
        a_columns = a_columns.float()
        z += x_columns @ a_columns.T
        square += torch.linalg.vecdot(a_columns, a_columns)
    return z, (x.float().norm(dim=1, keepdim=True) * square.sqrt()).double()


def _expand(
    b_of_tasks: Sequence[SparseB],
    runs: Sequence[tuple[int, int]],
    weights: torch.Tensor,
    z: torch.Tensor,
    z_size: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the product of z with runs of rows of B, and the magnitude to which a float32 sum's error is relative.
    Both are (rows of z, rows) float64."""
    rows, cols, values, counts = [], [], [], []
    before = np.cumsum([0, *(stop - start for start, stop in runs)])
    for b in b_of_tasks:
        stored_rows, stored_cols = b.rows.numpy(), b.cols.numpy()
        # In the dtype of the rows, or NumPy would convert all of them. `stop` itself may not fit that dtype.
        last = np.array([stop - 1 for _, stop in runs], dtype=stored_rows.dtype)
        ends = np.searchsorted(stored_rows, last, "right").tolist()
        begins = np.searchsorted(stored_rows, np.array([start for start, _ in runs], dtype=stored_rows.dtype)).tolist()
        for begin, end, (start, _), place in zip(begins, ends, runs, before, strict=False):
            rows.append(stored_rows[begin:end] + np.int64(place - start))
            cols.append(stored_cols[begin:end])
            values.append(b.values[begin:end])
        counts.append(sum(ends) - sum(begins))
    row_indices = torch.from_numpy(np.concatenate(rows))
    columns = torch.from_numpy(np.concatenate(cols).astype(np.int64))
    task_weights = torch.repeat_interleave(weights.double(), torch.tensor(counts), dim=1)
    scaled = task_weights * torch.cat(values).double()
    zeros = torch.zeros(len(z), int(before[-1]), dtype=torch.float64)
    product = zeros.index_add(1, row_indices, scaled * z[:, columns])
    return product, zeros.index_add(1, row_indices, scaled.abs() * z_size[:, columns])
