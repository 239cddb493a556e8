"""The layer that stands in for a target `torch.nn.Linear` while a task is trained.

    y = W·x + b + B·(A·dropout(x)),   B = α/r · (values at their positions) + Σ_earlier α_t/r · B_t

The only trainable parameter is the vector of values. For its backward pass the adapter keeps z = A·dropout(x), rank
numbers a token, and with dropout one byte for each number of x. B is built from its positions in the forward pass and
again in the backward pass; the gradient of B is made some rows at a time and read only at the positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from loraf.sparse import SparseB

GRADIENT_AT_ONCE = 1 << 18  # entries of ∂B that exist at one time: 1 MiB in float32
_LEVELS = 1 << 16  # steps in which a dropout probability is drawn


@dataclass(frozen=True)
class Earlier:
    """What earlier tasks add to B while a later one is trained: Σ α_t/r · B_t, in coordinates.

    Attributes:
        positions: (M,) int32, flat: row · rank + column.
        values: (M,) float32, scaled.
    """

    positions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, parts: Iterable[tuple[SparseB, float]]) -> Earlier:
        """From the stored (so rounded) values of each task and its α_t/r; masks are disjoint."""
        parts = list(parts)
        if not parts:
            return cls(torch.empty(0, dtype=torch.int32), torch.empty(0))
        return cls(
            torch.cat([b.flat.to(torch.int32) for b, _ in parts]),
            torch.cat([b.values.float() * scale for b, scale in parts]),
        )


class LorafLinear(nn.Module):
    """A frozen linear layer with a sparse B on a frozen A.

    Args:
        base: the layer it stands in for, (d_out, d_in); its parameters are left as they are.
        a: (rank, d_in), in the dtype of the base's weight.
        positions: (K,) flat positions of B that train, ascending; stored as int32.
        scale: α/r of the task being trained.
        earlier: the earlier tasks' part of B.
        dropout: probability that an entry of the adapter's input is zeroed while training.
        values: (K,) to start from; zeros by default. float32, or the weight's dtype where that is wider.

    Shapes: (..., d_in) → (..., d_out).
    """

    def __init__(
        self,
        base: nn.Linear,
        a: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        earlier: Earlier | None = None,
        dropout: float = 0.0,
        values: torch.Tensor | None = None,
    ):
        super().__init__()
        earlier = earlier or Earlier.of(())
        weight = base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        start = torch.zeros(len(positions)) if values is None else values
        self.base = base
        self.rank = a.shape[0]
        self.scale = scale
        self.dropout = dropout
        self.values = nn.Parameter(start.detach().to(weight.device, dtype, copy=True))
        for name, tensor in {
            "a": a.to(weight.device),
            "positions": positions.to(weight.device, torch.int32),
            "earlier_positions": earlier.positions.to(weight.device, torch.int32),
            "earlier_values": earlier.values.to(weight.device, dtype),
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        self._pieces = _pieces(positions, base.out_features, self.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _LorafLinear.apply(x, self.values, self)

    def b(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """B of all active tasks, scaled: (d_out, rank), built anew."""
        out = torch.zeros(self.base.out_features * self.rank, dtype=dtype, device=values.device)
        if len(self.earlier_positions):
            out.scatter_(0, self.earlier_positions.long(), self.earlier_values.to(dtype))
        out.scatter_(0, self.positions.long(), (values * self.scale).to(dtype))
        return out.view(-1, self.rank)

    def gradient(self, g: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """∂loss/∂values, (K,): (gᵀ·z) at the positions, times the scale. g: (tokens, d_out), z: (tokens, rank)."""
        out = torch.empty_like(self.values)
        for rows, part in self._pieces:
            entries = (g[:, rows].t() @ z).view(-1)
            at = self.positions[part] - rows.start * self.rank
            out[part] = entries.index_select(0, at)
        return out.mul_(self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, positions={len(self.positions)}, scale={self.scale:g}, dropout={self.dropout:g}"


def _pieces(positions: torch.Tensor, d_out: int, rank: int) -> list[tuple[slice, slice]]:
    """Blocks of rows of B, each with the part of the (ascending) positions that lies in it."""
    height = max(1, GRADIENT_AT_ONCE // rank)
    starts = list(range(0, d_out, height))
    rows = [slice(start, min(start + height, d_out)) for start in starts]
    borders = torch.tensor([block.stop * rank for block in rows], dtype=torch.int64)
    ends = torch.searchsorted(positions.detach().cpu().long().contiguous(), borders).tolist()
    return [
        (block, slice(begin, end)) for block, begin, end in zip(rows, [0, *ends], ends, strict=False) if end > begin
    ]


def keep_mask(shape: torch.Size, dropout: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """A random mask of `shape` (bool; True with probability 1 − dropout) and the exact probability of True.

    Drawn in steps of 2⁻¹⁶ from 64-bit numbers, four entries each: several times faster on a CPU than
    `Tensor.bernoulli_`.
    """
    dropped = round(dropout * _LEVELS)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: shape.numel()].view(shape)
    return lanes >= dropped - _LEVELS // 2, 1.0 - dropped / _LEVELS


class _LorafLinear(torch.autograd.Function):
    """Forward and backward of the whole layer, so that the adapter's part is added in place in both.

    The base's weight, A and the positions belong to the layer and are read from it; only what depends on the input is
    saved (through `save_for_backward`, so that gradient checkpointing and off-loading see it).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, values: torch.Tensor, layer: LorafLinear) -> torch.Tensor:
        y = layer.base(x)
        dtype = y.dtype  # autocast may have changed it
        x = x.reshape(-1, x.shape[-1]).to(dtype)
        mask, kept = None, 1.0
        if layer.dropout and layer.training:
            mask, kept = keep_mask(x.shape, layer.dropout, x.device)
            x = x * mask
        z = x @ layer.a.to(dtype).t()
        if mask is not None:
            z /= kept
        y.view(-1, y.shape[-1]).addmm_(z, layer.b(values, dtype).t())
        ctx.save_for_backward(z, values, mask)
        ctx.layer, ctx.kept = layer, kept
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: torch.Tensor):
        layer = ctx.layer
        z, values, mask = ctx.saved_tensors
        shape = (*g.shape[:-1], layer.base.in_features)
        g = g.reshape(-1, g.shape[-1])
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ layer.base.weight.to(g.dtype)
            through_b = (g @ layer.b(values, g.dtype)) / ctx.kept
            if mask is None:
                grad_x.addmm_(through_b, layer.a.to(g.dtype))
            else:
                grad_x.addcmul_(through_b @ layer.a.to(g.dtype), mask.to(g.dtype))
            grad_x = grad_x.view(shape)
        if ctx.needs_input_grad[1]:
            grad_values = layer.gradient(g, z)
        return grad_x, grad_values, None
