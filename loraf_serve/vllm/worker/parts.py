"""Finds the parts of the modules that a worker's layer holds, for fused layers and tensor parallelism.

Uses vLLM's own slicing: applied to row and column numbers instead of weights, it returns the numbers that this worker
keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.linear import RowParallelLinear

from loraf_serve.vllm.worker import targets


@dataclass(frozen=True)
class LayerPart:
    """A run of rows of one module's weight, and so of its B, in a layer.

    Attributes:
        module: the adapter's name.
        rows: of the weight and of B, (first, one past the last).
        columns: of the weight and of A, (first, one past the last).
        offset: column of the layer's output that the first row adds to.
    """

    module: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    offset: int


def layer_parts(
    manager: LoRAModelManager, name: str, layer: BaseLinearLayerWithLoRA, modules: Mapping[str, str]
) -> list[LayerPart]:
    """Returns the parts of a layer that an adapter acts on, by ascending offset. Empty if vLLM splits the layer
    differently from the adapter's modules.

    Args:
        name: vLLM's name of the layer.
        modules: vLLM's name of each of the adapter's modules → the adapter's name.
    """
    names = targets.members(manager, name)
    sizes = targets.output_sizes(layer.base_layer, len(names))
    if not sizes:
        return []
    d_in = layer.base_layer.input_size
    parts, offset = [], 0
    for member, rows, columns in zip(names, _kept_rows(layer, sizes), _kept_columns(layer, d_in, sizes), strict=True):
        for first, stop in _runs(rows):
            if member in modules:
                parts.append(LayerPart(modules[member], (first, stop), columns, offset))
            offset += stop - first
    return parts


def bands(manager: LoRAModelManager, name: str, layer: BaseLinearLayerWithLoRA) -> list[tuple[int, int]]:
    """Returns (first column, number of columns) of a layer's output for each part that an adapter may have in it."""
    parts = layer_parts(manager, name, layer, {member: member for member in targets.members(manager, name)})
    return [(part.offset, part.rows[1] - part.rows[0]) for part in parts]


def _kept_rows(layer: BaseLinearLayerWithLoRA, sizes: list[int]) -> list[torch.Tensor]:
    """Returns the row numbers of each member's weight that this worker holds, in the order of its output."""
    numbers: list[torch.Tensor | None] = [torch.arange(size).unsqueeze(1) for size in sizes]
    # Rows of a row-parallel layer are whole, although vLLM's fully sharded LoRA divides those of B.
    if layer.tp_size > 1 and not isinstance(layer.base_layer, RowParallelLinear):
        numbers = layer.slice_lora_b(numbers) if layer.n_slices > 1 else [layer.slice_lora_b(_only(numbers))]
    return [part.squeeze(1) for part in numbers if part is not None]


def _kept_columns(layer: BaseLinearLayerWithLoRA, d_in: int, sizes: list[int]) -> list[tuple[int, int]]:
    """Returns (first, one past the last) of the columns of each member's weight that this worker holds."""
    numbers: list[torch.Tensor | None] = [torch.arange(d_in).unsqueeze(0) for _ in sizes]
    # Columns of the other layers are whole, although vLLM's fully sharded LoRA divides A by rank.
    if layer.tp_size > 1 and isinstance(layer.base_layer, RowParallelLinear):
        numbers = layer.slice_lora_a(numbers) if layer.n_slices > 1 else [layer.slice_lora_a(_only(numbers))]
    runs = [_runs(part.squeeze(0)) for part in numbers if part is not None]
    return [run for (run,) in runs]  # vLLM keeps one run of columns


def _only(numbers: list[torch.Tensor | None]) -> torch.Tensor:
    (tensor,) = numbers
    assert tensor is not None
    return tensor


def _runs(numbers: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the runs of consecutive numbers, as (first, one past the last)."""
    breaks = torch.nonzero(numbers.diff() != 1).flatten() + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in numbers.tensor_split(breaks) if len(run)]
