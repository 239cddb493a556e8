"""What a comparison measured: plain data, and its JSON form. Everything that is shown is derived from it.

A run is one method with one seed. With the protocol `single` every task is trained alone, from the base; with
`sequence` the tasks are trained one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
BASE = ""  # in the place of a task's name: before anything was trained
SO_FAR, AS_TRAINED = "so-far", "as-trained"


@dataclass(frozen=True)
class ScoredTask:
    """A task of the file.

    Attributes:
        evaluations: names of its evaluation sets, in order → examples of each.
    """

    name: str
    metric: str
    higher_is_better: bool
    evaluations: dict[str, int]


@dataclass(frozen=True)
class RunScore:
    """One number.

    Attributes:
        after: the last task trained when it was measured; BASE: the bare model. `single`: the task itself, or BASE.
        acting: SO_FAR: all that was trained until then acts; AS_TRAINED: what acted on the day when `task` had just
            ended, measured at the end of the run (for a method that keeps no such state apart, what a copy kept on
            that day scores: the run says so in `keeps_copies`).
        task, evaluation: what is scored; `count` examples.
    """

    after: str
    acting: str
    task: str
    evaluation: str
    score: float
    count: int


@dataclass(frozen=True)
class Cost:
    """Of training one task.

    Attributes:
        trainable: parameters that the optimizer moves (of loraf: K values of all modules; calibration is not counted
            here but is in `seconds` and `peak_bytes`).
        steps: optimizer steps, calibration included.
        peak_bytes: most memory of the process (GPU: allocated on the device) meanwhile; None: it cannot be told.
        file_bytes: what is to be kept on disk so that this task can be served, beside the base model.
    """

    task: str
    trainable: int
    steps: int
    seconds: float
    peak_bytes: int | None
    file_bytes: int


@dataclass(frozen=True)
class Drift:
    """Loss on held-out general text, nats a token, when all tasks up to `after` act."""

    after: str
    loss: float
    tokens: int


@dataclass(frozen=True)
class MaskShare:
    """Positions that a task owns in one module: `positions` of `size`."""

    task: str
    module: str
    positions: int
    size: int


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        keeps_copies: as-trained scores need a copy of what was trained for every task (lora, full, frozen-a).
    """

    method: str
    seed: int
    keeps_copies: bool
    scores: tuple[RunScore, ...]
    costs: tuple[Cost, ...]
    drift: tuple[Drift, ...] = ()
    masks: tuple[MaskShare, ...] = ()


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    Attributes:
        model: its name as the file gives it; `parameters`: of the bare model.
        settings: method → task → what it was trained with (learning rate, alpha, …), for the reader.
        surroundings: machine, precision, processes and versions.
    """

    protocol: str  # single or sequence
    model: str
    parameters: int
    tasks: tuple[ScoredTask, ...]
    runs: tuple[Run, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.method for run in self.runs))
