"""What an operand adds against ΔW: a wrong kernel is found before it answers anybody.

For two runs of rows of every piece, one at random and the last,

    y[o] = Σ_t w_t Σ_(o,j in mask t) B_t[o, j] Σ_k A[j, k] x[k]        in float64, from the checkpoint's own coordinates

must be what the operand added to zeros. The bound is what rounding explains: half a unit of the engine's dtype in the
result, and float32 sums, relative to Σ_t |w_t| Σ |B_t[o, j]| ‖A[j]‖ ‖x‖.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from loraf.sparse import SparseB
from loraf_serve import kernels
from loraf_serve.vllm.resident.parts import Piece

_ROWS = 16  # in a run
_COLUMNS = 4096  # of A at a time
_SUM = 1e-4  # float32 sums of 16,384 numbers stay below it


def difference(
    operand: kernels.Operand,
    pieces: Sequence[Piece],
    projections: Mapping[str, torch.Tensor],
    masks: Mapping[str, Mapping[str, SparseB]],
    output_size: int,
    seed: int,
) -> str | None:
    """What is wrong with an operand, in words; None if nothing is.

    Args:
        projections: module → its whole A (rank, d_in) in the engine's dtype.
        masks: task → module → B, as in the checkpoint.
        output_size: of the layer in this worker.
        seed: of inputs, weights and rows.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = projections[pieces[0].module].dtype
    width = pieces[0].columns[1] - pieces[0].columns[0]
    x = torch.randn(3, width, generator=generator).to(dtype)
    weights = torch.randn(2, len(masks), generator=generator)
    y = torch.zeros(3, output_size, dtype=dtype, device=operand.device)
    # Row 1 is a base row.
    operand.add_delta(y, x.to(operand.device), kernels.Rows(torch.tensor([0, 2], dtype=torch.int32), weights))
    y = y.cpu()
    if y[1].any():
        return "adds to a row of the base model"
    asked, answered = x[[0, 2]], y[[0, 2]]
    seen = torch.zeros(output_size, dtype=torch.bool)
    for piece in pieces:
        z, z_size = _shrunk(projections[piece.module][:, slice(*piece.columns)], asked)
        first, stop = piece.rows
        seen[piece.offset : piece.offset + stop - first] = True
        middle = int(torch.randint(first, max(first + 1, stop - _ROWS), (1,), generator=generator))
        runs = [(start, min(start + _ROWS, stop)) for start in sorted({middle, max(first, stop - _ROWS)})]
        rows = torch.cat([torch.arange(*run) for run in runs])  # the end is where a kernel has a remainder to treat
        expected, size = _expanded([of_task[piece.module] for of_task in masks.values()], runs, weights, z, z_size)
        found = answered[:, rows + (piece.offset - first)].double()
        wrong = ~((found - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + _SUM * size)
        if wrong.any():
            i, at = wrong.nonzero()[0].tolist()
            here = f"adds {found[i, at].item():.6g} in row {rows[at]} of {piece.module}"
            return f"{here} where ΔW gives {expected[i, at].item():.6g}"
    if not seen.all() and answered[:, ~seen].any():
        return "adds to an output that the adapter does not touch"
    return None


def _shrunk(a: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_k A[j, k] x[i, k], and ‖A[j]‖ ‖x[i]‖; both (rows of x, rank) float64.

    Some columns at a time: memory that is used again comes from the cache, and the system need not clear it.
    """
    z = torch.zeros(len(x), len(a), dtype=torch.float64)
    square = torch.zeros(len(a))
    for part, columns in zip(a.split(_COLUMNS, 1), x.float().split(_COLUMNS, 1), strict=True):
        part = part.float()
        z += columns @ part.T
        square += torch.linalg.vecdot(part, part)
    return z, (x.float().norm(dim=1, keepdim=True) * square.sqrt()).double()


def _expanded(
    masks: Sequence[SparseB],
    runs: Sequence[tuple[int, int]],
    weights: torch.Tensor,
    z: torch.Tensor,
    z_size: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What runs of rows of B make of z, and what a float32 sum's error is relative to; each (rows of z, rows)."""
    rows, cols, values, counts = [], [], [], []
    before = np.cumsum([0, *(stop - start for start, stop in runs)])
    for b in masks:
        stored_rows, stored_cols = b.rows.numpy(), b.cols.numpy()
        # Numbers of another dtype would have all of it converted; a run may stop where that has no number.
        last = np.array([stop - 1 for _, stop in runs], dtype=stored_rows.dtype)
        ends = np.searchsorted(stored_rows, last, "right").tolist()
        begins = np.searchsorted(stored_rows, np.array([start for start, _ in runs], dtype=stored_rows.dtype)).tolist()
        for begin, end, (start, _), place in zip(begins, ends, runs, before, strict=False):
            rows.append(stored_rows[begin:end] + np.int64(place - start))
            cols.append(stored_cols[begin:end])
            values.append(b.values[begin:end])
        counts.append(sum(ends) - sum(begins))
    at = torch.from_numpy(np.concatenate(rows))
    columns = torch.from_numpy(np.concatenate(cols).astype(np.int64))
    task_weights = torch.repeat_interleave(weights.double(), torch.tensor(counts), dim=1)
    scaled = task_weights * torch.cat(values).double()
    nothing = torch.zeros(len(z), int(before[-1]), dtype=torch.float64)
    return nothing.index_add(1, at, scaled * z[:, columns]), nothing.index_add(1, at, scaled.abs() * z_size[:, columns])
