"""One LoRA that every task of the sequence goes on training, in two ways that keep earlier tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from loraf_train.compare.methods.base import (
    Bench,
    Listener,
    Method,
    TrainedTask,
    fit,
    restore_base,
    steps_of,
    with_steps,
    written_bytes,
)
from loraf_train.compare.methods.lora import Lora, lora_targets, parameters_of
from loraf_train.compare.methods.penalties import AdapterPenalty, Consolidation, Parameters, fisher_diagonal
from loraf_train.processes import group
from loraf_train.trainer import batches, loop
from loraf_train.trainer.order import derived_seed

if TYPE_CHECKING:
    from loraf_train.data.examples import Example
    from loraf_train.settings.config import RunConfig, TaskConfig

FISHER_EXAMPLES = 256  # of each task, one backward pass each


class SharedLora(Method):
    """One LoRA for the whole sequence; its α is the same for all tasks. `file_bytes` is its size after each task."""

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        penalty = self.penalty(config)
        values: dict[str, torch.Tensor] = {}
        for i, task in enumerate(config.tasks):
            listener.started(task)
            with lora_targets(bench, config) as targets:
                adapted = targets.put_adapter(bench, config, task)
                parameters = parameters_of(adapted)
                with torch.no_grad():
                    for name, value in values.items():
                        parameters[name].copy_(value)
                penalty.begin(parameters)
                examples = self.examples(bench, config, config.tasks[:i], task)
                steps = steps_of(task, len(bench.data[task.name].train))
                outcome, trainable = fit(bench, config, with_steps(task, steps), listener, examples, penalty)
                if i + 1 < len(config.tasks):
                    self.finish(bench, config, task, penalty, parameters)
                listener.ended(task)
                values = {name: p.detach().clone() for name, p in parameters.items()}
                size = written_bytes(bench, partial(adapted.save_pretrained, save_embedding_layers=False))
                adapted.merge_and_unload()
                if group.is_first():
                    listener.trained(task, TrainedTask(trainable, outcome.steps, size))
                group.wait()
            restore_base(bench, config)  # unmerging would leave rounding errors

    def penalty(self, config: RunConfig) -> AdapterPenalty:
        """The term that the tasks of one run add to their losses."""
        return AdapterPenalty()

    def examples(
        self, bench: Bench, config: RunConfig, earlier: Sequence[TaskConfig], task: TaskConfig
    ) -> Sequence[Example]:
        """What a task trains on."""
        return bench.data[task.name].train

    def finish(
        self, bench: Bench, config: RunConfig, task: TaskConfig, penalty: AdapterPenalty, parameters: Parameters
    ) -> None:
        """Called when a task that is not the last has been trained, while its adapter is on the model."""

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return Lora().settings(config, task) | {"strength": config.compare.strength(self.name)}


class Ewc(SharedLora):
    """Elastic weight consolidation (Kirkpatrick et al., 2017) of A and B of one LoRA.

    The loss gains λ/2 Σ F_i (θ − θ_i)² over earlier tasks i, a term for each. F_i is the empirical Fisher diagonal of
    the whole completion's log-likelihood, over FISHER_EXAMPLES training examples or all if there are fewer.
    """

    name = "ewc"

    def penalty(self, config: RunConfig) -> AdapterPenalty:
        return Consolidation(config.compare.strength(self.name))

    def finish(
        self, bench: Bench, config: RunConfig, task: TaskConfig, penalty: AdapterPenalty, parameters: Parameters
    ) -> None:
        examples = bench.data[task.name].train
        chance = random.Random(derived_seed(config.seed, task.name, "fisher"))
        drawn = chance.sample(examples, min(FISHER_EXAMPLES, len(examples)))
        collator = batches.Collator(bench.pad_id)

        def loss_of(example: Example) -> torch.Tensor:
            batch = {key: tensor.to(bench.model.device) for key, tensor in collator([example]).items()}
            labels = batch.pop("labels")
            return loop.completion_loss(bench.model(**batch, use_cache=False), labels, 1)

        assert isinstance(penalty, Consolidation)
        penalty.remember(fisher_diagonal(parameters, drawn, loss_of))


class Replay(SharedLora):
    """Rehearsal: a share of each earlier task's training examples is mixed into those of the task.

    The number of steps is that of the task's own examples. At least one example of each earlier task is drawn.
    """

    name = "replay"

    def examples(
        self, bench: Bench, config: RunConfig, earlier: Sequence[TaskConfig], task: TaskConfig
    ) -> Sequence[Example]:
        share = config.compare.strength(self.name)
        mixed = list(bench.data[task.name].train)
        for before in earlier:
            own = bench.data[before.name].train
            chance = random.Random(derived_seed(config.seed, before.name, "replay"))
            mixed += chance.sample(own, min(len(own), max(1, round(share * len(own)))))
        return mixed
