"""The layer that replaces a target `torch.nn.Linear` while a task is trained.

    y = W·x + b + B·(A·dropout(x)),   B = α/r · (values at their positions) + Σ_earlier α_t/r · B_t

The only trainable parameter is the vector of values. For the backward pass the adapter saves z = A·dropout(x), rank
numbers per token. B is built from its positions, and dropout's mask drawn by token (adapter.dropout), in the forward
pass and again in the backward pass. The gradient of B is computed a block of rows at a time and read only at the
positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from loraf.errors import ConfigError, Problem
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.dropout import ModuleDraws, keep_rate, random_mask
from loraf_train.adapter.probe import WatchedWeight
from loraf_train.adapter.weights import weight_of

GRADIENT_AT_ONCE = 1 << 18  # entries of ∂B computed at a time: 1 MiB in float32


@dataclass(frozen=True)
class EarlierTasks:
    """The earlier tasks' part of B while a later task is trained: Σ α_t/r · B_t.

    Attributes:
        positions: (M,) int32.
        values: (M,) float32, scaled by α_t/r.
    """

    positions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, parts: Iterable[tuple[SparseB, float]]) -> EarlierTasks:
        """Builds it from each task's stored (rounded) B and its α_t/r. No two tasks share a position."""
        parts = list(parts)
        if not parts:
            return cls(torch.empty(0, dtype=torch.int32), torch.empty(0))
        return cls(
            torch.cat([b.positions.to(torch.int32) for b, _ in parts]),
            torch.cat([b.values.float() * scale for b, scale in parts]),
        )


