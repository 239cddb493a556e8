"""ΔW of a task set, and merging it into a model's weights.

    ΔW(S) = Σ_{t∈S} w_t · (α_t / r) · B_t · A          (the paper «LoRA without Forgetting»)

Everything is summed in float32 (float64 for weights of that dtype) and rounded once.

A module may share its weight with others, as an lm_head does that is tied to the embedding. Its ΔW is its own: merging
gives the module a weight of its own and leaves the others alone.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import torch

from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, Problem
from loraf.tasksets import TaskSet


def task_scale(alpha: float, rank: int, weight: float = 1.0) -> float:
    """Returns w·α/r, the factor of a task's B·A in ΔW."""
    return weight * alpha / rank


def combined_b(
    checkpoint: Checkpoint, module: str, task_set: TaskSet, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Returns Σ w_t·(α_t/r)·B_t, (d_out, rank). Masks are disjoint: each entry is one task's value, scaled.

    Args:
        dtype: float32, or float64 where its rounding errors are too large.
    """
    spec = checkpoint.manifest.modules[module]
    out = torch.zeros(spec.d_out * checkpoint.manifest.rank, dtype=dtype)
    for name, weight in task_set.weights:
        b = checkpoint.tasks[name].get(module)
        if b is not None:
            alpha = checkpoint.manifest.task(name).alpha
            out[b.positions] = b.values.to(dtype) * task_scale(alpha, checkpoint.manifest.rank, weight)
    return out.view(spec.d_out, checkpoint.manifest.rank)


def delta_weight(
    checkpoint: Checkpoint,
    module: str,
    task_set: TaskSet,
    a: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Returns ΔW(S) of one module, (d_out, d_in).

    Args:
        a: the module's A, (rank, d_in), if available; rebuilt otherwise. The product is computed on its device.
        dtype: of the sum and the product; see `combined_b`.
    """
    a = checkpoint.projection_of(module) if a is None else a
    return combined_b(checkpoint, module, task_set, dtype).to(a.device) @ a.to(dtype)


def shared_weights(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns module → the other modules that have its `weight` as a parameter too, for every such module."""
    owners: dict[int, dict[str, None]] = defaultdict(dict)  # modules by parameter, in order
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            identity = parameter.data_ptr() or id(parameter)  # on the meta device there is no address
            owners[identity][name] = None
            if parameter_name == "weight":
                weights[name] = identity
    return {
        name: tuple(owner for owner in owners[identity] if owner != name)
        for name, identity in weights.items()
        if len(owners[identity]) > 1
    }


@dataclass(frozen=True)
class _Kept:
    """A module's original weight.

    Attributes:
        weight: the module's own, which merging changes; None: it shares `original` with other modules, so that merging
            puts another weight in its place.
        original: a copy of `weight`, or the shared weight itself.
    """

    module: torch.nn.Linear
    weight: torch.nn.Parameter | None
    original: torch.Tensor


class OriginalWeights:
    """The original weights of a model's adapted modules, shared by all Mergers of the model.

    A module's weight is copied when the first Merger that adapts it is built, before anything changes it; a weight that
    several modules share is never changed, and not copied. Mergers may be built while another thread merges; only one
    thread may merge at a time.

    Args:
        model: with nothing merged.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._shared = frozenset(shared_weights(model))
        self._kept: dict[str, _Kept] = {}
        self._changed: set[str] = set()  # modules that currently differ from the original
        self._lock = threading.Lock()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the copies."""
        copies = [kept.original for kept in self._kept.values() if kept.weight is not None]
        return sum(original.numel() * original.element_size() for original in copies)

    def keep(self, name: str, module: torch.nn.Linear) -> None:
        """Keeps the original weight of a module unless it was kept before."""
        with self._lock:
            if name not in self._kept:
                weight = cast("torch.nn.Parameter", module.weight)
                if name in self._shared:
                    self._kept[name] = _Kept(module, None, weight)
                else:
                    self._kept[name] = _Kept(module, weight, weight.detach().clone())

    @torch.no_grad()
    def add(self, name: str, delta: torch.Tensor) -> None:
        """Sets W = round(W₀ + delta) for one module. Overwrites `delta`, (d_out, d_in) in the dtype of the sum."""
        kept = self._kept[name]
        self._changed.add(name)
        summed = delta.to(kept.original.device).add_(kept.original)
        if kept.weight is not None:
            kept.weight.copy_(summed)
        elif kept.module.weight is kept.original:
            kept.module.weight = torch.nn.Parameter(summed.to(kept.original.dtype), kept.original.requires_grad)
        else:
            kept.module.weight.copy_(summed)

    @torch.no_grad()
    def restore(self, except_for: Collection[str] = ()) -> None:
        """Restores the exact original weights of all changed modules, except for some."""
        for name in self._changed.difference(except_for):
            kept = self._kept[name]
            if kept.weight is None:
                kept.module.weight = cast("torch.nn.Parameter", kept.original)
            else:
                kept.weight.copy_(kept.original)
            self._changed.discard(name)

    def release(self, except_for: Collection[str] = ()) -> None:
        """Restores all modules, except for some, and frees their copies. No Merger may be built at the same time."""
        self.restore(except_for)
        with self._lock:
            self._kept = {name: kept for name, kept in self._kept.items() if name in except_for}


class Merger:
    """Merges task sets into a transformers model's weights, always starting from the exact original weights.

    Args:
        model: a transformers model; its target modules are `torch.nn.Linear`. Merging a set may give a module that
            shares its weight a weight of its own; the base set makes it share again.
        keep_projections: keep every A (r·d_in floats per module, on the model's device) instead of rebuilding it for
            each merge.
        originals: shared with the other Mergers of the same model, so that each undoes the others' changes. If None,
            this must be the model's only Merger.

    Raises:
        BaseMismatch: a module of the checkpoint is missing from the model, or has another shape.
        CorruptCheckpoint: with `keep_projections`, an A does not match its digest.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint,
        keep_projections: bool = True,
        originals: OriginalWeights | None = None,
    ):
        self.checkpoint = checkpoint
        self._originals = OriginalWeights(model) if originals is None else originals
        targets = dict(target_modules(model, checkpoint))
        self._dtypes = {name: torch.promote_types(m.weight.dtype, torch.float32) for name, m in targets.items()}
        self._projections: dict[str, torch.Tensor] = {}
        if keep_projections:
            self._projections = {n: checkpoint.projection_of(n).to(m.weight.device) for n, m in targets.items()}
        for name, module in targets.items():
            self._originals.keep(name, module)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the kept A."""
        return sum(a.numel() * a.element_size() for a in self._projections.values())

    def merge(self, task_set: TaskSet) -> None:
        """Sets W = round(W₀ + ΔW(S)), summed in float32 or a wider dtype of W. The base set restores W₀ exactly.

        Modules that this checkpoint does not adapt are restored to W₀ too, whatever another Merger left there.
        """
        names = frozenset() if task_set.is_base else frozenset(self._dtypes)
        self._originals.restore(except_for=names)
        for name in sorted(names):
            a = self._projections.get(name)
            self._originals.add(name, delta_weight(self.checkpoint, name, task_set, a, self._dtypes[name]))


def target_modules(model: torch.nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yields the modules of the model that the checkpoint adapts, with transformers' names.

    Raises:
        BaseMismatch: see Merger. Lists all modules that do not fit.
    """
    present = dict(model.named_modules())
    problems = []
    modules: list[tuple[str, torch.nn.Linear]] = []
    for name, spec in checkpoint.manifest.modules.items():
        module = present.get(name)
        shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if module is None or shape != (spec.d_out, spec.d_in):
            message = "is not in the model" if module is None else f"has shape {shape}, not {(spec.d_out, spec.d_in)}"
            problems.append(Problem(message, name, str(checkpoint.path), "use the base model of the checkpoint"))
        else:
            modules.append((name, cast("torch.nn.Linear", module)))
    if problems:
        raise BaseMismatch(problems)
    yield from modules
