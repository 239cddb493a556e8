"""ΔW of a task set, and merging it into a model's weights.

    ΔW(S) = Σ_{t∈S} w_t · (α_t / r) · B_t · A          (the paper «LoRA without Forgetting»)

Everything is summed in float32 and rounded once.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import cast

import torch

from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, Problem
from loraf.tasksets import TaskSet


def task_scale(alpha: float, rank: int, weight: float = 1.0) -> float:
    """Returns w·α/r, the factor of a task's B·A in ΔW."""
    return weight * alpha / rank


def combined_b(checkpoint: Checkpoint, module: str, task_set: TaskSet) -> torch.Tensor:
    """Returns Σ w_t·(α_t/r)·B_t, float32 (d_out, rank). Masks are disjoint: each entry is one task's value, scaled."""
    spec = checkpoint.manifest.modules[module]
    out = torch.zeros(spec.d_out * checkpoint.manifest.rank)
    for name, weight in task_set.weights:
        b = checkpoint.tasks[name].get(module)
        if b is not None:
            alpha = checkpoint.manifest.task(name).alpha
            out[b.positions] = b.values.float() * task_scale(alpha, checkpoint.manifest.rank, weight)
    return out.view(spec.d_out, checkpoint.manifest.rank)


def delta_weight(checkpoint: Checkpoint, module: str, task_set: TaskSet, a: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ΔW(S) of one module, float32 (d_out, d_in).

    Args:
        a: the module's A, (rank, d_in), if available; rebuilt otherwise. The product is computed on its device.
    """
    a = checkpoint.projection_of(module) if a is None else a.float()
    return combined_b(checkpoint, module, task_set).to(a.device) @ a


class OriginalWeights:
    """Copies of the original weights of a model's adapted modules, shared by all Mergers of the model.

    A module's weight is copied when the first Merger that adapts it is built, before anything changes it. Mergers may
    be built while another thread merges; only one thread may merge at a time.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # module → weight, copy of the original
        self._changed: set[str] = set()  # modules that currently differ from the original
        self._lock = threading.Lock()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(original.numel() * original.element_size() for _, original in self._kept.values())

    def keep(self, name: str, weight: torch.Tensor) -> None:
        """Copies a module's weight unless it was copied before."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = (weight, weight.detach().clone())

    @torch.no_grad()
    def add(self, name: str, delta: torch.Tensor) -> None:
        """Sets W = round(W₀ + delta) for one module, summed in float32. Overwrites `delta`, float32 (d_out, d_in)."""
        weight, original = self._kept[name]
        self._changed.add(name)
        weight.copy_(delta.to(original.device).add_(original))

    @torch.no_grad()
    def restore(self, except_for: Collection[str] = ()) -> None:
        """Restores the exact original weights of all changed modules, except for some."""
        for name in self._changed.difference(except_for):
            weight, original = self._kept[name]
            weight.copy_(original)
            self._changed.discard(name)

    def release(self, except_for: Collection[str] = ()) -> None:
        """Restores all modules, except for some, and frees their copies. No Merger may be built at the same time."""
        self.restore(except_for)
        with self._lock:
            self._kept = {name: kept for name, kept in self._kept.items() if name in except_for}


class Merger:
    """Merges task sets into a transformers model's weights, always starting from the exact original weights.

    Args:
        model: a transformers model; its target modules are `torch.nn.Linear`.
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
        self._originals = OriginalWeights() if originals is None else originals
        weights = {name: module.weight for name, module in target_modules(model, checkpoint)}
        self._names = frozenset(weights)
        self._projections: dict[str, torch.Tensor] = {}
        if keep_projections:
            self._projections = {n: checkpoint.projection_of(n).to(w.device) for n, w in weights.items()}
        for name, weight in weights.items():
            self._originals.keep(name, weight)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the kept A."""
        return sum(a.numel() * a.element_size() for a in self._projections.values())

    def merge(self, task_set: TaskSet) -> None:
        """Sets W = round(W₀ + ΔW(S)), summed in float32. The base set restores W₀ exactly.

        Modules that this checkpoint does not adapt are restored to W₀ too, whatever another Merger left there.
        """
        names = frozenset() if task_set.is_base else self._names
        self._originals.restore(except_for=names)
        for name in sorted(names):
            self._originals.add(name, delta_weight(self.checkpoint, name, task_set, self._projections.get(name)))


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
