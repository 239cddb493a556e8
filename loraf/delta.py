"""ΔW of a task set, and weights with it added.

    ΔW(S) = Σ_{t∈S} w_t · (α_t / r) · B_t · A          (docs: the paper «LoRA without Forgetting», eq. of LoRA per task)

Everything is summed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

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
        a: the module's A if it is at hand (rank, d_in); rebuilt otherwise.
    """
    a = checkpoint.projection_of(module) if a is None else a.float()
    return combined_b(checkpoint, module, task_set) @ a


class Merger:
    """Puts task sets into a transformers model's weights, always from the original weights, so exactly.

    Args:
        model: a transformers model; its target modules are `torch.nn.Linear`.
        keep_projections: keep every A in memory (r·d_in floats a module) instead of rebuilding it at each merge.

    Raises:
        BaseMismatch: the model lacks a module of the checkpoint, or it has another shape.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint, keep_projections: bool = True):
        self.checkpoint = checkpoint
        self._weights = {name: module.weight for name, module in target_modules(model, checkpoint)}
        self._original = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._projections = {name: checkpoint.projection_of(name) for name in self._weights} if keep_projections else {}

    @torch.no_grad()
    def merge(self, task_set: TaskSet) -> None:
        """W = round(W₀ + ΔW(S)), the sum in float32; the base set restores W₀'s own bits."""
        for name, weight in self._weights.items():
            original = self._original[name]
            if task_set.is_base:
                weight.copy_(original)
                continue
            delta = delta_weight(self.checkpoint, name, task_set, self._projections.get(name))
            weight.copy_((original.float() + delta.to(original.device)).to(original.dtype))


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
