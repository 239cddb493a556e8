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
_COLUMNS = 4096  # of A at a time
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
    asked, answered = x[[0, 2]], y[[0, 2]]
    seen = torch.zeros(output_size, dtype=torch.bool)
    for piece in pieces:
        z, z_size = _shrunk(projections[piece.module][:, slice(*piece.columns)], asked)
        masks = [checkpoint.tasks[task][piece.module] for task in tasks]
        first, stop = piece.rows
        seen[piece.offset : piece.offset + stop - first] = True
        middle = int(torch.randint(first, max(first + 1, stop - _ROWS), (1,), generator=generator))
        starts = {middle, max(first, stop - _ROWS)}  # the end is where a kernel has a remainder to treat
        rows = torch.cat([torch.arange(start, min(start + _ROWS, stop)) for start in starts])
        expected, size = _expanded(masks, rows, weights, z, z_size)
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
    """Σ_k A[j, k] x[i, k] in float64, and the sum of absolute values, roughly; both (rows of x, rank).

    Some columns at a time: memory that is used again comes from the cache, and the system need not clear it.
    """
    z = torch.zeros(len(x), len(a), dtype=torch.float64)
    size = torch.zeros(len(x), len(a))
    for part, columns in zip(a.split(_COLUMNS, 1), x.split(_COLUMNS, 1), strict=True):
        z += columns.double() @ part.double().T
        size += columns.float().abs() @ part.float().abs().T
    return z, size.double()


def _expanded(
    masks: Sequence[SparseB], rows: torch.Tensor, weights: torch.Tensor, z: torch.Tensor, z_size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What some rows of B make of z, and the sum of absolute values; each (rows of z, rows)."""
    runs = [_entries(b, rows) for b in masks]
    at = torch.from_numpy(np.concatenate([places for places, _ in runs]))
    task = torch.repeat_interleave(torch.tensor([len(places) for places, _ in runs]))
    cols = torch.cat([b.cols[entries].long() for b, (_, entries) in zip(masks, runs, strict=True)])
    values = torch.cat([b.values[entries].double() for b, (_, entries) in zip(masks, runs, strict=True)])
    scaled = weights.double()[:, task] * values
    nothing = torch.zeros(len(z), len(rows), dtype=torch.float64)
    return nothing.index_add(1, at, scaled * z[:, cols]), nothing.index_add(1, at, scaled.abs() * z_size[:, cols])


def _entries(b: SparseB, rows: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """The entries of B in these rows: the place of each one's row in `rows`, and its number among all."""
    stored = b.rows.numpy()
    wanted = rows.numpy().astype(stored.dtype)  # numbers of another dtype would have all of it converted
    begin, end = np.searchsorted(stored, wanted, "left"), np.searchsorted(stored, wanted, "right")
    count = end - begin
    places = np.repeat(np.arange(len(wanted)), count)
    return places, torch.from_numpy(np.arange(len(places)) + np.repeat(begin - (np.cumsum(count) - count), count))
