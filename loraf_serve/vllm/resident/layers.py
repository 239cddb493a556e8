"""vLLM's LoRA layers with a delta in place of slots.

    y = the quantization method's product, as in vLLM          y += delta(x, weights of the step), in place

Under torch.compile a layer calls the delta through one opaque operator, `loraf::resident_delta`, so the graph does not
depend on the weights of the step.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import _all_lora_classes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig
    from vllm.config.lora import LoRAConfig

    from loraf_serve import kernels
    from loraf_serve.vllm.resident.gpu import Gpu
    from loraf_serve.vllm.resident.weights import StepWeights

    _Mixin = BaseLinearLayerWithLoRA
else:
    _Mixin = object

_LAYERS: dict[str, ResidentLayer] = {}  # the layers of this process's engine by name, for the operator


class ResidentLayer(_Mixin):
    """Mixin for vLLM's linear LoRA layers.

    Attributes:
        operands: adapter digest → operand of the adapter in this layer, if it has one.
        name: vLLM's name of the layer.
        gpu: used instead of `operands` on a GPU.
        in_use: whether a checkpoint may have a part in this layer. vLLM may call others with some of a step's tokens.
    """

    operands: dict[str, kernels.Operand]
    name: str
    in_use = True
    gpu: Gpu | None = None

    def create_lora_weights(
        self, max_loras: int, lora_config: LoRAConfig, model_config: PreTrainedConfig | None = None
    ) -> None:
        """Allocates nothing, because slots hold no weights."""
        self.lora_config = lora_config
        self.lora_a_stacked = self.lora_b_stacked = ()
        if not hasattr(self, "output_slices"):
            self.output_slices = (self.output_size,)
        self.operands = {}

    def reset_lora(self, index: int) -> None:
        """Does nothing, because slots hold no weights."""

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        raise RuntimeError("a resident layer cannot hold a dense adapter")

    def register(self, name: str) -> None:
        self.name = name
        _LAYERS[name] = self

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Args: x (n, d_in), output (n, d_out), with a leading dimension of 1 in vLLM's transformers backend."""
        flat_x, flat = (x.flatten(0, -2), output.flatten(0, -2)) if output.ndim > 2 else (x, output)
        if torch.compiler.is_compiling():
            torch.ops.loraf.resident_delta(flat, flat_x, self.name)
        else:
            self.add_deltas(flat, flat_x)
        return flat.view(output.shape)

    def add_deltas(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Adds to y (n, d_out) the delta of every adapter that acts in this step."""
        step = cast("StepWeights", self.punica_wrapper)
        if not self.in_use or (self.gpu is None and not step.active):
            return
        if x.shape[0] < step.tokens:  # otherwise rows beyond the end of y would be written
            raise RuntimeError(f"{self.name}: {x.shape[0]} rows in a step of {step.tokens} tokens")
        if self.gpu is not None:
            self.gpu.add_deltas(self.name, y, x)
            return
        for digest, batch in step.active:
            operand = self.operands.get(digest)
            if operand is not None:
                operand.add_delta(y, x, batch)


@cache
def _resident(stock: Any) -> Any:
    """Returns the resident class for one of vLLM's LoRA layer classes."""
    return type(f"Resident{stock.__name__}", (ResidentLayer, stock), {})


def from_layer(
    layer: nn.Module,
    max_loras: int,
    lora_config: LoRAConfig,
    packed_modules_list: list[str],
    model_config: PreTrainedConfig | None = None,
) -> nn.Module:
    """Replaces `vllm.lora.utils.from_layer`: turns linear layers into resident ones and leaves others unchanged."""
    for stock in _all_lora_classes:
        if issubclass(stock, BaseLinearLayerWithLoRA) and stock.can_replace_layer(
            source_layer=layer,
            lora_config=lora_config,
            packed_modules_list=packed_modules_list,
            model_config=model_config,
        ):
            resident_class = _resident(stock)  # type: ignore[arg-type]  # a class is hashable
            resident: ResidentLayer = resident_class(layer)
            resident.create_lora_weights(max_loras, lora_config, model_config)
            return resident
    return layer


def _operator(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    _LAYERS[layer].add_deltas(y, x)


_LIBRARY: Any = torch.library.Library("loraf", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it so
_LIBRARY.define("resident_delta(Tensor(a!) y, Tensor x, str layer) -> ()")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("resident_delta", _operator, _device)
torch.library.register_fake("loraf::resident_delta", lambda y, x, layer: None, lib=_LIBRARY)
