"""LoRA products on the CPU: one pair of matrix products per adapter in the batch. Other rows are not touched.

vLLM's own PunicaWrapperCPU gathers A and B for every token, and indexes slot -1, the last one, for rows without an
adapter. These then get another adapter's delta as soon as any row of the batch has an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = slice | torch.Tensor


def group_rows(slots: torch.Tensor) -> list[tuple[int, Rows]]:
    """Groups the rows of a batch by adapter.

    Args:
        slots: (n,) int64, the slot of each row's adapter; negative for none.

    Returns:
        (slot, rows) for every slot that occurs. `rows` is a slice if they are contiguous, else indices (m,).
    """
    groups: list[tuple[int, Rows]] = []
    for slot in torch.unique(slots).tolist():
        if slot < 0:
            continue
        rows = torch.nonzero(slots == slot).squeeze(1)
        first, last = int(rows[0]), int(rows[-1])
        groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


class GroupedPunicaWrapperCPU(PunicaWrapperCPU):
    """Grouped products for linear layers.

    Embeddings and output heads keep vLLM's own operators, because LoRAF's engines put no LoRA layer there.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._groups: list[tuple[int, Rows]] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._groups = group_rows(self.token_lora_indices)

    def add_shrink(
        self,
        y: Sequence[torch.Tensor] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Sets y[i][rows] = scale · x[rows] Aᵢᵀ for each adapter's rows.

        Args:
            y: (n, r) per slice, zeros.
            x: (n, d_in).
            lora_a_stacked: (slots, 1, r, d_in) per slice.
        """
        x = x.view(-1, x.shape[-1])
        for slot, rows in self._groups:
            x_rows = x[rows]
            for out, stacked in zip(y, lora_a_stacked, strict=True):
                a = stacked[slot, 0]
                out[rows] = F.linear(x_rows.to(a.dtype), a).mul_(scale).to(out.dtype)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Sequence[torch.Tensor] | torch.Tensor,
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds x[i][rows] Bᵢᵀ to y[rows, slice i] for each adapter's rows.

        Args:
            y: (n, Σ slices).
            x: (n, r) per slice.
            lora_b_stacked: (slots, 1, d_out, r) per slice.
        """
        y = y.view(-1, y.shape[-1])
        if not add_inputs:
            y[:, offset_start : offset_start + sum(output_slices)] = 0
        for slot, rows in self._groups:
            self._expand(y, [z[rows] for z in x], rows, slot, lora_b_stacked, output_slices, offset_start)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        **kwargs: Any,
    ) -> None:
        """Adds scale · x[rows] Aᵢᵀ Bᵢᵀ to y[rows, slice i] for each adapter's rows.

        Args:
            y: (n, Σ slices), changed in place.
            x: (n, d_in).
            lora_a_stacked: (slots, 1, r, d_in) per slice.
            lora_b_stacked: (slots, 1, d_out, r) per slice.
        """
        for slot, rows in self._groups:
            x_rows = x[rows].to(lora_a_stacked[0].dtype)
            shrunk = [F.linear(x_rows, a[slot, 0]) for a in lora_a_stacked]
            if scale != 1.0:
                shrunk = [z.mul_(scale) for z in shrunk]
            self._expand(y, shrunk, rows, slot, lora_b_stacked, output_slices, 0)

    @staticmethod
    def _expand(
        y: torch.Tensor,
        shrunk: Sequence[torch.Tensor],
        rows: Rows,
        slot: int,
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset: int,
    ) -> None:
        for z, stacked, size in zip(shrunk, lora_b_stacked, output_slices, strict=True):
            b = stacked[slot, 0]
            delta = F.linear(z.to(b.dtype), b).to(y.dtype)
            target = y[:, offset : offset + size]
            if isinstance(rows, slice):
                target[rows] += delta
            else:
                target.index_add_(0, rows, delta)
            offset += size