class TaskValues(nn.Module):
    """A task's trainable values in one layer, and the part of B that they are trained on top of.

    Args:
        weight: of the layer, for its dtype and device.
        shape: of B, (d_out, rank).
        positions: (K,) trainable positions of B, ascending; stored as int32.
        scale: α/r of the task being trained.
        earlier: the earlier tasks' part of B; None: there is none.
        dropout: probability that an entry of the adapter's input is zeroed during training.
        values: (K,) initial values, float32 or the weight's dtype if that is wider; None: zeros.
    """

    positions: torch.Tensor
    earlier_positions: torch.Tensor
    earlier_values: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        shape: tuple[int, int],
        positions: torch.Tensor,
        scale: float,
        earlier: EarlierTasks | None = None,
        dropout: float = 0.0,
        values: torch.Tensor | None = None,
    ):
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        initial = torch.zeros(len(positions)) if values is None else values
        self.out_features, self.rank = shape
        self.scale = scale
        self.dropout = dropout
        self.values = nn.Parameter(initial.detach().to(weight.device, dtype, copy=True))
        self.register_buffer("positions", positions.to(weight.device, torch.int32), persistent=False)
        for name in ("earlier_positions", "earlier_values"):
            self.register_buffer(name, None, persistent=False)
        self.stand_on(earlier or EarlierTasks.of(()))
        self._row_blocks = block_rows(positions, self.out_features, self.rank)

    def stand_on(self, earlier: EarlierTasks) -> None:
        """Replaces the earlier tasks' part of B."""
        self.earlier_positions = earlier.positions.to(self.positions.device, torch.int32)
        self.earlier_values = earlier.values.to(self.positions.device, self.values.dtype)

    def b(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Builds B of all active tasks, scaled: (d_out, rank)."""
        out = torch.zeros(self.out_features * self.rank, dtype=dtype, device=values.device)
        if len(self.earlier_positions):
            out.scatter_(0, self.earlier_positions.long(), self.earlier_values.to(dtype))
        out.scatter_(0, self.positions.long(), (values * self.scale).to(dtype))
        return out.view(-1, self.rank)

    def gradient(self, g: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Returns ∂loss/∂values, (K,): scale · gᵀ·z at the positions. g: (tokens, d_out), z: (tokens, rank)."""
        out = torch.empty_like(self.values)
        for rows, part in self._row_blocks:
            entries = (g[:, rows].t() @ z).view(-1)
            out[part] = entries.index_select(0, self.positions[part] - rows.start * self.rank)
        return out.mul_(self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, positions={len(self.positions)}, scale={self.scale:g}, dropout={self.dropout:g}"


class Adapted(Protocol):
    """What `adapt` computes with: a frozen linear layer, A, and B as a function of a task's values.

    Attributes:
        base: the layer itself, (d_out, d_in).
        a: (rank, d_in).
        draws: draws the masks of dropout; None: torch's generator draws them, and the backward pass keeps them.
    """

    @property
    def base(self) -> nn.Linear: ...

    @property
    def a(self) -> torch.Tensor: ...

    @property
    def dropout(self) -> float: ...

    @property
    def training(self) -> bool: ...

    @property
    def draws(self) -> ModuleDraws | None: ...

    def b(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def gradient(self, g: torch.Tensor, z: torch.Tensor) -> torch.Tensor: ...


def adapt(x: torch.Tensor, values: torch.Tensor, layer: Adapted) -> torch.Tensor:
    """Returns the layer's output with the adapter's part: (..., d_in) → (..., d_out)."""
    y: torch.Tensor = _LorafLinear.apply(x, values, layer)  # type: ignore[no-untyped-call]  # of torch
    return y


class LorafLinear(TaskValues):
    """A frozen linear layer with a sparse B on a frozen A.

    Args:
        base: the layer it replaces, (d_out, d_in); never changed.
        a: (rank, d_in), in the dtype of the base's weight.
        positions, scale, earlier, dropout, values: see TaskValues.

    Attributes:
        draws: see Adapted.

    Shapes: (..., d_in) → (..., d_out).
    """

    a: torch.Tensor

    def __init__(
        self,
        base: nn.Linear,
        a: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        earlier: EarlierTasks | None = None,
        dropout: float = 0.0,
        values: torch.Tensor | None = None,
    ):
        shape = (base.out_features, a.shape[0])
        super().__init__(base.weight, shape, positions, scale, earlier, dropout, values)
        self.base = base
        self.in_features = base.in_features
        self.draws: ModuleDraws | None = None
        self.register_buffer("a", a.to(base.weight.device), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code that asks for its dtype or device; computing with it would leave out B·A."""
        return WatchedWeight.of(self.base.weight, refuse_use)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return adapt(x, self.values, self)


def refuse_use() -> None:
    """What a WatchedWeight of a layer with an adapter calls."""
    message = "the model computes with the weight of a target module itself, and so leaves out the adapter"
    raise ConfigError(Problem(message, "adapter.target_modules", remedy="choose other modules"))


def block_rows(positions: torch.Tensor, d_out: int, rank: int) -> list[tuple[slice, slice]]:
    """Splits B into blocks of rows, each with the slice of the (ascending) positions in it; skips empty blocks."""
    height = max(1, GRADIENT_AT_ONCE // rank)
    rows = [slice(start, min(start + height, d_out)) for start in range(0, d_out, height)]
    borders = torch.tensor([block.stop * rank for block in rows], dtype=torch.int64)
    ends = torch.searchsorted(positions.detach().cpu().long().contiguous(), borders).tolist()
    return [
        (block, slice(begin, end)) for block, begin, end in zip(rows, [0, *ends], ends, strict=False) if end > begin
    ]


class _LorafLinear(torch.autograd.Function):
    """Forward and backward pass of the whole layer, so that both add the adapter's part in place.

    The base's weight, A and the positions are read from the layer; only what depends on the input is saved (through
    `save_for_backward`, so that gradient checkpointing and offloading see it).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, layer: Adapted) -> torch.Tensor:
        y: torch.Tensor = layer.base(x)
        dtype = y.dtype  # autocast may have changed it
        shape = x.shape
        x = x.reshape(-1, shape[-1]).to(dtype)
        ctx.dropout = layer.dropout if layer.training else 0.0
        token_keys = mask = None
        if ctx.dropout and layer.draws is not None:
            token_keys = layer.draws.tokens.keys  # one tensor for all layers
            x = x * layer.draws.mask(token_keys, shape, ctx.dropout)
        elif ctx.dropout:
            mask = random_mask(x.shape, ctx.dropout, x.device)
            x = x * mask
        z = x @ layer.a.to(dtype).t()
        if ctx.dropout:
            z /= keep_rate(ctx.dropout)
        y.view(-1, y.shape[-1]).addmm_(z, layer.b(values, dtype).t())
        ctx.save_for_backward(z, values, token_keys, mask)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        layer = ctx.layer
        z, values, token_keys, mask = ctx.saved_tensors
        shape = torch.Size((*g.shape[:-1], layer.base.in_features))
        g = g.reshape(-1, g.shape[-1])
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ weight_of(layer.base).to(g.dtype)
            through_b = (g @ layer.b(values, g.dtype)) / keep_rate(ctx.dropout)
            if token_keys is not None:
                mask = layer.draws.mask(token_keys, shape, ctx.dropout)
            if mask is None:
                grad_x.addmm_(through_b, layer.a.to(g.dtype))
            else:
                grad_x.addcmul_(through_b @ layer.a.to(g.dtype), mask.to(g.dtype))
            grad_x = grad_x.view(shape)
        if ctx.needs_input_grad[1]:
            grad_values = layer.gradient(g, z)
        return grad_x, grad_values, None
