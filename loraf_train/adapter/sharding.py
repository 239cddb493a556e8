"""Shards the frozen base over the processes with FSDP version 2: each process keeps some rows of every weight.

A decoder layer gathers its weights before its forward pass and again before its backward pass, so during both every
`torch.nn.Linear` holds a plain tensor, as LorafLinear expects. The trainable values are not sharded: every process
holds all of them, with their gradient and optimizer state (K numbers each), and DistributedDataParallel averages the
gradients. So positions, clipping, snapshots and the checkpoint do not depend on sharding.

Every forward pass needs all processes at once.
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
from loraf_train.adapter.layer import EarlierTasks, LorafLinear
from loraf_train.adapter.trainable_base import attached
from loraf_train.processes import group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf.checkpoint import Checkpoint
    from loraf.tasksets import TaskSet
    from loraf_train.processes.launcher import Sharding


def shard(model: PreTrainedModel, device: torch.device, options: Sharding) -> None:
    """Shards a model that is still on the CPU, and moves this process's part to `device`.

    Each decoder layer is a unit, so that a device holds only one or two of them whole; everything else (embeddings,
    head) is one more unit. Call `processes.group.join` first.
    """
    mesh = init_device_mesh(device.type, (group.count(),))
    kinds = set(model._no_split_modules or ())
    for layer in [module for module in model.modules() if type(module).__name__ in kinds]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=options.reshard_after_forward)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(weight: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a weight: its rows if it is sharded, else all of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def reshard(model: nn.Module) -> None:
    """Frees weights that the last forward pass left gathered, at least embeddings and head."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def leave_to_fsdp(model: nn.Module) -> None:
    """Makes DistributedDataParallel ignore the sharded parameters, which it could not broadcast."""
    reshard(model)
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, names)  # type: ignore[no-untyped-call]  # of torch


class ShardedMerger:
    """Applies task sets to a sharded model through extra layers, where `loraf.delta.Merger` would change the weights.

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
        """Makes the model compute W·x + ΔW(S)·x; the base set restores its own layers."""
        self._layers.close()
        reshard(self._model)
        if not task_set.is_base:
            layers = {name: self._layer(name, linear, task_set) for name, linear in self._targets.items()}
            self._layers.enter_context(attached(self._model, layers))

    def _layer(self, name: str, linear: nn.Linear, task_set: TaskSet) -> LorafLinear:
        b = combined_b(self._checkpoint, name, task_set).view(-1)
        positions = b.nonzero().view(-1)
        tasks = EarlierTasks(positions.to(torch.int32), b[positions])
        untrained = torch.empty(0, dtype=torch.int64)
        return LorafLinear(linear, self._projections[name], untrained, 1.0, tasks).requires_grad_(False).eval()
