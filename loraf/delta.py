"""ΔW of a task set, and weights with it added.

    ΔW(S) = Σ_{t∈S} w_t · (α_t / r) · B_t · A          (docs: the paper «LoRA without Forgetting», eq. of LoRA per task)

Everything is summed in float32 and rounded once.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator

import torch

from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, Problem
from loraf.tasksets import TaskSet


def task_scale(alpha: float, rank: int, weight: float = 1.0) -> float:
    """w·α/r."""
    return weight * alpha / rank


def combined_b(checkpoint: Checkpoint, module: str, task_set: TaskSet) -> torch.Tensor:
    """Σ w_t·(α_t/r)·B_t, float32 (d_out, rank). Masks are disjoint, so each entry is one task's value, scaled once."""
    spec = checkpoint.manifest.modules[module]
    out = torch.zeros(spec.d_out * checkpoint.manifest.rank)
    for name, weight in task_set.weights:
        b = checkpoint.tasks[name].get(module)
        if b is not None:
            alpha = checkpoint.manifest.task(name).alpha
            out[b.flat] = b.values.float() * task_scale(alpha, checkpoint.manifest.rank, weight)
    return out.view(spec.d_out, checkpoint.manifest.rank)


def delta_weight(checkpoint: Checkpoint, module: str, task_set: TaskSet, a: torch.Tensor | None = None) -> torch.Tensor:
    """ΔW(S) of one module, float32 (d_out, d_in).

    Args:
        a: the module's A if it is at hand (rank, d_in); rebuilt otherwise. The product is taken on its device.
    """
    a = checkpoint.projection_of(module) if a is None else a.float()
    return combined_b(checkpoint, module, task_set).to(a.device) @ a


class OriginalWeights:
    """The weights of a model as they were loaded: of each adapted module one copy, shared by all Mergers of the model.

    A module's weights are copied when the first Merger names it, before anything changes them. Mergers may be built
    while another thread merges; only one thread may merge.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.nn.Parameter, torch.Tensor]] = {}  # module → its weight, the original's copy
        self._changed: set[str] = set()  # modules that differ from the original now
        self._lock = threading.Lock()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(original.numel() * original.element_size() for _, original in self._kept.values())

    def keep(self, name: str, weight: torch.nn.Parameter) -> None:
        """Copies a module's weight unless that was done before."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = (weight, weight.detach().clone())

    @torch.no_grad()
    def add(self, name: str, delta: torch.Tensor) -> None:
        """W = round(W₀ + delta) for one module, the sum in float32. `delta`: float32 (d_out, d_in); it is used up."""
        weight, original = self._kept[name]
        self._changed.add(name)
        weight.copy_(delta.to(original.device).add_(original))

    @torch.no_grad()
    def restore(self, but: Collection[str] = ()) -> None:
        """Gives the modules that differ (except those in `but`) their original bits back."""
        for name in self._changed.difference(but):
            weight, original = self._kept[name]
            weight.copy_(original)
            self._changed.discard(name)

    def release(self, but: Collection[str] = ()) -> None:
        """Restores every module except those in `but`, and frees its copy. No Merger may be built at the same time."""
        self.restore(but)
        with self._lock:
            self._kept = {name: kept for name, kept in self._kept.items() if name in but}


class Merger:
    """Puts task sets into a transformers model's weights, always from the original weights, so exactly.

    Args:
        model: a transformers model; its target modules are `torch.nn.Linear`.
        keep_projections: keep every A (r·d_in floats a module, on the model's device) instead of rebuilding it at
            each merge.
        originals: shared with the other Mergers of the same model, so that each undoes what another one did;
            without it, this Merger must be the model's only one.

    Raises:
        BaseMismatch: the model lacks a module of the checkpoint, or it has another shape.
        CorruptCheckpoint: with `keep_projections`, an A is not the one that its digest was made with.
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
        """W = round(W₀ + ΔW(S)), the sum in float32; the base set restores W₀'s own bits.

        A module that this checkpoint does not adapt gets W₀'s bits too, whatever another Merger left there.
        """
        names = frozenset() if task_set.is_base else self._names
        self._originals.restore(but=names)
        for name in sorted(names):
            self._originals.add(name, delta_weight(self.checkpoint, name, task_set, self._projections.get(name)))


def target_modules(model: torch.nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The model's modules that the checkpoint adapts, by transformers' names.

    Raises:
        BaseMismatch: see Merger. All modules that do not fit are named.
    """
    present = dict(model.named_modules())
    problems = []
    found = []
    for name, spec in checkpoint.manifest.modules.items():
        module = present.get(name)
        shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if module is None or shape != (spec.d_out, spec.d_in):
            message = "is not in the model" if module is None else f"has shape {shape}, not {(spec.d_out, spec.d_in)}"
            problems.append(Problem(message, name, str(checkpoint.path), "use the base model of the checkpoint"))
        found.append((name, module))
    if problems:
        raise BaseMismatch(problems)
    yield from found
