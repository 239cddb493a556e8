"""Checks that a saved state can be that of a task. It may come from anyone, as the checkpoint beside it may.

What the state was trained with is compared elsewhere (`resume.ResumeStore`). Here it is its tensors and counts: a wrong
one would end the run somewhere in the trainer, or write positions of other tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraf.manifest import positions_per_matrix
from loraf.matrices.sparse import SparseB

if TYPE_CHECKING:
    from loraf_train.settings.config import TaskConfig
    from loraf_train.trainer.loop import Snapshot

_VALUES = ".values"  # the parameter of an adapter's layer, after its module's name
_PENALTY = {"penalty.log_strength", "penalty.last_error"}  # of retention.protection
_STOPPING_NUMBERS, _STOPPING_VALUE = "stopping.numbers", "stopping.value."  # of trainer.stopping
_STREAMED = "stream.digest"  # of trainer.loop
_ADAMW = {"step", "exp_avg", "exp_avg_sq"}


@dataclass(frozen=True)
class TaskShape:
    """What a task's state must fit.

    Attributes:
        shapes: module → (d_out, rank) of B.
        taken: module → B of every task that owns positions.
        examples: number of training examples.
        protected: number of earlier tasks that retention protects.
    """

    task: TaskConfig
    shapes: Mapping[str, tuple[int, int]]
    taken: Mapping[str, Sequence[SparseB]]
    examples: int
    protected: int = 0

    def misfit(self, positions: Mapping[str, torch.Tensor] | None, snapshot: Snapshot | None) -> str:
        """Returns what cannot be in a state of this task; empty if it fits. Arguments as in `resume.State`."""
        if positions is not None:
            fault = self._position_fault(positions)
            if fault:
                return fault
        if snapshot is None:
            return ""
        training = self.task.training
        most = self.task.calibration.steps
        if positions is not None:
            most = training.max_steps or math.ceil(training.epochs * self.examples) + 1
        if not 0 < snapshot.step <= snapshot.steps <= most:
            return f"step {snapshot.step} of {snapshot.steps} is not one of this task"
        found = _PENALTY & snapshot.tensors.keys()
        if found and found != _PENALTY:
            return "it holds a part of what steers retention"
        if positions is not None and training.early_stopping is not None:
            best = {name for name in snapshot.tensors if name.startswith(_STOPPING_VALUE)}
            if _STOPPING_NUMBERS not in snapshot.tensors or len(best) not in (0, len(self.shapes)):
                return "it lacks a part of what early stopping needs"
        return self._tensor_fault(snapshot.tensors, calibrated=positions is not None)

    def _position_fault(self, positions: Mapping[str, torch.Tensor]) -> str:
        if positions.keys() != self.shapes.keys():
            return "it holds positions of other modules"
        for module, (d_out, rank) in self.shapes.items():
            own = positions[module]
            if own.ndim != 1 or len(own) != positions_per_matrix(self.task.sparsity, d_out, rank):
                return f"it holds another number of positions in {module}"
            ascending = bool((own[1:] > own[:-1]).all())
            if len(own) and not (ascending and own[0] >= 0 and own[-1] < d_out * rank):
                return f"its positions in {module} are not ascending positions of the matrix"
            if any(bool(torch.isin(b.positions, own).any()) for b in self.taken[module]):
                return f"its positions in {module} belong to another task"
        return ""

    def _stopping_fault(self, name: str, tensor: torch.Tensor) -> str:
        """What is wrong with a tensor of early stopping."""
        if self.task.training.early_stopping is None:
            return f"it holds {name[:80]!r}, and the task does not stop early"
        if name == _STOPPING_NUMBERS:
            whole = tensor.dtype == torch.float64 and list(tensor.shape) == [4]
            counts = whole and bool(((tensor[1:] >= 0) & (tensor[1:] == tensor[1:].floor())).all())
            return "" if counts and bool((tensor[1:] < 2**53).all()) else f"{name} is not a loss and three counts"
        module = name.removeprefix(_STOPPING_VALUE).removesuffix(_VALUES)
        if not name.endswith(_VALUES) or module not in self.shapes:
            return f"it holds {name[:80]!r}, which is no tensor of this task"
        numbers = self._numbers(module, calibrated=True)
        fits = tensor.is_floating_point() and list(tensor.shape) == [numbers]
        return "" if fits else f"{name} is {tensor.dtype} {list(tensor.shape)}, not {numbers} numbers"

    def _tensor_fault(self, tensors: Mapping[str, torch.Tensor], calibrated: bool) -> str:
        keys: dict[str, set[str]] = {f"{module}{_VALUES}": set() for module in self.shapes}
        for stored_name, tensor in tensors.items():
            if stored_name in _PENALTY:
                if tensor.dtype != torch.float64 or list(tensor.shape) != [self.protected]:
                    return f"{stored_name} is {tensor.dtype} {list(tensor.shape)}, not one number a protected task"
                continue
            if stored_name == _STREAMED:
                if not self.task.data.streaming or tensor.dtype != torch.uint8 or list(tensor.shape) != [32]:
                    return f"{stored_name} is not a digest of what this task has read"
                continue
            if stored_name == _STOPPING_NUMBERS or stored_name.startswith(_STOPPING_VALUE):
                fault = self._stopping_fault(stored_name, tensor) if calibrated else "it stops calibration early"
                if fault:
                    return fault
                continue
            kind, _, rest = stored_name.partition(".")
            key, _, name = rest.partition(".") if kind == "optimizer" else ("", "", rest)
            if kind not in ("parameter", "optimizer") or name not in keys or (key and key not in _ADAMW):
                return f"it holds {stored_name[:80]!r}, which is no tensor of this task"
            module = name.removesuffix(_VALUES)
            numbers = 1 if key == "step" else self._numbers(module, calibrated)
            if not tensor.is_floating_point() or tensor.numel() != numbers or tensor.ndim > 1:
                return f"{stored_name} is {tensor.dtype} {list(tensor.shape)}, not {numbers} numbers"
            keys[name].add(key)
        if set(map(frozenset, keys.values())) - {frozenset({""}), frozenset({"", *_ADAMW})}:
            return "it lacks parameters, or a part of the optimizer's state"
        return ""

    def _numbers(self, module: str, calibrated: bool) -> int:
        d_out, rank = self.shapes[module]
        if calibrated:
            return positions_per_matrix(self.task.sparsity, d_out, rank)
        return d_out * rank - sum(len(b.values) for b in self.taken[module])
