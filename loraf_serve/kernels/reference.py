"""The reference kernel: computes the delta in float64, slowly. The other kernels are compared with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraf_serve.kernels.operand import BatchWeights, Extent, Operand, Part


class ReferenceOperand(Operand):
    """Holds B of every task as a dense matrix and computes one row of the batch at a time."""

    def __init__(self, parts: Sequence[Part]):
        self._extent = Extent.of(parts)
        self._parts = [
            (part.offset, part.a.double(), [b.dense(torch.float64)[part.first_row : part.stop_row] for b in part.tasks])
            for part in parts
        ]
        self.nbytes = sum(8 * (a.numel() + sum(b.numel() for b in tasks)) for _, a, tasks in self._parts)

    def add_delta(self, y: torch.Tensor, x: torch.Tensor, batch: BatchWeights) -> None:
        self._extent.check(y, x, batch)
        for i, weights in zip(batch.indices.tolist(), batch.weights.double(), strict=True):
            for offset, a, tasks in self._parts:
                z = a @ x[i].double()
                delta = sum((weight * (b @ z) for weight, b in zip(weights, tasks, strict=True)), torch.zeros(()))
                columns = slice(offset, offset + len(tasks[0]))
                y[i, columns] = (y[i, columns].double() + delta).to(y.dtype)
