"""The layer of `loraf-train` in the form in which PEFT expects it: several tasks by name, switched on and off, merged.

A task stands on the tasks that it was trained on top of, so one active task computes what it did when it was trained.
Several active tasks, or a chosen set, are one frozen B.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from loraf.errors import ConfigError, Problem
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.dropout import ModuleDraws
from loraf_train.adapter.layer import EarlierTasks, TaskValues, adapt, block_rows, refuse_use
from loraf_train.adapter.probe import WatchedWeight
from loraf_train.adapter.weights import computes_in, is_quantised

UNCALIBRATED = Problem(
    "its positions are not chosen yet, so there is nothing to train",
    remedy="call `loraf_train.peft.calibrate(model, dataloader)` first, or add a LorafCallback to the trainer",
)
UNPROTECTED = Problem(
    "nothing keeps it from changing what the finished tasks answer",
    "retention",
    remedy="add a LorafCallback to the trainer, call `loraf_train.peft.protect(model, optimizer, steps)` in a loop of "
    "your own, or set retention=None",
)
_NARROW = Problem(
    "its values are not float32 any more, and small steps would be lost",
    remedy="cast the base model before get_peft_model, and leave the adapter as it is",
)
_NONE = -1  # in place of a position that is not chosen yet


class TaskAdapter(TaskValues):
    """A task's values and positions in one layer, and what they were made with; all are in the state that PEFT saves.

    Args:
        weight, shape, scale, dropout: see TaskValues.
        k: number of positions.
        made_with: see `own_values.made_with`.

    Attributes:
        trained_with: the adapters that it stands on.
        is_frozen: it is a finished task, or a copy for reference, and is never trained again.
        needs_guard: there are finished tasks to protect while it trains; `is_guarded`: they are protected.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        shape: tuple[int, int],
        k: int,
        scale: float,
        dropout: float,
        made_with: torch.Tensor,
    ):
        super().__init__(weight, shape, torch.full((k,), _NONE), scale, dropout=dropout)
        self.register_buffer("positions", self.positions)  # now persistent
        self.register_buffer("made_with", made_with.clone())
        self.trained_with: tuple[str, ...] = ()
        self.is_frozen = False
        self.needs_guard = self.is_guarded = False
        self.is_calibrated = False

    @property
    def refusal(self) -> Problem | None:
        """Why it must not be trained now; None: it may."""
        if not self.is_calibrated:
            return UNCALIBRATED
        if self.needs_guard and not self.is_guarded:
            return UNPROTECTED
        narrow = torch.promote_types(self.values.dtype, torch.float32) != self.values.dtype
        return _NARROW if narrow else None

    def choose(self, positions: torch.Tensor) -> None:
        """Sets the positions, (K,) ascending, and all values to zero, in float32 or what is wider."""
        with torch.no_grad():
            self.positions.copy_(positions)
            dtype = torch.promote_types(self.values.dtype, torch.float32)
            self.values.data = torch.zeros_like(self.values, dtype=dtype)  # TRL casts those on a four-bit base
        self.note_positions()

    def note_positions(self) -> None:
        """Takes note of positions that were written into the buffer. Raises ConfigError if they are not those of B."""
        positions = self.positions.detach().cpu()
        self.is_calibrated = not bool((positions == _NONE).all())
        if not self.is_calibrated:
            return
        ascending = bool((positions[1:] > positions[:-1]).all())
        if not ascending or int(positions[0]) < 0 or int(positions[-1]) >= self.out_features * self.rank:
            raise ConfigError("positions of a LoRAF adapter are not ascending positions of its matrix")
        self._row_blocks = block_rows(positions, self.out_features, self.rank)

    def own(self, weight: float = 1.0) -> EarlierTasks:
        """Returns the task's own part of B, scaled."""
        if not self.is_calibrated:
            return EarlierTasks.of(())
        return EarlierTasks(self.positions, self.values.detach() * (self.scale * weight))

    def sparse(self, dtype: torch.dtype) -> SparseB:
        """Returns the task's B as a checkpoint stores it."""
        shape = (self.out_features, self.rank)
        return SparseB.from_positions(self.positions.cpu().long(), self.values.detach().to(dtype), shape)

    def b(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.is_calibrated:
            return super().b(values, dtype)
        return frozen_b(EarlierTasks(self.earlier_positions, self.earlier_values), self.out_features, self.rank, dtype)

    def gradient(self, g: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        refusal = self.refusal
        if refusal is not None:
            raise ConfigError(refusal)
        return super().gradient(g, z)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.positions.is_meta:
            self.note_positions()


def frozen_b(part: EarlierTasks, d_out: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a scaled B, (d_out, rank)."""
    out = torch.zeros(d_out * rank, dtype=dtype, device=part.positions.device)
    if len(part.positions):
        out.scatter_(0, part.positions.long(), part.values.to(dtype))
    return out.view(-1, rank)


def joined(parts: Sequence[EarlierTasks]) -> EarlierTasks:
    """Returns the sum of parts that share no position."""
    if not parts:
        return EarlierTasks.of(())
    return EarlierTasks(torch.cat([p.positions for p in parts]), torch.cat([p.values for p in parts]))


class LorafLayer(nn.Module, BaseTunerLayer):
    """A `torch.nn.Linear` with the tasks of a model, by the names of their adapters.

    Args:
        base_layer: the layer it replaces; changed only while it is merged.
        a: (rank, d_in), in the dtype of its weight.
        name: of the module, for messages.

    Shapes: (..., d_in) → (..., d_out).
    """

    adapter_layer_names = ("loraf_tasks",)
    other_param_names = ()
    loraf_a: torch.Tensor

    def __init__(self, base_layer: nn.Linear, a: torch.Tensor, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.module_name = name
        self.loraf_tasks = nn.ModuleDict()
        self.register_buffer("loraf_a", a.to(base_layer.weight.device), persistent=False)
        self.loraf_set: TaskValues | None = None  # what is computed with in place of a single task
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merging: nn.Parameter | None = None
        self.train(base_layer.training)

    @property
    def rank(self) -> int:
        return self.loraf_a.shape[0]

    @property
    def linear(self) -> nn.Linear:
        """The layer that this one replaces."""
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        return base

    @property
    def unmerged_weight(self) -> nn.Parameter:
        """The weight of the layer that this one replaces, (d_out, d_in), also while adapters are merged into it."""
        weight = self.linear.weight if self._before_merging is None else self._before_merging
        assert isinstance(weight, nn.Parameter)
        return weight

    def task(self, adapter: str) -> TaskAdapter:
        task = self.loraf_tasks[adapter]
        assert isinstance(task, TaskAdapter)
        return task

    def add_task(self, adapter: str, k: int, scale: float, dropout: float, made_with: torch.Tensor) -> None:
        """Adds a task without positions yet."""
        self.loraf_tasks[adapter] = TaskAdapter(
            self.linear.weight, (self.out_features, self.rank), k, scale, dropout, made_with
        ).train(self.training)

    # --- which tasks are on ---------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        names = self.active_adapters
        self._freeze(self.loraf_tasks if len(names) > 1 else [n for n in names if n in self.loraf_tasks])
        self.loraf_set = None
        if len(names) > 1:
            self.select(dict.fromkeys(self.with_earlier(names), 1.0))

    def enable_adapters(self, enabled: bool) -> None:
        chosen = self.loraf_set
        super().enable_adapters(enabled)  # of PEFT, which activates the adapters again
        if chosen is not None:
            self.loraf_set = chosen

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze(self.loraf_tasks)

    def _freeze(self, names: Any) -> None:
        """Keeps finished tasks, and several at once, from being trained."""
        several = len(self.active_adapters) > 1
        for name in names:
            if several or self.task(name).is_frozen:
                self.task(name).values.requires_grad_(False)

    def with_earlier(self, adapters: Sequence[str]) -> list[str]:
        """Returns the adapters and those that they were trained on top of, each once."""
        present = [name for name in adapters if name in self.loraf_tasks]
        return list(dict.fromkeys(n for name in present for n in (*self.task(name).trained_with, name)))

    def select(self, weights: Mapping[str, float] | None) -> None:
        """Computes with exactly these adapters, weighted; None: with the active ones again."""
        if weights is None:
            self.loraf_set = None
            return
        part = joined([self.task(name).own(weight) for name, weight in weights.items()])
        nothing = torch.empty(0, dtype=torch.int64)
        shape = (self.out_features, self.rank)
        self.loraf_set = TaskValues(self.linear.weight, shape, nothing, 1.0, part).requires_grad_(False)

    def _used(self) -> TaskValues | None:
        if self.loraf_set is not None:
            return self.loraf_set
        names = [name for name in self.active_adapters if name in self.loraf_tasks]
        return self.task(names[0]) if names else None

    # --- computing ------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code that asks for its dtype or device; computing with it would leave out B·A."""
        weight = self.linear.weight
        if self.merged or self.disable_adapters or self._used() is None:
            return weight
        return WatchedWeight.of(weight, refuse_use)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.training and torch.is_grad_enabled() and not self.disable_adapters:
            self._require_trained()
        used = None if self.disable_adapters or self.merged else self._used()
        if used is None:
            y: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return y
        return adapt(x, used.values, _View(self.linear, self.loraf_a, self.training, used))

    def _require_trained(self) -> None:
        """Raises ConfigError if the active task is to be trained, but is not what is computed with."""
        if not self.merged and self.loraf_set is None:
            return
        names = [name for name in self.active_adapters if name in self.loraf_tasks]
        if not any(self.task(name).values.requires_grad for name in names):
            return
        if self.merged:
            remedy = "call unmerge_adapter before training, or model.eval() to use the model"
            raise ConfigError(
                Problem("the adapters are merged, so the active task would not be trained", remedy=remedy)
            )
        remedy = "call `select_tasks(model, None)` before training, or model.eval() to use the set"
        raise ConfigError(Problem("a task set is selected, so the active task would not be trained", remedy=remedy))

    # --- merging --------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Returns ΔW of an adapter as it was trained, (d_out, d_in)."""
        return self._delta([adapter])

    @torch.no_grad()
    def _delta(self, adapters: Sequence[str]) -> torch.Tensor:
        return self._delta_of(joined([self.task(name).own() for name in self.with_earlier(adapters)]))

    def _delta_of(self, part: EarlierTasks) -> torch.Tensor:
        dtype = torch.promote_types(computes_in(self.linear), torch.float32)
        if not len(part.positions):
            return torch.zeros(self.out_features, self.in_features, dtype=dtype, device=self.loraf_a.device)
        return frozen_b(part, self.out_features, self.rank, dtype) @ self.loraf_a.to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Gives the base layer a weight with the adapters added; an embedding that shares the old one keeps it.

        Args:
            safe_merge: refuse a weight that is not finite.
            adapter_names: each as it was trained; None: what is on, a chosen set included.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loraf_tasks]
        if not names:
            return
        if self.disable_adapters:
            remedy = "leave disable_adapter first; `model.unload()` gives the base model"
            raise ConfigError(Problem("the adapters are switched off, so there is nothing to merge", remedy=remedy))
        if is_quantised(self.linear):
            remedy = "load the base without quantization, and merge there"
            raise ConfigError(Problem("a quantised weight cannot hold ΔW", self.module_name, remedy=remedy))
        before = self.unmerged_weight
        if adapter_names is None and self.loraf_set is not None and not self.merged:
            delta = self._delta_of(EarlierTasks(self.loraf_set.earlier_positions, self.loraf_set.earlier_values))
        else:
            delta = self._delta([*self.merged_adapters, *names])
        merged = (before.to(delta.dtype) + delta).to(before.dtype)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            broken = ", ".join(names)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")
        self._before_merging = before
        self.linear.weight = nn.Parameter(merged, requires_grad=before.requires_grad)
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        if not self.merged or self._before_merging is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.linear.weight = self._before_merging
        self._before_merging = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return f"loraf.{super().__repr__()}"


@dataclass(frozen=True)
class _View:
    """A layer with one of its tasks, as `adapt` computes with it."""

    base: nn.Linear
    a: torch.Tensor
    training: bool
    task: TaskValues
    draws: ModuleDraws | None = None

    @property
    def dropout(self) -> float:
        return self.task.dropout

    def b(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.task.b(values, dtype)

    def gradient(self, g: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.task.gradient(g, z)
