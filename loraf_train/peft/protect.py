"""Keeps what finished tasks answer while a later one trains, in a loop that is not `loraf-train`'s.

The penalty is added to the gradients right before the optimizer's step, so after clipping and once a step, whoever
calls the optimizer.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loraf.errors import ConfigError, Problem
from loraf_train.peft.model import LorafModel, tuner_of
from loraf_train.retention.of_task import RetentionOfTask
from loraf_train.retention.protection import ProtectedTask
from loraf_train.retention.statistics import decode
from loraf_train.settings.parts import RetentionConfig


def retention_of(tuner: LorafModel, adapter: str) -> RetentionOfTask:
    """Returns what retention does in an adapter's training."""
    budget = tuner.states[adapter].config.retention
    settings = None if budget is None else RetentionConfig(budget=budget)
    return RetentionOfTask(settings, protected(tuner) if settings else ())


def protected(tuner: LorafModel) -> list[ProtectedTask]:
    """Returns the finished tasks that have statistics, in order."""
    names = tuner.finished()
    shapes = {module: (layer.out_features, layer.rank) for module, layer in tuner.layers().items()}
    found = []
    for i, name in enumerate(names):
        state = tuner.states[name]
        if state.statistics is not None:
            statistics = decode(state.statistics, shapes, f"statistics of task {state.name!r}")
            found.append(ProtectedTask(state.name, statistics, tuner.earlier(names[i + 1 :])))
    return found


def warn_of_unprotected(tuner: LorafModel, adapter: str) -> None:
    """Warns if retention is on, but nothing is known of some finished tasks that could protect them."""
    unknown = [tuner.states[name].name for name in tuner.finished() if tuner.states[name].statistics is None]
    if unknown and tuner.states[adapter].config.retention is not None:
        message = (
            f"the finished tasks {', '.join(unknown)} have no statistics, so task {tuner.states[adapter].name!r} may "
            "change what they answer; load them with `loraf_train.peft.load_tasks` from a checkpoint that has them"
        )
        warnings.warn(message, UserWarning, stacklevel=3)


class Guard:
    """The penalty of one training, hooked to its optimizer.

    Args:
        steps: optimizer steps of the whole training.
        done: steps done before.
    """

    def __init__(self, tuner: LorafModel, adapter: str, optimizer: torch.optim.Optimizer, steps: int, done: int):
        self._tasks = [layer.task(adapter) for layer in tuner.layers().values()]
        self._state = tuner.states[adapter]
        self._steps, self._done = steps, done
        self.retention = retention_of(tuner, adapter)
        self.penalty = self.retention.penalty({m: layer.task(adapter) for m, layer in tuner.layers().items()})
        self._handle: RemovableHandle | None = optimizer.register_step_pre_hook(self._before_step)
        for task in self._tasks:
            task.is_guarded = True

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if all(task.values.grad is None for task in self._tasks):
            message = f"task {self._state.name!r} got no gradient in this step"
            remedy = "make its adapter the active one, and train it neither merged nor disabled"
            raise ConfigError(Problem(message, remedy=remedy))
        if self.retention.is_protecting and getattr(optimizer, "grad_scale", None) is not None:
            message = (
                "the optimizer gets gradients that are scaled for float16, and the protection would be lost in them"
            )
            remedy = "unscale them before the step (clip them, for example), or train in bfloat16"
            raise ConfigError(Problem(message, remedy=remedy))
        self.penalty.add_gradient(self._done, max(self._steps, self._done + 1))
        self._done += 1

    def remove(self) -> None:
        """Ends the protection; training on is refused until there is another."""
        for task in self._tasks:
            task.is_guarded = False
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        if self.retention.is_protecting and self._done < self._steps:
            message = (
                f"task {self._state.name!r} was protected for {self._steps} steps and trained for {self._done}: the "
                "protection sets in gradually, so earlier tasks may change beyond the budget; pass the steps you take"
            )
            warnings.warn(message, UserWarning, stacklevel=2)
        if self.retention.is_protecting:
            self._state.record["retention"] = self.retention.record


def protect(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, done: int = 0) -> Guard:
    """Protects the finished tasks while the active one trains with this optimizer.

    Needed in a training loop of your own for every task but the first; a LorafCallback does it in a Trainer.

    Args:
        optimizer: of the training; one that accelerate has wrapped is taken as well.
        steps: optimizer steps of the whole training: the protection sets in gradually and is in force at its end.
        done: steps done before, when a training goes on.

    Returns:
        What ends the protection by its `remove()`.

    Raises:
        ConfigError: the active task cannot be trained, or the optimizer does not train it.
    """
    tuner = tuner_of(model)
    adapter = tuner.active_task()
    state = tuner.states[adapter]
    if state.is_finished or not tuner.is_calibrated(adapter):
        message = f"task {state.name!r} is {'finished' if state.is_finished else 'not calibrated'}"
        raise ConfigError(Problem(message, remedy="calibrate a new task first"))
    if steps < 1:
        raise ConfigError(Problem(f"{steps} cannot be used", "steps", remedy="use the number of optimizer steps"))
    inner = getattr(optimizer, "optimizer", optimizer)
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    if any(id(layer.task(adapter).values) not in trained for layer in tuner.layers().values()):
        message = f"does not train the values of task {state.name!r}"
        raise ConfigError(Problem(message, "optimizer", remedy="make it after model.set_adapter"))
    warn_of_unprotected(tuner, adapter)
    return Guard(tuner, adapter, inner, steps, done)
