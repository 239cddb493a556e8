"""The frozen base model with its target layers, and swapping LorafLinear layers in and out of it.

The model's own `torch.nn.Linear` objects are never changed: each LorafLinear holds the one it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from loraf.checkpoint import Checkpoint
from loraf.delta import task_scale
from loraf.errors import ConfigError, Problem
from loraf_train.adapter.layer import EarlierTasks, LorafLinear


@dataclass(frozen=True)
class TrainableBase:
    """A frozen model, its target layers, and A of each: everything that the tasks of a checkpoint share in training.

    Attributes:
        targets: module → the model's own layer.
        projections: module → A, (rank, d_in), see `projections`.
        pad_id: token id that pads batches.
        output: the checkpoint's folder, in which trackers write; None: no tracking.
    """

    model: PreTrainedModel
    targets: dict[str, nn.Linear]
    projections: dict[str, torch.Tensor]
    pad_id: int
    output: Path | None = None

    @property
    def rank(self) -> int:
        return next(iter(self.projections.values())).shape[0]

    def layers(
        self,
        positions: Mapping[str, torch.Tensor],
        scale: float,
        earlier: Mapping[str, EarlierTasks],
        dropout: float = 0.0,
    ) -> dict[str, LorafLinear]:
        """Returns a new layer for each target, with all values zero. Arguments as for LorafLinear, by module."""
        return {
            name: LorafLinear(linear, self.projections[name], positions[name], scale, earlier[name], dropout)
            for name, linear in self.targets.items()
        }


def find_targets(model: nn.Module, target_modules: Sequence[str], file: str = "") -> dict[str, nn.Linear]:
    """Returns the layers whose names end in one of `target_modules`, by their full names in the model.

    Args:
        file: the configuration's path, for messages.

    Raises:
        ConfigError: no module has such an ending, or one that has it is not a plain `torch.nn.Linear`.
    """
    endings = {name: name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets: dict[str, nn.Linear] = {}
    unsupported: dict[str, str] = {}
    for name, module in model.named_modules():
        if endings[name] not in target_modules:
            continue
        if type(module) is nn.Linear:
            targets[name] = module
        else:
            unsupported.setdefault(endings[name], type(module).__name__)
    problems = [
        Problem(f"{ending!r} is a {kind}, not a torch.nn.Linear", "adapter.target_modules", file, "leave it out")
        for ending, kind in unsupported.items()
    ]
    missing = [ending for ending in target_modules if ending not in endings.values()]
    if missing:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        known = dict.fromkeys(endings[n] for n, m in model.named_modules() if type(m) is nn.Linear and m is not head)
        message = f"the model has no {', '.join(map(repr, missing))}"
        problems.append(Problem(message, "adapter.target_modules", file, f"choose from: {', '.join(known)}"))
    if problems:
        raise ConfigError(problems)
    return targets


def shapes_of(targets: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    """Module → (d_out, d_in)."""
    return {name: (linear.out_features, linear.in_features) for name, linear in targets.items()}


def projections(checkpoint: Checkpoint, targets: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """Returns A of every target, (rank, d_in): verified against its digest, in the weight's dtype, on its device.

    Raises:
        CorruptCheckpoint: see `Checkpoint.projection_of`.
    """
    return {name: checkpoint.projection_of(name).to(m.weight.device, m.weight.dtype) for name, m in targets.items()}


def earlier_tasks(checkpoint: Checkpoint, tasks: Sequence[str], module: str) -> EarlierTasks:
    """Returns what the stored `tasks` of a checkpoint add to the module's B."""
    manifest = checkpoint.manifest
    return EarlierTasks.of(
        (checkpoint.tasks[t][module], task_scale(manifest.task(t).alpha, manifest.rank)) for t in tasks
    )


@contextmanager
def attached(model: nn.Module, layers: Mapping[str, LorafLinear]) -> Iterator[None]:
    """Replaces the model's layers of the same names by `layers` for a `with` block."""
    try:
        for name, layer in layers.items():
            _put(model, name, layer)
        yield
    finally:
        for name, layer in layers.items():
            _put(model, name, layer.base)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
