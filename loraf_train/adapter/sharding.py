"""The frozen base divided over the processes, with FSDP version 2: each keeps its rows of every weight.

A layer of the model gathers its weights before its forward pass and again before its backward pass, so within both
every `torch.nn.Linear` holds a plain tensor, as LorafLinear expects. The values that train are no part of this: every
process holds all of them, with their gradient and optimizer state (K numbers each), and DistributedDataParallel takes
the mean of the gradients. So masks, clipping, snapshots and the checkpoint know nothing of sharding.

Any forward pass takes all processes at once.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from loraf.delta import combined_b, target_modules
from loraf_train.adapter.host import attached
from loraf_train.adapter.layer import Earlier, LorafLinear
from loraf_train.processes import group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf.checkpoint import Checkpoint
    from loraf.tasksets import TaskSet
    from loraf_train.processes.launcher import Sharding


def shard(model: PreTrainedModel, device: torch.device, how: Sharding) -> None:
    """Divides a model that is still on the CPU; what this process keeps of it goes to its device.

    The units are the model's decoder layers, so that a device holds no more than one or two of them whole, and all
    the rest (embeddings, head) as one. `processes.join` was called.
    """
    mesh = init_device_mesh(device.type, (group.count(),))
    kinds = set(model._no_split_modules or ())
    for layer in [module for module in model.modules() if type(module).__name__ in kinds]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=how.reshard_after_forward)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(weight: torch.Tensor) -> torch.Tensor:
    """What this process has of a weight: all of it, or its rows."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def give_up_gathered(model: nn.Module) -> None:
    """What the last forward pass left whole (embeddings and head, at least) is divided again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def leave_to_fsdp(model: nn.Module) -> None:
    """DistributedDataParallel passes over what is sharded, which it could not broadcast."""
    give_up_gathered(model)
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


class Beside:
    """Puts task sets beside a sharded model's weights: what `loraf.delta.Merger` does for one whose weights are whole.

    A of every module stays on this process's device, as with a Merger.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint):
        self._model = model
        self._checkpoint = checkpoint
        self._targets = dict(target_modules(model, checkpoint))
        self._projections = {
            name: checkpoint.projection_of(name).to(module.weight.device, module.weight.dtype)
            for name, module in self._targets.items()
        }
        self._layers = ExitStack()

    def merge(self, task_set: TaskSet) -> None:
        """The model computes W·x + ΔW(S)·x; with the base set it has its own layers."""
        self._layers.close()
        give_up_gathered(self._model)
        if not task_set.is_base:
            layers = {name: self._layer(name, base, task_set) for name, base in self._targets.items()}
            self._layers.enter_context(attached(self._model, layers))

    def _layer(self, name: str, base: nn.Linear, task_set: TaskSet) -> LorafLinear:
        b = combined_b(self._checkpoint, name, task_set).view(-1)
        at = b.nonzero().view(-1)
        none = torch.empty(0, dtype=torch.int64)
        layer = LorafLinear(base, self._projections[name], none, 1.0, Earlier(at.to(torch.int32), b[at]))
        return layer.requires_grad_(False).eval()
