"""What every method is and uses: its calls, its events, one training, sizes on disk, and the way back to the base."""

from __future__ import annotations

import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraf_train.adapter import model_limits
from loraf_train.compare.results import MaskShare
from loraf_train.processes import group
from loraf_train.sequence import phases, provenance, runner
from loraf_train.trainer import loop
from loraf_train.trainer.penalty import NO_PENALTY, Penalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.data.examples import Example
    from loraf_train.data.task_data import TaskData
    from loraf_train.settings.config import RunConfig, TaskConfig

CALIBRATION, TRAINING = "calibration", "training"


@dataclass(frozen=True)
class Bench:
    """What every method trains on.

    Attributes:
        loaded: the base model, its tokenizer and their folder. All runs share the model.
        scratch: a folder for what this run writes, which does not exist yet; the same in all processes.
    """

    loaded: runner.Loaded
    data: Mapping[str, TaskData]
    scratch: Path

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded[0]

    @property
    def pad_id(self) -> int:
        return model_limits.padding_id(self.loaded[1], model_limits.vocabulary(self.model))


@dataclass(frozen=True)
class TrainedTask:
    """The result of training one task; see `results.Cost`."""

    trainable: int
    steps: int
    file_bytes: int
    masks: tuple[MaskShare, ...] = ()


class Listener:
    """Events of a method's training. All methods here are no-ops; only the first process needs others."""

    def started(self, task: TaskConfig) -> None:
        """The task's training begins."""

    def step(self, task: TaskConfig, phase: str, loss: float, step: int, total: int) -> None:
        """A step of CALIBRATION or TRAINING is done; `step` counts from 1."""

    def ended(self, task: TaskConfig) -> None:
        """The task's training has ended; nothing is written or merged yet."""

    def trained(self, task: TaskConfig, outcome: TrainedTask) -> None:
        """The model holds all tasks so far, or with `Method.apart` this task. Leave its weights as they are."""

    def changed(self, task: str, after: str, predicted: float, measured: float) -> None:
        """How far training moved an earlier task's logits, see `results.Change`."""

    def as_trained(self, task: TaskConfig) -> None:
        """After the last task: the model holds what it held when `task` had just been trained."""

    def selected(self, tasks: Sequence[TaskConfig]) -> None:
        """After the last task: the model holds the values of these tasks only: of one, or of two of three or more."""


class Method(ABC):
    """One way to train tasks.

    Attributes:
        name: in --methods, in files and in tables.
        keeps_copies: as-trained scores need a copy kept after each task, so `Listener.as_trained` is never called.
        apart: each task is served alone, with what was trained for it; all tasks are never on together.
    """

    name: str
    keeps_copies = True
    apart = False

    @abstractmethod
    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        """Trains all tasks of `config`, whose seed determines everything random.

        Raises:
            ConfigError: see `loop.fit`.
        """

    @abstractmethod
    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        """Returns the settings that determine the task's values, as plain JSON: those that the method uses."""


def adapter_settings(config: RunConfig, task: TaskConfig, without: tuple[str, ...]) -> dict[str, Any]:
    adapter = config.adapter.model_dump(mode="json", include={"rank", "target_modules", "init_std"})
    settings = {**provenance.settings(config, task), **adapter}
    return {key: value for key, value in settings.items() if key not in ("data", *without)}


def seed_of(config: RunConfig, task: TaskConfig) -> int:
    """The seed that a sequence gives the task's training, so that all methods see the examples in the same order."""
    return phases.seeds_of(config.seed, task.name)[phases.TRAINING_SEED]


def on_step(listener: Listener, task: TaskConfig) -> loop.OnStep:
    return lambda loss, rate, step, total: listener.step(task, TRAINING, loss, step, total)


def fit(
    bench: Bench,
    config: RunConfig,
    task: TaskConfig,
    listener: Listener,
    examples: Sequence[Example] | None = None,
    penalty: Penalty = NO_PENALTY,
) -> tuple[loop.Outcome, int]:
    """Trains the model's trainable parameters; returns the outcome and their number.

    Args:
        examples: None: the task's own.
    """
    trainable = sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
    outcome = loop.fit(
        bench.model,
        bench.data[task.name].train if examples is None else examples,
        phases.training_phase(task, seed_of(config, task)),
        bench.pad_id,
        on_step(listener, task),
        penalty=penalty,
    )
    return outcome, trainable


def steps_of(task: TaskConfig, examples: int) -> int:
    """The number of optimizer steps of a task's training on so many examples."""
    training = task.training
    if training.max_steps is not None:
        return training.max_steps
    return math.ceil(training.epochs * math.ceil(examples / training.batch_size))


def with_steps(task: TaskConfig, steps: int) -> TaskConfig:
    """The task, trained for this number of steps whatever the number of its examples."""
    return task.model_copy(update={"training": task.training.model_copy(update={"max_steps": steps})})


def written_bytes(bench: Bench, save: Callable[[Path], Any]) -> int:
    """The size of the safetensors files that `save` writes into a folder, in bytes; the folder is deleted again."""

    def measure() -> int:
        bench.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            save(Path(folder))
            return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))

    return group.first_writes(measure, lambda: 0)


@torch.no_grad()
def restore_base(bench: Bench, config: RunConfig) -> None:
    """Reads the base's weights again; a copy kept in memory would count towards the method's peak memory."""
    fresh = dict(runner.load_model(config)[0].named_parameters())
    trained = dict(bench.model.named_parameters())
    if trained.keys() != fresh.keys():
        raise RuntimeError(f"a method left other parameters in the model: {sorted(trained.keys() ^ fresh.keys())[:3]}")
    for name, parameter in trained.items():
        parameter.copy_(fresh[name])
