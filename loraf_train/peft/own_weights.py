"""Whether a model in memory is the one in its folder, which a checkpoint says that its tasks belong to."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from loraf import base_model
from loraf.errors import ConfigError, Problem
from loraf_train.peft.layer import LorafLayer
from loraf_train.sequence.base_checks import build_without_weights

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # others are quantised
_REMEDY = "load the model with AutoModelForCausalLM.from_pretrained, and leave its weights as they are; a model that "
_REMEDY += "you changed is saved by model.save_pretrained before get_peft_model, and loaded from there"


def require_own_weights(model: nn.Module, folder: Path) -> None:
    """Compares a base model, which may have adapters, with its folder: the shapes, and a sample of every weight.

    Raises:
        ConfigError: they differ, such as in a model that something was merged into, or whose vocabulary was resized.
    """
    own = _weights(model)
    there = dict(build_without_weights(folder).named_parameters(remove_duplicate=False))
    targets = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LorafLayer)}
    resized = {name: list(own[name].shape) for name in own if name in there and own[name].shape != there[name].shape}
    for name in [*resized, *sorted(targets - there.keys())]:
        what = f"{name} of shape {resized[name]}" if name in resized else f"a layer {name.removesuffix('.weight')}"
        message = f"{type(model).__name__} has {what} that the model in {folder} does not have"
        raise ConfigError(Problem(message, "model", remedy=_REMEDY))
    for name, (rows, sample) in base_model.sampled_rows(folder, own.keys()).items():
        _compare(name, own[name].detach()[rows, : sample.shape[1]], sample, folder)
    vectors = [name for name, weight in own.items() if weight.ndim == 1]
    for file in base_model.weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in set(tensors.keys()).intersection(vectors):
                _compare(name, own[name].detach(), tensors.get_tensor(name).to(torch.bfloat16), folder)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of the base model by its own names, those that it computes in and that are in memory."""
    merged = {f"{n}.base_layer.weight": m for n, m in model.named_modules() if isinstance(m, LorafLayer)}
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        if ".loraf_" not in name and weight.dtype in _FLOATING and not weight.is_meta:
            before = merged[name].unmerged_weight if name in merged else weight
            found[name.replace(".base_layer.", ".")] = before
    return found


def _compare(name: str, own: torch.Tensor, sample: torch.Tensor, folder: Path) -> None:
    if own.shape != sample.shape:
        return  # transformers stores it in another form
    own = own.cpu()
    # In float16 small weights lose digits, so that rounding them again may give a neighbour.
    near = own.dtype == torch.float16 and torch.allclose(own.float(), sample.float(), rtol=2**-7, atol=1e-6)
    if not near and not torch.equal(own.to(torch.bfloat16), sample):
        message = f"{name} has other values than in {folder}, so the checkpoint would belong to no stored model"
        raise ConfigError(Problem(message, "model", remedy=_REMEDY))
