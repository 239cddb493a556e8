"""Writes the checkpoint of `loraf-train` when PEFT saves a model.

PEFT writes each adapter as it is in training (adapter_model.safetensors, adapter_config.json), which Trainer resumes
from. Beside it, in the same folder, stands the checkpoint with all tasks, rounded to their stored dtype, which
loraf-serve serves and `loraf-train` reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import loraf
from loraf import base_model, manifest
from loraf.checkpoint import Checkpoint
from loraf.errors import CheckpointError, ConfigError, Problem
from loraf.files.folder_lock import locked
from loraf.manifest import BaseModel
from loraf.matrices.sparse import SparseB
from loraf_train.peft.finish import gather
from loraf_train.peft.model import LorafModel, TaskState
from loraf_train.peft.model_card import write_card
from loraf_train.peft.own_weights import require_own_weights
from loraf_train.processes import group

_DEFAULT = "default"  # PEFT saves the adapter of this name into the folder itself, others into folders of their own
_OTHER_FOLDER = "choose another folder"


def save_from_peft(tuner: LorafModel, adapter: str, folder: str) -> None:
    """Writes the checkpoint. PEFT calls this once for each adapter that it saves.

    Args:
        folder: where PEFT puts the adapter.
    """
    state = tuner.states[adapter]
    root = Path(folder) if adapter == _DEFAULT else Path(folder).parent
    state.config.trained_with = [tuner.states[name].name for name in state.trained_with]
    of_trainer = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", root.name) is not None
    save_tasks(tuner, root, with_statistics=not of_trainer)
    write_card(root)


def save_tasks(tuner: LorafModel, folder: Path, with_statistics: bool = True) -> None:
    """Writes all tasks of a model into a folder, which may hold the checkpoint of some of them already.

    Args:
        with_statistics: of the task in training; those of finished tasks are always written.

    Raises:
        ConfigError: no task has been calibrated, or the base model has no folder with its weights.
        CheckpointError: the folder holds another checkpoint, or cannot be written.
    """
    names = tuner.in_order()
    if not names:
        message = "no task has been trained, so there is nothing to save"
        raise ConfigError(Problem(message, remedy="calibrate and train the task first"))
    unfinished = [name for name in names if not tuner.states[name].is_finished]
    if with_statistics:
        for name in unfinished:
            gather(tuner, name)
    with locked(folder, "save_pretrained"):
        checkpoint = _opened(tuner, folder)
        for name in names:
            checkpoint = _add(tuner, name, checkpoint, with_statistics)


def saving_problem(tuner: LorafModel) -> str:
    """Returns why the model's tasks could not be saved, whatever they learn; empty: they can."""
    try:
        _described(tuner)
    except ConfigError as error:
        return str(error)
    return ""


def _described(tuner: LorafModel) -> BaseModel:
    """Returns the base model as a checkpoint records it.

    Raises:
        ConfigError: it has no folder, or is not the model in its folder.
    """
    config = next(iter(tuner.tasks.values())).config
    name = str(getattr(tuner.model, "name_or_path", "") or "")
    if not name:
        message = "the base model was made from a config, so no checkpoint can say which weights it belongs to"
        remedy = "save it with model.save_pretrained, and load it from there by from_pretrained"
        raise ConfigError(Problem(message, "model", remedy=remedy))
    folder = base_model.resolve(name, config.revision)
    described = base_model.describe(_short(name, folder), folder, config.revision)
    require_own_weights(tuner.model, folder)
    return described


def _opened(tuner: LorafModel, folder: Path) -> Checkpoint:
    """Opens the checkpoint in a folder, or creates it there."""
    config = tuner.states[tuner.in_order()[0]].config
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in tuner.layers().items()}
    described = _described(tuner)
    if not (folder / manifest.FILE_NAME).exists():
        return Checkpoint.create(folder, described, config.r, shapes, config.seed, config.init_std)
    checkpoint = Checkpoint.open(folder)
    there = checkpoint.manifest
    expected: dict[str, tuple[Any, Any]] = {
        "base_model": (there.base_model.fingerprint, described.fingerprint),
        "rank": (there.rank, config.r),
        "projection.seed": (there.projection.seed, config.seed),
        "projection.init_std": (there.projection.init_std, config.init_std),
        "modules": ({n: (m.d_out, m.d_in) for n, m in there.modules.items()}, shapes),
    }
    problems = [
        Problem("is another than that of the model's tasks", field, str(folder), _OTHER_FOLDER)
        for field, (found, own) in expected.items()
        if found != own
    ]
    known = {state.name for state in tuner.tasks.values()}
    strangers = [task for task in there.task_names if task not in known]
    if strangers:
        message = f"holds {', '.join(strangers)}, which the model does not have"
        remedy = f"load the checkpoint with `loraf_train.peft.load_tasks`, or {_OTHER_FOLDER}"
        problems.append(Problem(message, "tasks", str(folder), remedy))
    if problems:
        raise CheckpointError(problems)
    return checkpoint


def _short(name: str, folder: Path) -> str:
    """The name of the embedded model, which has no other."""
    return "tiny" if os.path.realpath(folder) == os.path.realpath(base_model.resolve("tiny")) else name


def _add(tuner: LorafModel, adapter: str, checkpoint: Checkpoint, with_statistics: bool) -> Checkpoint:
    """Adds a task, unless it is there; one that was saved while in training is replaced."""
    state = tuner.states[adapter]
    dtype = getattr(torch, state.config.dtype)
    values = {name: layer.task(adapter).sparse(dtype) for name, layer in tuner.layers().items()}
    statistics = state.statistics if with_statistics or state.is_finished else None
    folder = checkpoint.path
    if state.name in checkpoint.manifest.task_names:
        if _same(checkpoint.tasks[state.name], values):
            if statistics is not None and checkpoint.manifest.task(state.name).statistics is None:
                checkpoint.set_statistics(state.name, statistics)
            return checkpoint
        if checkpoint.manifest.task_names[-1] != state.name or not state.is_own(folder):
            message = f"holds a task {state.name!r} with other values, which is never written again"
            raise CheckpointError(Problem(message, "tasks", str(folder), _OTHER_FOLDER))
        Checkpoint.remove_task(folder, state.name)
        checkpoint = Checkpoint.open(folder)
    checkpoint.add_task(
        state.name,
        values,
        alpha=state.config.scaling * state.config.r,
        sparsity=state.config.sparsity,
        trained_with=[tuner.states[name].name for name in state.trained_with],
        templates=state.templates,
        training=_record(tuner, state),
        statistics=statistics,
    )
    state.saved_in.add(os.path.realpath(folder))
    return checkpoint


def _same(stored: Mapping[str, SparseB], own: Mapping[str, SparseB]) -> bool:
    return all(
        torch.equal(stored[name].positions, own[name].positions) and torch.equal(stored[name].values, own[name].values)
        for name in own
    )


def _record(tuner: LorafModel, state: TaskState) -> dict[str, Any]:
    """What the manifest says of the task's training. It has no `settings`: there was no tasks.yaml."""
    model = tuner.model
    return {
        **state.record,
        "dropout": state.config.dropout,
        "precision": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "processes": group.count(),
        "versions": {
            "loraf": loraf.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
