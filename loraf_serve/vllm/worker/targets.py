"""Which of vLLM's layers an adapter's modules are, and whether an engine can apply a checkpoint to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from loraf.errors import BaseMismatch, Problem

if TYPE_CHECKING:
    from torch import nn
    from vllm.lora.model_manager import LoRAModelManager

    from loraf.manifest import Manifest


def vllm_name(model: nn.Module, module: str) -> str:
    """vLLM's name of a module of transformers', as its loader of PEFT adapters finds it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    return parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0]


def members(manager: LoRAModelManager, name: str) -> list[str]:
    """The adapter's names, as vLLM writes them, of the layers that one of vLLM's (maybe fused) layers holds."""
    return manager.packed_modules.get(name, [name])


def linear_layers(manager: LoRAModelManager) -> dict[str, BaseLinearLayerWithLoRA]:
    """vLLM's layers that LoRA is applied to, by vLLM's names."""
    return {name: layer for name, layer in manager.modules.items() if isinstance(layer, BaseLinearLayerWithLoRA)}


def layer_shapes(manager: LoRAModelManager) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear layer that LoRA is applied to, by the adapter's name of it (vLLM's fused layers
    count as the layers they hold), over all tensor-parallel workers."""
    shapes = {}
    for name, layer in linear_layers(manager).items():
        parts = members(manager, name)
        for part, d_out in zip(parts, output_sizes(layer.base_layer, len(parts)), strict=False):
            shapes[part] = (d_out, layer.base_layer.input_size)
    return shapes


def output_sizes(layer: LinearBase, parts: int) -> list[int]:
    """d_out of each of the `parts` layers that a linear layer holds, over all tensor-parallel workers.

    Empty if vLLM splits the layer in another way than the adapter's names do.
    """
    if isinstance(layer, QKVParallelLinear):
        # `output_sizes` counts a key/value head once for each worker that holds a copy of it.
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        sizes = [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
    else:
        sizes = list(getattr(layer, "output_sizes", [layer.output_size]))
    if parts == 1:
        return [sum(sizes)]
    return sizes if len(sizes) == parts else []


def require_layers(manifest: Manifest, shapes: Mapping[str, tuple[int, int]], model: nn.Module, where: str) -> None:
    """Raises BaseMismatch: every module of the checkpoint that vLLM has no such layer for.

    Args:
        shapes: what `layer_shapes` found.
        where: the checkpoint, for messages.
    """
    problems = []
    for module, spec in manifest.modules.items():
        shape = shapes.get(vllm_name(model, module))
        if shape is None:
            remedy = "serve it with --backend merged"
            problems.append(Problem("vLLM applies no LoRA to this layer", module, where, remedy))
        elif shape != (spec.d_out, spec.d_in):
            message = f"has shape {shape} in the model, {(spec.d_out, spec.d_in)} in the checkpoint"
            problems.append(Problem(message, module, where, "use the base model of the checkpoint"))
    if problems:
        raise BaseMismatch(problems)
