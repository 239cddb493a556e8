"""What an operand adds against ΔW: a wrong kernel is found before it answers anybody.

For two runs of rows of every piece, one at random and the last,

    y[o] = Σ_t w_t Σ_(o,j in mask t) B_t[o, j] Σ_k A[j, k] x[k]        in float64, from the checkpoint's own coordinates

must be what the operand added to zeros. The bound is what rounding explains: half a unit of the engine's dtype in the
result, and float32 sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from loraf.checkpoint import Checkpoint
from loraf.sparse import SparseB
from loraf_serve import kernels
from loraf_serve.vllm.resident.parts import Piece

_ROWS = 16  # in a run
_SUM = 1e-4  # relative to the sum of absolute values; float32 sums of 16,384 numbers stay below it


def difference(
    operand: kernels.Operand,
    pieces: Sequence[Piece],
    projections: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    output_size: int,
    seed: int,
) -> str | None:
    """What is wrong with an operand, in words; None if nothing is.

    Args:
        projections: module → its whole A (rank, d_in) in the engine's dtype.
        output_size: of the layer in this worker.
        seed: of inputs, weights and rows.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = projections[pieces[0].module].dtype
    tasks = list(checkpoint.tasks)
    width = pieces[0].columns[1] - pieces[0].columns[0]
    x = torch.randn(3, width, generator=generator).to(dtype)
    weights = torch.randn(2, len(tasks), generator=generator)
    y = torch.zeros(3, output_size, dtype=dtype)
    # Row 1 is a base row.
    operand.add_delta(y, x, kernels.Rows(torch.tensor([0, 2], dtype=torch.int32), weights))
    if y[1].any():
        return "adds to a row of the base model"
    wide = x[[0, 2]].double()
    seen = torch.zeros(output_size, dtype=torch.bool)
    for piece in pieces:
        a = projections[piece.module][:, slice(*piece.columns)].double()
        z, z_size = wide @ a.T, wide.abs() @ a.abs().T
        first, stop = piece.rows
        seen[piece.offset : piece.offset + stop - first] = True
        middle = int(torch.randint(first, max(first + 1, stop - _ROWS), (1,), generator=generator))
        for start in {middle, max(first, stop - _ROWS)}:  # the end is where a kernel has a remainder to treat
            end = min(start + _ROWS, stop)
            expected, size = torch.zeros(2, end - start).double(), torch.zeros(2, end - start).double()
            for t, task in enumerate(tasks):
                rows, cols, values = _run(checkpoint.tasks[task][piece.module], start, end)
                w = weights[:, t].double().unsqueeze(1)
                expected.index_add_(1, rows, w * z[:, cols] * values)
                size.index_add_(1, rows, w.abs() * z_size[:, cols] * values.abs())
            at = piece.offset + start - first
            found = y[[0, 2], at : at + end - start].double()
            wrong = ~((found - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + _SUM * size)
            if wrong.any():
                i, row = wrong.nonzero()[0].tolist()
                here = f"adds {found[i, row].item():.6g} in row {start + row} of {piece.module}"
                return f"{here} where ΔW gives {expected[i, row].item():.6g}"
    if y[:, ~seen].any():
        return "adds to an output that the adapter does not touch"
    return None


def _run(b: SparseB, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (from 0), columns and values of a task in the rows from `start` to before `end`."""
    rows = b.rows.numpy()
    # Bounds of the array's own dtype: another one would have all of it converted.
    low, high = (
        int(np.searchsorted(rows, rows.dtype.type(row), side)) for row, side in ((start, "left"), (end - 1, "right"))
    )
    return b.rows[low:high].long() - start, b.cols[low:high].long(), b.values[low:high].double()
