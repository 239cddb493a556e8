"""Which part of a module's A and B a worker's layer holds: fused layers, tensor parallelism.

vLLM's own slicing is asked: it is given the numbers of rows and columns in the place of weights, and what comes back
are the numbers of those that this worker keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager

from loraf_serve.vllm.worker import targets


@dataclass(frozen=True)
class Piece:
    """A run of rows of one module's B in a layer.

    Attributes:
        module: the adapter's name of it.
        rows: of B, first and one past the last.
        columns: of A, likewise.
        offset: of the rows in the layer's output.
    """

    module: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    offset: int


def pieces(
    manager: LoRAModelManager, name: str, layer: BaseLinearLayerWithLoRA, modules: Mapping[str, str]
) -> list[Piece]:
    """The pieces of a layer that an adapter acts on, by ascending offset.

    Args:
        name: vLLM's name of the layer.
        modules: vLLM's name of each module of the adapter → the adapter's.
    """
    names = targets.members(manager, name)
    sizes = targets.output_sizes(layer.base_layer, len(names))
    d_in = layer.base_layer.input_size
    found, offset = [], 0
    for member, rows, columns in zip(names, _kept_rows(layer, sizes), _kept_columns(layer, d_in, sizes), strict=True):
        for first, stop in _runs(rows):
            if member in modules:
                found.append(Piece(modules[member], (first, stop), columns, offset))
            offset += stop - first
    return found


def bands(manager: LoRAModelManager, name: str, layer: BaseLinearLayerWithLoRA) -> list[tuple[int, int]]:
    """(first column, how many) of a layer's output for each piece that an adapter may have in it."""
    members = targets.members(manager, name)
    if not targets.output_sizes(layer.base_layer, len(members)):
        return []
    found = pieces(manager, name, layer, {member: member for member in members})
    return [(piece.offset, piece.rows[1] - piece.rows[0]) for piece in found]


def _kept_rows(layer: BaseLinearLayerWithLoRA, sizes: list[int]) -> list[torch.Tensor]:
    """The numbers of the rows of each member's B that this worker holds, in the order of its output."""
    numbers = [torch.arange(size).unsqueeze(1) for size in sizes]
    if layer.tp_size > 1:
        numbers = layer.slice_lora_b(numbers) if layer.n_slices > 1 else [layer.slice_lora_b(numbers[0])]
    return [part.squeeze(1) for part in numbers]


def _kept_columns(layer: BaseLinearLayerWithLoRA, d_in: int, sizes: list[int]) -> list[tuple[int, int]]:
    numbers = [torch.arange(d_in).unsqueeze(0) for _ in sizes]
    if layer.tp_size > 1:
        numbers = layer.slice_lora_a(numbers) if layer.n_slices > 1 else [layer.slice_lora_a(numbers[0])]
    runs = [_runs(part.squeeze(0)) for part in numbers]
    return [run for (run,) in runs]  # vLLM keeps one run of columns


def _runs(numbers: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, one past the last)."""
    breaks = torch.nonzero(numbers.diff() != 1).flatten() + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in numbers.tensor_split(breaks) if len(run)]
