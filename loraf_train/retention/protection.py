"""The penalty that keeps the logits of earlier tasks within a budget while a later one trains.

For an earlier task t, D is all that came after it: the later tasks that the checkpoint has, and the values in training.
With P from `statistics`, the loss gets Σ_t λ_t·P_t(D), whose gradient at the trained positions is 2·λ_t·s·(G·D·C),
s = α/r. λ_t is a price in nats per squared logit: it keeps a new task from changing what it gains nothing by. Where P_t
still exceeds the square of the budget, λ_t is steered upwards.

Both set in gradually: only where training ends matters, and a penalty at full strength from the first step finds worse
solutions (docs/explanation/retention.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loraf.errors import ConfigError, Problem
from loraf_train.adapter.layer import EarlierTasks, TaskValues
from loraf_train.retention.statistics import Statistics
from loraf_train.trainer.penalty import Penalty

PRICE = 3.0  # the smallest λ once the budget is in force; until then it rises in proportion to the step
_STRONGEST = 100.0  # λ; beyond it a new task learns nothing
_IN_FORCE = 0.7  # share of the steps after which price and budget are in force
# Of the controller: the change of log λ in a step, per unit of log(P / allowed) and of its change since the last step.
# The first is larger in short runs, so that λ can cross all of its range.
_INTEGRAL, _INTEGRAL_OF_ALL_STEPS, _PROPORTIONAL = 0.05, 8.0, 0.3
OVER = 1.1  # of the budget; a little more is how steering ends
_LARGEST_ERROR = 2.0  # of log(P / allowed): at the first steps P is near 0


@dataclass(frozen=True)
class ProtectedTask:
    """An earlier task as a later one sees it.

    Attributes:
        later: module → the stored tasks that came after it.
        price: the smallest λ once the budget is in force.
    """

    name: str
    statistics: Statistics
    later: Mapping[str, EarlierTasks]
    price: float = PRICE


def allowed(budget: float, step: int, steps: int) -> float:
    """Returns the mean squared change of a logit that is allowed at a step, from 1: it falls to budget²."""
    return budget * budget * max(1.0, _IN_FORCE * steps / step)  # a power would refuse an overflow


class Protection(Penalty):
    """Protects tasks while the values of `layers` are trained.

    Args:
        layers: module → the layer in training.
        budget: root mean square change of a logit of each task.
    """

    def __init__(self, layers: Mapping[str, TaskValues], tasks: Sequence[ProtectedTask], budget: float):
        self._layers = layers
        self._budget = budget
        self._tasks = [_Quadratic(layers, task) for task in tasks]
        self.names = [task.name for task in tasks]
        self._prices = torch.tensor([task.price for task in tasks], dtype=torch.float64)
        self._log_strength = torch.full((len(tasks),), -math.inf, dtype=torch.float64)
        self._last_error = torch.full((len(tasks),), math.nan, dtype=torch.float64)

    @torch.no_grad()
    def add_gradient(self, step: int, steps: int) -> None:
        deltas = {name: _dense(layer, layer.values, layer.scale) for name, layer in self._layers.items()}
        evaluated = [task.evaluate(deltas) for task in self._tasks]
        changes = torch.stack([change for change, _ in evaluated]).cpu().double()
        self._require_finite(changes, step)
        self._steer(changes, step + 1, steps)
        for strength, (_, gradients) in zip(self._log_strength.exp().tolist(), evaluated, strict=True):
            for name, layer in self._layers.items():
                if layer.values.grad is not None:
                    layer.values.grad.add_(gradients[name], alpha=strength)

    def _require_finite(self, changes: torch.Tensor, step: int) -> None:
        wrong = [name for name, change in zip(self.names, changes.tolist(), strict=True) if not math.isfinite(change)]
        if wrong:
            message = f"the predicted change of the logits of {', '.join(wrong)} is not finite at step {step + 1}"
            remedy = "use a lower learning rate, or gather the statistics again (`loraf-train protect --again`)"
            raise ConfigError(Problem(message, remedy=remedy))

    def _steer(self, changes: torch.Tensor, step: int, steps: int) -> None:
        """Adjusts λ by P's distance from what is allowed: a proportional-integral controller of log λ."""
        error = (changes.clamp(min=1e-12) / allowed(self._budget, step, steps)).log()
        error.clamp_(-_LARGEST_ERROR, _LARGEST_ERROR)
        since = torch.where(self._last_error.isnan(), 0.0, error - self._last_error)
        integral = max(_INTEGRAL, _INTEGRAL_OF_ALL_STEPS / steps)
        self._log_strength += integral * error + _PROPORTIONAL * since
        smallest = self._prices * min(1.0, step / (_IN_FORCE * steps))
        self._log_strength.clamp_(max=math.log(_STRONGEST)).clamp_(min=smallest.log())
        self._last_error = error

    @torch.no_grad()
    def changes(self) -> dict[str, float]:
        """Returns task → the root mean square change of its logits that the statistics predict now."""
        deltas = {name: _dense(layer, layer.values, layer.scale) for name, layer in self._layers.items()}
        squares = [float(task.evaluate(deltas)[0]) for task in self._tasks]
        return {name: max(square, 0.0) ** 0.5 for name, square in zip(self.names, squares, strict=True)}

    def accepts(self) -> bool:
        """Whether no task's predicted change is beyond the budget, with the little more with which steering ends."""
        return all(change <= OVER * self._budget for change in self.changes().values())

    def state(self) -> dict[str, torch.Tensor]:
        return {"log_strength": self._log_strength.clone(), "last_error": self._last_error.clone()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._log_strength, self._last_error = state["log_strength"].clone(), state["last_error"].clone()


class _Quadratic:
    """P of one earlier task as a function of the values v in training.

    With F the stored later tasks and s·S(v) the values at their positions, P = ⟨F + s·S(v), G·(F + s·S(v))·C⟩. What
    depends on F alone is computed once.
    """

    @torch.no_grad()
    def __init__(self, layers: Mapping[str, TaskValues], task: ProtectedTask):
        self._layers = layers
        device = next(iter(layers.values())).values.device
        self._statistics = {name: task.statistics[name].to(device) for name in layers}
        self._of_later: dict[str, torch.Tensor] = {}  # module → G·F·C at the positions
        self._square_of_later = torch.zeros((), device=device)
        for name, layer in layers.items():
            later = task.later[name]
            if not len(later.positions):
                continue
            fixed = torch.zeros(layer.out_features * layer.rank, device=device)
            fixed[later.positions.to(device).long()] = later.values.to(device).float()
            fixed = fixed.view(-1, layer.rank)
            weighted = self._statistics[name].weighted(fixed)
            self._of_later[name] = _at(layer, weighted)
            self._square_of_later += (weighted * fixed).sum()

    def evaluate(self, deltas: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns P, and its gradient by the values of each module. `deltas`: module → s·S(v)."""
        square = self._square_of_later.clone()
        gradients = {}
        for name, layer in self._layers.items():
            weighted = _at(layer, self._statistics[name].weighted(deltas[name]))
            scaled = layer.values.detach().float() * layer.scale
            square += (scaled * weighted).sum()
            if name in self._of_later:
                square += 2 * (scaled * self._of_later[name]).sum()
                weighted = weighted + self._of_later[name]
            gradients[name] = weighted.mul_(2 * layer.scale).to(layer.values.dtype)
        return square, gradients


def _dense(layer: TaskValues, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns a (d_out, rank) float32 matrix with scale·values at the layer's positions."""
    out = torch.zeros(layer.out_features * layer.rank, device=values.device)
    out[layer.positions.long()] = values.detach().float() * scale
    return out.view(-1, layer.rank)


def _at(layer: TaskValues, matrix: torch.Tensor) -> torch.Tensor:
    """Returns the entries of a (d_out, rank) matrix at the layer's positions."""
    return matrix.reshape(-1).index_select(0, layer.positions)
