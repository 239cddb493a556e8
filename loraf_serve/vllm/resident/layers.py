"""vLLM's LoRA layers with a delta in the place of slots.

    y = quantisation method's product, as in vLLM          y += delta(x, rows of the step), in place

A layer under torch.compile calls the delta through one opaque operator, `loraf::resident_delta`, so that the graph
neither looks into it nor depends on what the rows hold.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import _all_lora_classes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig
    from vllm.config.lora import LoRAConfig

    from loraf_serve import kernels
    from loraf_serve.vllm.resident.gpu import Gpu

_NAMED: dict[str, ResidentLayer] = {}  # of this process's engine, for the operator


class ResidentLayer:
    """Mixed into one of vLLM's linear LoRA layers.

    Attributes:
        operands: adapter digest → what the adapter does in this layer; missing where it does nothing.
        name: vLLM's name of the layer.
        gpu: what stands in the place of `operands` on a GPU.
    """

    operands: dict[str, kernels.Operand]
    gpu: Gpu | None = None

    def create_lora_weights(
        self, max_loras: int, lora_config: LoRAConfig, model_config: PreTrainedConfig | None = None
    ) -> None:
        """Allocates nothing: no slot holds weights."""
        self.lora_config = lora_config
        self.lora_a_stacked = self.lora_b_stacked = ()
        if not hasattr(self, "output_slices"):
            self.output_slices = (self.output_size,)
        self.operands = {}

    def reset_lora(self, index: int) -> None:
        """There is nothing in a slot."""

    def set_lora(self, index: int, lora_a, lora_b) -> None:
        raise RuntimeError("a dense adapter cannot be put into a resident layer")

    def name_it(self, name: str) -> None:
        self.name = name
        _NAMED[name] = self

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Args: x (n, d_in), output (n, d_out); vLLM's transformers backend adds a dimension of 1 in front."""
        flat_x, flat = (x.flatten(0, -2), output.flatten(0, -2)) if output.ndim > 2 else (x, output)
        if torch.compiler.is_compiling():
            torch.ops.loraf.resident_delta(flat, flat_x, self.name)
        else:
            self.add_deltas(flat, flat_x)
        return flat.view(output.shape)

    def add_deltas(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y (n, d_out) += the delta of every adapter that acts in this step."""
        step = self.punica_wrapper
        if self.gpu is None and not step.active:
            return
        if x.shape[0] < step.tokens:  # rows would be written beyond the end of y
            raise RuntimeError(f"{self.name}: {x.shape[0]} rows in a step of {step.tokens} tokens")
        if self.gpu is not None:
            self.gpu.add_deltas(self.name, y, x)
            return
        for digest, rows in step.active:
            operand = self.operands.get(digest)
            if operand is not None:
                operand.add_delta(y, x, rows)


@cache
def _resident(stock: type) -> type:
    return type(f"Resident{stock.__name__}", (ResidentLayer, stock), {})


def from_layer(
    layer: nn.Module,
    max_loras: int,
    lora_config: LoRAConfig,
    packed_modules_list: list,
    model_config: PreTrainedConfig | None = None,
) -> nn.Module:
    """In the place of `vllm.lora.utils.from_layer`: linear layers become resident ones, others stay as they are."""
    for stock in _all_lora_classes:
        if issubclass(stock, BaseLinearLayerWithLoRA) and stock.can_replace_layer(
            source_layer=layer,
            lora_config=lora_config,
            packed_modules_list=packed_modules_list,
            model_config=model_config,
        ):
            made = _resident(stock)(layer)
            made.create_lora_weights(max_loras, lora_config, model_config)
            return made
    return layer


def _operator(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    _NAMED[layer].add_deltas(y, x)


_LIBRARY = torch.library.Library("loraf", "FRAGMENT")
_LIBRARY.define("resident_delta(Tensor(a!) y, Tensor x, str layer) -> ()")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("resident_delta", _operator, _device)
torch.library.register_fake("loraf::resident_delta", lambda y, x, layer: None, lib=_LIBRARY)
