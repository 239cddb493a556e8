"""Keeps a training that is resumed to the tasks and the configuration that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loraf import manifest
from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError, Problem
from loraf_train.peft.model import LorafModel


def require_same_run(tuner: LorafModel, folder: Path) -> None:
    """Checks that a training can go on from a checkpoint of a Trainer: its tasks are those of the model.

    Raises:
        ConfigError: lists all that differs; nothing has been loaded then.
    """
    if not (folder / manifest.FILE_NAME).exists():
        return
    checkpoint = Checkpoint.open(folder)
    there = checkpoint.manifest
    config = next(iter(tuner.tasks.values())).config
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in tuner.layers().items()}
    found: dict[str, tuple[Any, Any]] = {
        "r": (there.rank, config.r),
        "seed": (there.projection.seed, config.seed),
        "init_std": (there.projection.init_std, config.init_std),
    }
    problems = []
    if {n: (m.d_out, m.d_in) for n, m in there.modules.items()} != shapes:
        message = "names other layers than the checkpoint was trained with"
        problems.append(Problem(message, "target_modules", str(folder), "name the same"))
    own = {state.name: state for state in tuner.tasks.values()}
    if set(own) != set(there.task_names):
        found["task_name"] = (", ".join(there.task_names), ", ".join(own))
    for name in [name for name in there.task_names if name in own]:
        state, task = own[name], there.task(name)
        where = f"of task {name!r}: "
        found[where + "alpha"] = (task.alpha, float(state.config.scaling * state.config.r))
        found[where + "sparsity"] = (task.sparsity, state.config.sparsity)
        found[where + "dtype"] = (task.dtype, state.config.dtype)
        under = [tuner.states[other].name for other in state.trained_with]
        found[where + "start"] = (f"on top of {list(task.trained_with)}", f"on top of {under}")
    for field, (stored, ours) in found.items():
        if stored != ours:
            message = f"is {ours!r}, but the checkpoint was trained with {stored!r}"
            problems.append(Problem(message, field, str(folder), f"use {stored!r}, or start anew"))
    if not problems:
        for adapter in tuner.finished():
            state = tuner.states[adapter]
            dtype = getattr(torch, state.config.dtype)
            for module, layer in tuner.layers().items():
                ours, stored = layer.task(adapter).sparse(dtype), checkpoint.tasks[state.name][module]
                same = torch.equal(ours.positions, stored.positions) and torch.equal(ours.values, stored.values)
                if not same:
                    message = f"has other values of the finished task {state.name!r} than the model"
                    remedy = "load the finished tasks that the training stood on, or start anew"
                    problems.append(Problem(message, "tasks", str(folder), remedy))
                    break
    if problems:
        raise ConfigError(problems)
