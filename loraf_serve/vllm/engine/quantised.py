"""Quantised weights on which vLLM's LoRA layers fail, found before an engine starts.

vLLM adds LoRA to a quantised layer as to a plain one, as long as the layer keeps a tensor of weights. On a CPU without
AMX, and for asymmetric activations on every CPU, its int8 product repacks the weights and gives up that tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraf.errors import ConfigError, Problem

REMEDY = "use the model's unquantised weights"


def method(model_folder: Path) -> str | None:
    """Returns how config.json says that the weights are quantised; None for plain ones."""
    config = _quantisation(model_folder)
    return str(config.get("quant_method", "by an unnamed method")) if config else None


def require_supported(model_folder: Path) -> None:
    """Raises ConfigError if the model's layers have int8 weights and activations that vLLM repacks on this machine."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    symmetric = set(_int8_activations(_quantisation(model_folder)))
    if symmetric and (False in symmetric or not _keeps_weights()):
        where = "on a CPU without AMX" if not _keeps_weights() else "with asymmetric activations on a CPU"
        message = f"vLLM cannot add LoRA to int8 weights with int8 activations ({method(model_folder)}) {where}"
        raise ConfigError(Problem(message, "quantization_config", str(model_folder / "config.json"), REMEDY))


def _keeps_weights() -> bool:
    """Whether vLLM's product of symmetric int8 weights of a usual shape leaves them in the layer."""
    import torch
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
    from vllm.platforms import CpuArchEnum, current_platform

    x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return x86 and check_cpu_sgl_kernel(256, 256, torch.int8)


def _int8_activations(config: dict[str, Any]) -> Iterator[bool]:
    """For each group of layers with int8 weights and activations: whether the activations are symmetric."""
    if config.get("quant_method") == "compressed-tensors":
        for group in config.get("config_groups", {}).values():
            weights, activations = group.get("weights") or {}, group.get("input_activations") or {}
            if all((part.get("num_bits"), part.get("type")) == (8, "int") for part in (weights, activations)):
                yield bool(activations.get("symmetric", True))
    elif config.get("quant_method") == "quark":
        layers = [config.get("global_quant_config") or {}, *(config.get("layer_quant_config") or {}).values()]
        for layer in layers:
            weights, activations = layer.get("weight") or {}, layer.get("input_tensors") or {}
            if weights.get("dtype") == activations.get("dtype") == "int8":
                yield bool(activations.get("symmetric", True))


def _quantisation(model_folder: Path) -> dict[str, Any]:
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) else {}
