"""This project's own sequence, with and without retention, and with positions drawn at random."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.errors import ConfigError, Problem
from loraf.manifest import positions_per_matrix
from loraf.tasksets import TaskSet
from loraf_train.adapter.layer import EarlierTasks
from loraf_train.adapter.masks import feasible
from loraf_train.adapter.trainable_base import TrainableBase
from loraf_train.compare.methods.base import (
    CALIBRATION,
    TRAINING,
    Bench,
    Listener,
    Method,
    TrainedTask,
    adapter_settings,
)
from loraf_train.compare.results import MaskShare
from loraf_train.processes import group
from loraf_train.retention.measured import completion_logits, root_mean_square_change
from loraf_train.sequence import runner
from loraf_train.sequence.calibrate import calibrate
from loraf_train.trainer.order import derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf.matrices.sparse import SparseB
    from loraf_train.data.examples import Example
    from loraf_train.settings.config import RunConfig, TaskConfig


_CHANGE_MEASURED_ON = 100  # evaluation examples of a task


class Loraf(Method):
    """This project's own sequence, into a checkpoint that is deleted afterwards."""

    name = "loraf"
    keeps_copies = False
    select_positions: runner.SelectPositions = staticmethod(calibrate)

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        config = config.model_copy(update={"output": bench.scratch})
        checkpoint = runner.run(
            config, bench.data, _ObserverForListener(listener, bench, config), bench.loaded, self.select_positions
        )
        if group.is_first():
            merger = Merger(bench.model, checkpoint)
            for task in config.tasks:
                merger.merge(checkpoint.manifest.as_trained(task.name))
                listener.as_trained(task)
            for tasks in _selections(config.tasks):
                merger.merge(TaskSet(tuple((task.name, 1.0) for task in tasks)))
                listener.selected(tasks)
            merger.merge(TaskSet())
        group.wait()

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        retention = None if config.retention is None else config.retention.model_dump(mode="json")
        return adapter_settings(config, task, without=()) | {"retention": retention}


def without_retention(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"retention": None})


def _selections(tasks: Sequence[TaskConfig]) -> Iterator[tuple[TaskConfig, ...]]:
    """Every task alone, and every pair; not the set of all tasks, which is measured anyway."""
    for size in (1, 2):
        if size < len(tasks):
            yield from itertools.combinations(tasks, size)


class LorafPaper(Loraf):
    """The paper's Algorithm 1: nothing protects earlier tasks but their own positions."""

    name = "loraf-paper"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        super().train(bench, without_retention(config), listener)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return adapter_settings(config, task, without=())


class RandomMask(LorafPaper):
    """Draws positions at random; there is no calibration."""

    name = "random-mask"

    @staticmethod
    def select_positions(
        base: TrainableBase,
        task: TaskConfig,
        examples: Sequence[Example],
        taken: Mapping[str, Sequence[SparseB]],
        earlier: Mapping[str, EarlierTasks],
        seed: int,
        *_: Any,
    ) -> dict[str, torch.Tensor]:
        """As `calibrate`: K free positions of each module, every set of K with the same probability."""
        positions = {}
        for name, linear in base.targets.items():
            shape = (linear.out_features, base.rank)
            free = feasible(shape, taken[name])
            generator = torch.Generator().manual_seed(derived_seed(seed, name))
            drawn = torch.randperm(len(free), generator=generator)[: positions_per_matrix(task.sparsity, *shape)]
            positions[name] = free[drawn].sort().values
        return positions

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return adapter_settings(config, task, without=("calibration",))


class _ObserverForListener(runner.Observer):
    """Passes a sequence's progress on to a Listener."""

    def __init__(self, listener: Listener, bench: Bench, config: RunConfig):
        self._listener = listener
        self._bench = bench
        self._retains = config.retention is not None
        self._logits: dict[str, torch.Tensor] = {}  # task → its logits when it was finished
        self._predicted: Mapping[str, float] = {}

    def task_started(self, task: TaskConfig) -> None:
        self._task, self._steps = task, 0
        self._predicted = {}
        self._listener.started(task)

    def calibration_step(self, loss: float, step: int, total: int) -> None:
        self._steps += 1
        self._listener.step(self._task, CALIBRATION, loss, step, total)

    def step(self, loss: float, lr: float, step: int, total: int) -> None:
        self._steps += 1
        self._listener.step(self._task, TRAINING, loss, step, total)

    def retained(self, task: TaskConfig, spent: Mapping[str, float], budget: float) -> None:
        self._predicted = spent

    def trained(self, task: TaskConfig, model: PreTrainedModel) -> None:
        self._listener.ended(task)

    def task_finished(self, checkpoint: Checkpoint, task: TaskConfig, model: PreTrainedModel) -> None:
        manifest = checkpoint.manifest
        stored = manifest.task(task.name)
        if self._retains and stored.statistics is None:  # the scores would be called protected, and are not
            message = f"the statistics of task {task.name!r} could not be gathered, so nothing protects it"
            raise ConfigError(Problem(message, remedy="free memory, or compare loraf-paper, which needs none"))
        masks = tuple(
            MaskShare(task.name, module, count, manifest.modules[module].d_out * manifest.rank)
            for module, count in stored.k.items()
        )
        merger = Merger(model, checkpoint)
        merger.merge(manifest.all_tasks())
        self._listener.trained(task, TrainedTask(stored.parameters, self._steps, stored.file.bytes, masks))
        if self._bench.data[task.name].evaluation:
            self._logits[task.name] = self._logits_of(task.name)
        for earlier, predicted in self._predicted.items():
            if earlier in self._logits:
                measured = root_mean_square_change(self._logits[earlier], self._logits_of(earlier))
                self._listener.changed(earlier, task.name, predicted, measured)
        merger.merge(TaskSet())

    def _logits_of(self, task: str) -> torch.Tensor:
        """The logits of a task's first evaluation examples, with the weights as they are."""
        examples = [e.example for s in self._bench.data[task].evaluation.values() for e in s.examples]
        return completion_logits(self._bench.model, examples[:_CHANGE_MEASURED_ON], self._bench.pad_id)
