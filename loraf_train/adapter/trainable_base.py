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
from loraf.delta import shared_weights, task_scale
from loraf.errors import ConfigError, Problem
from loraf_train.adapter import probe
from loraf_train.adapter.layer import EarlierTasks, LorafLinear
from loraf_train.adapter.weights import computes_in, is_quantised

FIELD = "adapter.target_modules"  # of tasks.yaml


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

    See `adaptable`.

    Args:
        file: the configuration's path, for messages.

    Raises:
        ConfigError: no module has such an ending; or see `adaptable`.
    """
    names = [name for name, _ in model.named_modules()]
    endings = dict.fromkeys(map(_ending, names))
    missing = [ending for ending in target_modules if ending not in endings]
    problems: list[Problem] = []
    targets: dict[str, nn.Linear] = {}
    try:
        targets = adaptable(model, [name for name in names if _ending(name) in target_modules], FIELD, file)
    except ConfigError as error:
        problems += error.problems
    if missing:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        known = dict.fromkeys(_ending(n) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head)
        message = f"the model has no {', '.join(map(repr, missing))}"
        problems.append(Problem(message, FIELD, file, f"choose from: {', '.join(known)}"))
    if problems:
        raise ConfigError(problems)
    return targets


def adaptable(model: nn.Module, names: Sequence[str], field: str = FIELD, file: str = "") -> dict[str, nn.Linear]:
    """Returns the layers of these names that an adapter can be put in place of.

    A target may share its weight with an embedding, as a tied lm_head does: the embedding stays as it is. Layers that
    share a weight among themselves would get a ΔW each, and no model of this architecture could hold them all.
    Layers that the model does not call when it reads text (a vision tower) are left out.

    Args:
        field, file: where they were chosen, for messages.

    Raises:
        ConfigError: none of the layers of some ending reads text; or one is not a plain `torch.nn.Linear`, shares its
            weight with a module that is not an embedding, or the model computes with its weight itself.
    """
    targets: dict[str, nn.Linear] = {}
    unsupported: dict[str, str] = {}
    used = probe.uses(model)
    weight_read: dict[str, str] = {}
    uncalled: dict[str, str] = {}
    for name in names:
        module, ending = model.get_submodule(name), _ending(name)
        if type(module) is not nn.Linear and not is_quantised(module):
            unsupported.setdefault(ending, type(module).__name__)
        elif used is not None and used.reads_weight(name):
            weight_read.setdefault(ending, name)
        elif used is not None and not used.calls(name):
            uncalled.setdefault(ending, name)
        else:
            assert isinstance(module, nn.Linear)  # bitsandbytes' layers are such, too
            targets[name] = module
    problems = [
        Problem(f"{ending!r} is a {kind}, not a torch.nn.Linear", field, file, "leave it out")
        for ending, kind in unsupported.items()
    ]
    for ending, name in weight_read.items():
        message = f"the model computes with the weight of {name} itself, so an adapter there would be left out"
        problems.append(Problem(message, field, file, f"leave out {ending!r}"))
    reached = {_ending(name) for name in targets} | unsupported.keys() | weight_read.keys()
    for ending, name in uncalled.items():
        if ending not in reached:
            message = f"the model does not call {name} when it reads text"
            problems.append(Problem(message, field, file, f"leave out {ending!r}"))
    problems += _sharing(model, targets, field, file)
    if problems:
        raise ConfigError(problems)
    return targets


def _ending(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _sharing(model: nn.Module, targets: Mapping[str, nn.Linear], field: str, file: str) -> list[Problem]:
    """A problem for each ending of targets that share their weight with anything but an embedding."""
    shared = shared_weights(model)
    problems: dict[str, Problem] = {}
    for name in targets:
        others = [other for other in shared.get(name, ()) if not isinstance(model.get_submodule(other), nn.Embedding)]
        if others:
            ending = _ending(name)
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            message = f"{ending!r} names layers that share one weight: {name} and {others[0]}{more}"
            problems.setdefault(ending, Problem(message, field, file, "leave it out"))
    return list(problems.values())


def fused_experts(model: nn.Module) -> int:
    """Returns the number of weights in experts that the model holds as one parameter, where no adapter reaches."""
    return sum(
        parameter.numel()
        for name, module in model.named_modules()
        if "experts" in f"{name} {type(module).__name__}".lower()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3  # (experts, ·, ·)
    )


def shapes_of(targets: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    """Module → (d_out, d_in)."""
    return {name: (linear.out_features, linear.in_features) for name, linear in targets.items()}


def projections(checkpoint: Checkpoint, targets: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """Returns A of every target, (rank, d_in): verified against its digest, in the layer's dtype, on its device.

    Raises:
        CorruptCheckpoint: see `Checkpoint.projection_of`.
    """
    return {name: checkpoint.projection_of(name).to(m.weight.device, computes_in(m)) for name, m in targets.items()}


def earlier_tasks(checkpoint: Checkpoint, tasks: Sequence[str], module: str) -> EarlierTasks:
    """Returns what the stored `tasks` of a checkpoint add to the module's B."""
    manifest = checkpoint.manifest
    return EarlierTasks.of(
        (checkpoint.tasks[t][module], task_scale(manifest.task(t).alpha, manifest.rank)) for t in tasks
    )


@contextmanager
def attached(model: nn.Module, layers: Mapping[str, LorafLinear]) -> Iterator[None]:
    """Replaces the model's layers of the same names by `layers` for a `with` block."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            _put(model, name, layer)
        yield
    finally:
        for name, module in before.items():
            _put(model, name, module)


@contextmanager
def own_weights(model: PreTrainedModel, targets: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Gives each target that shares its weight a copy of its own for a `with` block.

    For code that changes weights in place, and would change the embedding together with a tied lm_head.
    """
    sharing = shared_weights(model)
    shared = {name: linear.weight for name, linear in targets.items() if name in sharing}
    tied = getattr(model.config, "tie_word_embeddings", None)
    try:
        for name, weight in shared.items():
            targets[name].weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        yield
    finally:
        for name, weight in shared.items():
            targets[name].weight = weight
        if tied is not None:
            model.config.tie_word_embeddings = tied  # PEFT clears it when it merges


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
