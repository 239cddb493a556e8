"""Early stopping: a phase is evaluated on the way, ends when it no longer improves, and keeps the best values.

An evaluation is better if its loss is smaller than every one before; of equal ones the first is the best. Values that
the penalty does not accept (`Penalty.accepts`) are evaluated, but neither can they be the best nor do they count as
patience spent. A phase without any acceptable evaluation ends with its last values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from loraf_train.processes import group

_NUMBERS = "numbers"  # of the state: best loss, its step, evaluations without improvement, the last evaluation's step
_VALUE = "value."  # prefix of the best parameters
OnEvaluation = Callable[[float, int, bool], None]  # loss, step from 1, whether it is the best so far


class Stopping:
    """Early stopping of one phase.

    Args:
        patience: evaluations without improvement after which the phase ends.
        every: steps between two evaluations; None: an epoch. The last step is evaluated in any case.
        evaluate: returns the loss of the model as it is, lower is better. Called in every process.
        device: the one this process computes on.
        on_evaluation: called in the first process.

    Attributes:
        best_loss: of the best evaluation; infinite: there is none.
        best_step: after which it was measured; 0: there is none.
        last_step: of the last evaluation.
    """

    def __init__(
        self,
        patience: int,
        every: int | None,
        evaluate: Callable[[], float],
        device: torch.device,
        on_evaluation: OnEvaluation = lambda loss, step, best: None,
    ):
        self._patience = patience
        self._every = every
        self._evaluate = evaluate
        self._device = device
        self._on_evaluation = on_evaluation
        self.best_loss, self.best_step, self.last_step = math.inf, 0, 0
        self._without_improvement = 0
        self._best: dict[str, torch.Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self._without_improvement >= self._patience

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it; the steps are of optimizer steps, the loss is that of the kept values."""
        kept = {"best_step": self.best_step, "best_loss": self.best_loss} if self.best_step else {}
        return {**kept, "last_step": self.last_step}

    def is_due(self, step: int, steps: int, steps_of_epoch: int) -> bool:
        return step == steps or step % (self._every or steps_of_epoch) == 0

    def evaluate(self, step: int, parameters: Mapping[str, nn.Parameter], accepted: bool) -> float:
        """Evaluates the model after a step, and keeps its parameters if they are the best. Returns the loss."""
        loss = group.of_first(self._evaluate(), self._device)
        better = accepted and loss < self.best_loss
        self.last_step = step
        if better:
            self.best_loss, self.best_step, self._without_improvement = loss, step, 0
            self._best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        elif accepted and self.best_step:
            self._without_improvement += 1
        if group.is_first():
            self._on_evaluation(loss, step, better)
        return loss

    @torch.no_grad()
    def keep_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sets the parameters to the best ones, if there are any."""
        for name, best in self._best.items():
            parameters[name].copy_(best)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what the next steps depend on, for the Snapshot."""
        numbers = [self.best_loss, self.best_step, self._without_improvement, self.last_step]
        best = {f"{_VALUE}{name}": tensor for name, tensor in self._best.items()}
        return {_NUMBERS: torch.tensor(numbers, dtype=torch.float64), **best}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` returned."""
        self.best_loss, *counts = state[_NUMBERS].tolist()
        self.best_step, self._without_improvement, self.last_step = map(int, counts)
        best = {name.removeprefix(_VALUE): tensor for name, tensor in state.items() if name.startswith(_VALUE)}
        self._best = {name: tensor.to(self._device) for name, tensor in best.items()}
