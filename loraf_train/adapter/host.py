"""Putting LorafLinear layers into a transformers model, and the model's own layers back.

The model's own `torch.nn.Linear` objects are never changed: a layer holds the one it stands in for, and gives it back.
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
from loraf_train.adapter.layer import Earlier, LorafLinear


@dataclass(frozen=True)
class Host:
    """A frozen model, its target layers, and the A of each: what every task of a checkpoint is trained on.

    Attributes:
        targets: module → the model's own layer.
        projections: module → (rank, d_in), see `projections`.
        pad_id: token id that fills batches.
        output: the checkpoint's folder, where trackers write beside it; None: nobody tracks.
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
        earlier: Mapping[str, Earlier],
        dropout: float = 0.0,
    ) -> dict[str, LorafLinear]:
        """A fresh layer for each target, its values zero. See LorafLinear."""
        return {
            name: LorafLinear(base, self.projections[name], positions[name], scale, earlier[name], dropout)
            for name, base in self.targets.items()
        }


def find_targets(model: nn.Module, target_modules: Sequence[str], file: str = "") -> dict[str, nn.Linear]:
    """The model's layers whose names end in one of `target_modules`, by transformers' names.

    Raises:
        ConfigError: an ending that no layer has, or that a layer has which is no plain `torch.nn.Linear`.
    """
    endings = {name: name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    found: dict[str, nn.Linear] = {}
    odd: dict[str, str] = {}
    for name, module in model.named_modules():
        if endings[name] not in target_modules:
            continue
        if type(module) is nn.Linear:
            found[name] = module
        else:
            odd.setdefault(endings[name], type(module).__name__)
    problems = [
        Problem(f"{ending!r} is a {kind}, not a torch.nn.Linear", "adapter.target_modules", file, "leave it out")
        for ending, kind in odd.items()
    ]
    missing = [ending for ending in target_modules if ending not in endings.values()]
    if missing:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        there = dict.fromkeys(endings[n] for n, m in model.named_modules() if type(m) is nn.Linear and m is not head)
        message = f"the model has no {', '.join(map(repr, missing))}"
        problems.append(Problem(message, "adapter.target_modules", file, f"choose from: {', '.join(there)}"))
    if problems:
        raise ConfigError(problems)
    return found


def shapes_of(targets: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    """Module → (d_out, d_in)."""
    return {name: (module.out_features, module.in_features) for name, module in targets.items()}


def projections(checkpoint: Checkpoint, targets: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """A of every target, (rank, d_in), checked against its digest, rounded to the weight's dtype, on its device.

    Raises:
        CorruptCheckpoint: see `Checkpoint.projection_of`.
    """
    return {name: checkpoint.projection_of(name).to(m.weight.device, m.weight.dtype) for name, m in targets.items()}


def earlier(checkpoint: Checkpoint, tasks: Sequence[str], module: str) -> Earlier:
    """What `tasks` of the checkpoint, as stored, add to the module's B."""
    manifest = checkpoint.manifest
    return Earlier.of((checkpoint.tasks[t][module], task_scale(manifest.task(t).alpha, manifest.rank)) for t in tasks)


@contextmanager
def attached(model: nn.Module, layers: Mapping[str, LorafLinear]) -> Iterator[None]:
    """Within, `layers` stand in the model in place of the layers of the same names."""
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
