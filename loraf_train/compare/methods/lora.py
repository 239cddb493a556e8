"""PEFT's LoRA in a sequence: every task trains a fresh adapter on top of the merged earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from loraf_train.adapter.dropout import draw_peft_by_token
from loraf_train.adapter.peft_targets import peft_targets
from loraf_train.adapter.trainable_base import find_targets, own_weights
from loraf_train.compare.methods.base import (
    Bench,
    Listener,
    Method,
    TrainedTask,
    adapter_settings,
    fit,
    restore_base,
    written_bytes,
)
from loraf_train.compare.methods.penalties import AdapterPenalty, Orthogonality
from loraf_train.processes import group
from loraf_train.trainer.order import derived_seed

if TYPE_CHECKING:
    import peft

    from loraf_train.settings.config import RunConfig, TaskConfig


@dataclass(frozen=True)
class LoraTargets:
    """The adapted modules as PEFT is told of them."""

    modules: list[str]
    parameters: list[str] | None

    def put_adapter(self, bench: Bench, config: RunConfig, task: TaskConfig) -> peft.PeftModel:
        """Puts a fresh adapter on the model; its A depends on the run's seed and the task."""
        import peft

        lora = peft.LoraConfig(
            r=config.adapter.rank,
            lora_alpha=task.alpha,  # type: ignore[arg-type]  # annotated as int, but any number works
            lora_dropout=task.training.dropout,
            target_modules=self.modules,
            target_parameters=self.parameters,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(config.seed, task.name, "lora"))
            adapted = peft.get_peft_model(bench.model, lora)
        draw_peft_by_token(adapted)
        return adapted


@contextmanager
def lora_targets(bench: Bench, config: RunConfig) -> Iterator[LoraTargets]:
    """A context in which adapters may be put on the model and merged. Afterwards `restore_base` is due."""
    targets = find_targets(bench.model, config.adapter.target_modules, str(config.file))
    with own_weights(bench.model, targets):  # PEFT merges in place
        yield LoraTargets(*peft_targets(bench.model.config.model_type, targets))


def parameters_of(adapted: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's trained parameters."""
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


class Lora(Method):
    """PEFT's LoRA on the same modules, as PEFT initialises it: A is random and trained too, B starts at zero.

    In a sequence an earlier task's adapter is merged into the weights, and a fresh one is put on top. Serving a task
    therefore takes the adapters of all tasks up to it; `file_bytes` counts its own alone.
    """

    name = "lora"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        penalty = self.penalty(config)
        with lora_targets(bench, config) as targets:
            for task in config.tasks:
                listener.started(task)
                adapted = targets.put_adapter(bench, config, task)
                penalty.begin(parameters_of(adapted))
                outcome, trainable = fit(bench, config, task, listener, penalty=penalty)
                penalty.end()
                listener.ended(task)
                size = written_bytes(bench, partial(adapted.save_pretrained, save_embedding_layers=False))
                adapted.merge_and_unload()
                if group.is_first():
                    listener.trained(task, TrainedTask(trainable, outcome.steps, size))
                group.wait()
        restore_base(bench, config)

    def penalty(self, config: RunConfig) -> AdapterPenalty:
        """The term that the tasks of one run add to their losses."""
        return AdapterPenalty()

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        without = ("calibration", "sparsity", "start", "dtype", "init_std")
        return adapter_settings(config, task, without) | {"dtype": "float32"}


class LoraDecay(Lora):
    """LoRA with weight decay (AdamW's, of A and B): its strength takes the place of `training.weight_decay`."""

    name = "lora-decay"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        tasks = tuple(self._decayed(config, task) for task in config.tasks)
        super().train(bench, config.model_copy(update={"tasks": tasks}), listener)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return super().settings(config, self._decayed(config, task))

    def _decayed(self, config: RunConfig, task: TaskConfig) -> TaskConfig:
        changes = {"weight_decay": config.compare.strength(self.name)}
        return task.model_copy(update={"training": task.training.model_copy(update=changes)})


class OLora(Lora):
    """O-LoRA (Wang et al., 2023): each task's LoRA is pressed to be orthogonal to the earlier ones, which stay frozen.

    The loss gains λ₁ Σ |A_t·A_iᵀ| over all entries and earlier tasks i, as in the authors' code; their λ₂ is 0. Earlier
    adapters are active while a task trains; merged into the weights they compute the same.
    """

    name = "o-lora"

    def penalty(self, config: RunConfig) -> AdapterPenalty:
        return Orthogonality(config.compare.strength(self.name))

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return super().settings(config, task) | {"strength": config.compare.strength(self.name)}
