"""What a sequence can reach at best: an adapter for each task alone, and one for all tasks at once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from loraf_train.compare.methods.base import (
    Bench,
    Listener,
    TrainedTask,
    fit,
    restore_base,
    steps_of,
    with_steps,
    written_bytes,
)
from loraf_train.compare.methods.lora import Lora, lora_targets
from loraf_train.processes import group

if TYPE_CHECKING:
    from loraf_train.settings.config import RunConfig, TaskConfig


class Separate(Lora):
    """One LoRA for each task, trained from the base and served alone: lora in protocol single."""

    name = "separate"
    apart = True

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        for task in config.tasks:
            super().train(bench, config.model_copy(update={"tasks": (task,)}), listener)


class Joint(Lora):
    """One LoRA on the examples of all tasks, shuffled, for as many steps as all tasks take together.

    It is one training: the settings and the events are those of the last task.
    """

    name = "joint"
    keeps_copies = False

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        examples = [example for task in config.tasks for example in bench.data[task.name].train]
        steps = sum(steps_of(task, len(bench.data[task.name].train)) for task in config.tasks)
        task = with_steps(config.tasks[-1], steps)
        with lora_targets(bench, config) as targets:
            listener.started(task)
            adapted = targets.put_adapter(bench, config, task)
            outcome, trainable = fit(bench, config, task, listener, examples)
            listener.ended(task)
            size = written_bytes(bench, partial(adapted.save_pretrained, save_embedding_layers=False))
            adapted.merge_and_unload()
            if group.is_first():
                listener.trained(task, TrainedTask(trainable, outcome.steps, size))
            group.wait()
        restore_base(bench, config)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return super().settings(config, config.tasks[-1])
