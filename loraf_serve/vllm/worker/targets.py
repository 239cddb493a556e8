"""Maps an adapter's modules to vLLM's layers, and checks whether an engine can apply a checkpoint to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from loraf.errors import BaseMismatch, Problem
from loraf_serve.backends.backend import NotProven

if TYPE_CHECKING:
    from torch import nn
    from vllm.lora.model_manager import LoRAModelManager

    from loraf.manifest import Manifest


def vllm_name(model: nn.Module, module: str) -> str:
    """Returns vLLM's name of a transformers module, as vLLM's loader of PEFT adapters derives it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    return parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0]


def members(manager: LoRAModelManager, name: str) -> list[str]:
    """Returns the names, as vLLM writes them, of the adapter's modules in one of vLLM's (possibly fused) layers."""
    return manager.packed_modules.get(name, [name])


def linear_layers(manager: LoRAModelManager) -> dict[str, BaseLinearLayerWithLoRA]:
    """Returns the linear layers that LoRA applies to, by vLLM's names."""
    return {name: layer for name, layer in manager.modules.items() if isinstance(layer, BaseLinearLayerWithLoRA)}


def layer_shapes(manager: LoRAModelManager) -> dict[str, tuple[int, int]]:
    """Returns (d_out, d_in), over all tensor-parallel workers, of every module in a linear layer that LoRA applies to.
    A fused layer counts as the modules that it holds."""
    shapes = {}
    for name, layer in linear_layers(manager).items():
        modules = members(manager, name)
        for module, d_out in zip(modules, output_sizes(layer.base_layer, len(modules)), strict=False):
            shapes[module] = (d_out, layer.base_layer.input_size)
    return shapes


def output_sizes(layer: LinearBase, count: int) -> list[int]:
    """Returns d_out, over all tensor-parallel workers, of each of the `count` modules that a linear layer holds.

    Empty if vLLM splits the layer differently from the adapter's modules.
    """
    if isinstance(layer, QKVParallelLinear):
        # vLLM's `output_sizes` counts a key/value head once for each worker that holds a copy of it.
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        sizes = [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
    else:
        sizes = list(getattr(layer, "output_sizes", [layer.output_size]))
    if count == 1:
        return [sum(sizes)]
    return sizes if len(sizes) == count else []


def require_layers(
    manifest: Manifest,
    shapes: Mapping[str, tuple[int, int]],
    model: nn.Module,
    where: str,
    not_proven: Callable[[str], str | None],
) -> None:
    """Checks that vLLM has a matching layer for every module of a checkpoint, and that an adapter acts there as in
    transformers.

    Args:
        shapes: from `layer_shapes`.
        where: the checkpoint's folder, for messages.
        not_proven: returns why the latter is not proven of a module by vLLM's name, or None if it is.

    Raises:
        BaseMismatch: lists every module with another shape.
        NotProven: lists every module, by its last name, that vLLM has no layer for or of which nothing is proven.
    """
    problems = []
    refused: dict[tuple[str, str], list[str]] = {}  # last name, reason → modules
    for module, spec in manifest.modules.items():
        name = vllm_name(model, module)
        shape = shapes.get(name)
        if shape is not None and shape != (spec.d_out, spec.d_in):
            message = f"has shape {shape} in the model, {(spec.d_out, spec.d_in)} in the checkpoint"
            problems.append(Problem(message, module, where, "use the base model of the checkpoint"))
            continue
        reason = "vLLM applies no LoRA to this layer" if shape is None else not_proven(name)
        if reason is not None:
            refused.setdefault((module.rpartition(".")[2], reason), []).append(module)
    if problems:
        raise BaseMismatch(problems)
    if refused:
        remedy = "serve it with --backend merged"
        raise NotProven(
            Problem(reason + (f" (and {len(modules) - 1} more)" if modules[1:] else ""), modules[0], where, remedy)
            for (_, reason), modules in refused.items()
        )
