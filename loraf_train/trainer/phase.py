"""One phase of optimizer steps as data: what it trains with, where it starts, what is saved of it, how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loraf_train.settings.parts import TrainingConfig
    from loraf_train.trainer import trackers

OnStep = Callable[[float, float, int, int], None]  # loss, learning rate, step from 1, number of steps


@dataclass(frozen=True)
class Phase:
    """What a phase trains with.

    A new training setting is a field of TrainingConfig and a line where it acts, for most of them in `_arguments`.

    Attributes:
        name: for messages, for example "calibration of task 'math'".
        seed: below 2³²; determines the order of the examples and dropout.
        settings: `training:` of tasks.yaml; in code, a max_grad_norm of 0 switches clipping off.
        optimizer: "adamw" or "sgd".
        tracking: trackers that log each step.
        beta: of direct preference optimisation; None: the loss is that of the completions.
    """

    name: str
    seed: int
    settings: TrainingConfig
    optimizer: str = "adamw"
    tracking: trackers.Tracking | None = None
    beta: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Summary of a finished phase. Losses are means over completion tokens; `first_loss` is that of step 1."""

    steps: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Snapshot:
    """A phase between two optimizer steps: together with the Phase and the examples, all it needs to continue.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps of the whole phase.
        tensors: `parameter.<name>` and `optimizer.<key>.<name>` of each trainable parameter, and `penalty.<key>`; on
            the CPU.
    """

    step: int
    steps: int
    first_loss: float
    last_loss: float
    tensors: dict[str, torch.Tensor]

    def part(self, kind: str) -> dict[str, torch.Tensor]:
        """Returns the tensors of one kind, such as "parameter", by the rest of their names."""
        return {name[len(kind) + 1 :]: tensor for name, tensor in self.tensors.items() if name.startswith(f"{kind}.")}


class Journal:
    """Where a phase starts, and what is saved of it. This base class starts at step 0 and saves nothing.

    Attributes:
        start: the state to resume from; None: start at step 0.
        dropout_by_token: False: dropout is drawn as before it was drawn by token, from a generator seeded by step and
            process, and the base model's own dropout is on. So a phase that an earlier version began is finished.
    """

    start: Snapshot | None = None
    dropout_by_token: bool = True

    def after_step(self, step: int, steps: int, snapshot: Callable[[], Snapshot]) -> None:
        """Called in every process after each step; call `snapshot` only if the state is to be saved."""


NO_JOURNAL = Journal()
