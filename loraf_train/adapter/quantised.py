"""A frozen base in four bits, as in QLoRA: bitsandbytes' linear layers, whose weights are unpacked when they are used.

Only the base is quantised; A, the values and all computing keep the model's precision. Such a weight cannot hold ΔW, so
task sets are applied through extra layers.

bitsandbytes is an extra, imported only where a base is quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraf.delta import combined_b
from loraf.errors import ConfigError, Problem, one_line
from loraf_train.adapter.layer import EarlierTasks, LorafLinear
from loraf_train.adapter.trainable_base import attached, find_targets
from loraf_train.adapter.weights import computes_in, is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf.checkpoint import Checkpoint
    from loraf.tasksets import TaskSet

FIELD = "quantization"
_REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit
_HAS_ADAPTER = "_hf_peft_config_loaded"  # of transformers' models


def four_bit(dtype: torch.dtype) -> Any:
    """Returns transformers' settings for a base in four bits: NF4, its scales quantised again, as QLoRA does.

    Args:
        dtype: that layers compute in.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # of transformers
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def machine_problem(file: str, device: torch.device) -> Problem | None:
    """Returns why this machine cannot compute with four-bit weights; None: it can, as a small layer has shown."""
    try:
        from bitsandbytes.nn.modules import Linear4bit

        layer = Linear4bit(  # type: ignore[no-untyped-call]  # of bitsandbytes
            64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.load_state_dict({"weight": torch.eye(64)})
        x = torch.ones(1, 64, device=device, requires_grad=True)
        layer.to(device)(x).sum().backward()
        if x.grad is None or not bool(torch.isfinite(x.grad).all()):
            raise RuntimeError("its gradient is wrong")
    except Exception as error:  # of a missing package, of a library that was built for another machine
        message = f"bitsandbytes cannot compute with four-bit weights on this machine ({one_line(error)})"
        remedy = "`pip install 'loraf[bnb]'`, use a machine that it supports, or leave quantization out"
        return Problem(message, FIELD, file, remedy)
    return None


def settle(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking weights for some processors, which then compute in bfloat16.

    It would do so at the first evaluation, in place, and so make the numbers depend on what was done before.
    """
    for module in model.modules():
        if is_quantised(module):
            setattr(module, _REPACKS, False)


@contextmanager
def with_adapter(model: nn.Module) -> Iterator[None]:
    """Tells transformers' Trainer, for a `with` block, that a quantised model has an adapter; else it refuses it."""
    if not is_quantised_model(model):
        yield
        return
    before = getattr(model, _HAS_ADAPTER, False)
    setattr(model, _HAS_ADAPTER, True)
    try:
        yield
    finally:
        setattr(model, _HAS_ADAPTER, before)


def is_quantised_model(model: nn.Module) -> bool:
    return any(is_quantised(module) for module in model.modules())


class AttachedMerger:
    """Applies task sets to a quantised model through extra layers, where `loraf.delta.Merger` would change weights."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint):
        self._model = model
        self._checkpoint = checkpoint
        endings = dict.fromkeys(name.rsplit(".", 1)[-1] for name in checkpoint.manifest.modules)
        self._targets = find_targets(model, list(endings))
        missing = checkpoint.manifest.modules.keys() - self._targets.keys()
        if missing:
            message = f"the model has no {min(missing)}"
            raise ConfigError(Problem(message, "model", str(checkpoint.path), "use the base model of the checkpoint"))
        self._layers = ExitStack()

    def merge(self, task_set: TaskSet) -> None:
        """Makes the model compute W·x + ΔW(S)·x; the base set restores its own layers."""
        self._layers.close()
        if not task_set.is_base:
            layers = {name: self._layer(name, task_set) for name in self._checkpoint.manifest.modules}
            self._layers.enter_context(attached(self._model, layers))

    def _layer(self, name: str, task_set: TaskSet) -> LorafLinear:
        linear = self._targets[name]
        b = combined_b(self._checkpoint, name, task_set).view(-1)
        positions = b.nonzero().view(-1)
        a = self._checkpoint.projection_of(name).to(linear.weight.device, computes_in(linear))
        tasks = EarlierTasks(positions.to(torch.int32), b[positions])
        untrained = torch.empty(0, dtype=torch.int64)
        return LorafLinear(linear, a, untrained, 1.0, tasks).requires_grad_(False).eval()
