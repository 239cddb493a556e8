"""Reads a checkpoint into a model, each task as an adapter, so that it can be used, and the next task trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model

from loraf import base_model
from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError, Problem
from loraf.hub import checkpoint_folder
from loraf_train.peft.config import LorafConfig
from loraf_train.peft.model import LorafModel, tuner_of
from loraf_train.peft.own_weights import require_own_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_tasks(
    model: PreTrainedModel, folder: str | Path, tasks: Sequence[str] | None = None, allow_other_base: bool = False
) -> PeftModel:
    """Returns the model with the tasks of a checkpoint as finished adapters, the last one active, in evaluation mode.

    Args:
        model: the base model, as `from_pretrained` loaded it.
        folder: of a checkpoint, whoever wrote it; or a hub id.
        tasks: which to load, with those that they were trained on top of; None: all.
        allow_other_base: accept a base model with other weights than the tasks were trained for.

    Raises:
        CheckpointError, CorruptCheckpoint, UnknownTask: see `Checkpoint.open`; or it has no tasks.
        BaseMismatch: the tasks were trained for another base model.
        ConfigError: the model in memory has other weights than its folder.
    """
    path = checkpoint_folder(folder, tasks=tasks, statistics=True)
    names = None
    if tasks is not None:
        everything = Checkpoint.open(path).manifest
        needed = {name for task in tasks for name in (*everything.task(task).trained_with, task)}
        names = [name for name in everything.task_names if name in needed]
    checkpoint = Checkpoint.open(path, names)
    manifest = checkpoint.manifest
    if not manifest.tasks:
        raise ConfigError(Problem("has no tasks", file=str(path), remedy="train one with get_peft_model instead"))
    name = str(getattr(model, "name_or_path", "") or "")
    if not allow_other_base:
        base = base_model.resolve(name)
        base_model.require_same_base(manifest.base_model, base, path)
        require_own_weights(model, base)
    peft_model: Any = None
    for task in manifest.tasks:
        config = LorafConfig(
            task_name=task.name,
            r=manifest.rank,
            alpha=task.alpha,
            sparsity=task.sparsity,
            seed=manifest.projection.seed,
            init_std=manifest.projection.init_std,
            dtype=task.dtype,
            target_modules=list(manifest.modules),
            inference_mode=True,
            start="previous" if task.trained_with else "base",
        )
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=task.name)
        else:
            peft_model.add_adapter(task.name, config)
        _fill(tuner_of(peft_model), checkpoint, task.name)
    last = manifest.task_names[-1]
    peft_model.set_adapter(last, inference_mode=True)
    return peft_model.eval()  # type: ignore[no-any-return]


def _fill(tuner: LorafModel, checkpoint: Checkpoint, task: str) -> None:
    """Gives an adapter the positions and values of a finished task."""
    stored, state = checkpoint.manifest.task(task), tuner.states[task]
    for module, layer in tuner.layers().items():
        b, adapter = checkpoint.tasks[task][module], layer.task(task)
        adapter.choose(b.positions)
        adapter.values.data.copy_(b.values)
        adapter.is_frozen = True
        adapter.values.requires_grad_(False)
    state.is_finished = True
    state.order = tuner.next_order()
    state.trained_with = tuple(name for name in stored.trained_with if name in tuner.states)
    state.statistics = checkpoint.statistics_bytes(task)
    state.gathered_at = {
        module: layer.task(task).values.detach().to(getattr(torch, stored.dtype)).cpu()
        for module, layer in tuner.layers().items()
    }
    state.templates = stored.templates
    state.record = dict(stored.training)
    tuner.stand()
