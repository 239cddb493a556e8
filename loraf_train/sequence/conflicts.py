"""What keeps a run from adding its tasks to a checkpoint: another base, other settings, too few free positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraf import base_model
from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, Problem
from loraf.manifest import Manifest
from loraf_train.adapter.masks import PlannedTask, shortage
from loraf_train.retention.of_checkpoint import stored_statistics
from loraf_train.sequence.provenance import (
    FIRST_OBJECTIVE,
    FIRST_RECIPE,
    QUANTIZATION,
    differences,
    recorded_settings,
    settings,
    value_text,
)
from loraf_train.settings.config import RunConfig, TaskConfig

Shapes = Mapping[str, tuple[int, int]]  # target module → (d_out, d_in), from the file and the model

_OTHER_OUTPUT = "name another output folder"


def obstacles(config: RunConfig, folder: Path, shapes: Shapes, existing: Manifest | None) -> list[Problem]:
    """Everything that keeps the file's tasks from being trained into its output folder; empty if nothing does.

    Args:
        folder: of the base model.
        existing: the checkpoint in the output folder; None: there is none.
    """
    if existing is None:
        return capacity(config, shapes)
    problems = conflicts(config, existing, folder, shapes)
    if existing.modules.keys() == shapes.keys():  # otherwise it is reported as a conflict
        problems += capacity(config, shapes, existing)
    return problems


def damage(config: RunConfig, existing: Manifest) -> list[Problem]:
    """Files of the checkpoint that are missing or were changed, where a task still to be trained needs them."""
    if all(task.name in existing.task_names for task in config.tasks):
        return []
    try:
        checkpoint = Checkpoint.open(config.output)
    except CheckpointError as error:
        return list(error.problems)
    problems: list[Problem] = []
    for name in existing.task_names if config.retention is not None else ():
        try:
            stored_statistics(checkpoint, name)
        except CheckpointError as error:
            problems += error.problems
    return problems


def capacity(config: RunConfig, shapes: Shapes, existing: Manifest | None = None) -> list[Problem]:
    """Tasks still to be trained that find too few free positions in some module, or that would own none.

    Args:
        existing: a checkpoint with the same target modules to which they are added; None: a new one.
    """
    finished = existing.task_names if existing else ()
    planned = [
        PlannedTask(task.name, task.sparsity, f"tasks[{i}].sparsity", str(config.file))
        for i, task in enumerate(config.tasks)
        if task.name not in finished
    ]
    return shortage(shapes, existing.rank if existing else config.adapter.rank, planned, existing)


def conflicts(config: RunConfig, manifest: Manifest, folder: Path, shapes: Shapes) -> list[Problem]:
    """All differences between the file and a checkpoint that keep the run from continuing the checkpoint."""
    return [
        *_base_differences(config, manifest, folder),
        *_adapter_differences(config, manifest, shapes),
        *_order_differences(config, manifest),
        *_taken_names(config, manifest),
        *(problem for i, task in enumerate(config.tasks) for problem in _task_differences(config, manifest, i, task)),
    ]


def _base_differences(config: RunConfig, manifest: Manifest, folder: Path) -> list[Problem]:
    try:
        base_model.require_same_base(manifest.base_model, folder, config.output)
    except BaseMismatch as mismatch:
        remedy = f"set model to {manifest.base_model.name}, or {_OTHER_OUTPUT}"
        return [dataclasses.replace(problem, remedy=remedy) for problem in mismatch.problems]
    except ConfigError as error:  # the model's files cannot be read
        return list(error.problems)
    return []


def _adapter_differences(config: RunConfig, manifest: Manifest, shapes: Shapes) -> Iterator[Problem]:
    settings: dict[str, tuple[object, object]] = {
        "adapter.rank": (manifest.rank, config.adapter.rank),
        "seed": (manifest.projection.seed, config.seed),
        "adapter.init_std": (manifest.projection.init_std, config.adapter.init_std),
    }
    if set(shapes) != set(manifest.modules):
        settings["adapter.target_modules"] = (_endings(manifest.modules), _endings(shapes))
    for field, (recorded, configured) in settings.items():
        if recorded != configured:
            message = f"the checkpoint in {config.output} has {value_text(recorded)}"
            message += f", but the file says {value_text(configured)}"
            remedy = "leave it out" if recorded is None else f"set it to {value_text(recorded)}"
            yield Problem(message, field, str(config.file), f"{remedy}, or {_OTHER_OUTPUT}")


def _endings(modules: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules))


def _order_differences(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    """Finished tasks have to be listed in the checkpoint's order, before those that are still to be trained."""
    finished = [task.name for task in config.tasks if task.name in manifest.task_names]
    order = [name for name in manifest.task_names if name in finished]
    order += [task.name for task in config.tasks if task.name not in finished]
    for i, (task, name) in enumerate(zip(config.tasks, order, strict=True)):
        if task.name != name:
            message = f"{task.name!r} is listed where {name!r} was trained"
            remedy = f"list the tasks in the order {', '.join(order)}; or {_OTHER_OUTPUT}"
            yield Problem(message, f"tasks[{i}]", str(config.file), remedy)
            return


def _taken_names(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    for i, task in enumerate(config.tasks):
        if task.name in manifest.sets:
            message = f"{task.name!r} is the name of a named set of the checkpoint in {config.output}"
            yield Problem(
                message, f"tasks[{i}].name", str(config.file), f"give the task another name, or {_OTHER_OUTPUT}"
            )


def _task_differences(config: RunConfig, manifest: Manifest, index: int, task: TaskConfig) -> Iterator[Problem]:
    if task.name not in manifest.task_names:
        return
    defaults = {"recipe": FIRST_RECIPE, "objective": FIRST_OBJECTIVE, QUANTIZATION: None}
    configured = {**defaults, **settings(config, task)}
    configured["data"] = {"streaming": False, **configured["data"]}
    recorded = recorded_settings(manifest.task(task.name))
    for field, before, now in differences(recorded, {key: configured.get(key) for key in recorded}):
        message = f"task {task.name!r} was trained with {value_text(before)}, but the file says {value_text(now)}"
        first = "leave it out" if before is None else f"set it to {value_text(before)}"
        remedy = f"{first}, give the task another name, or {_OTHER_OUTPUT}"
        where = field if field in ("recipe", QUANTIZATION) else f"tasks[{index}].{field}"  # those that all tasks share
        yield Problem(message, where, str(config.file), remedy)
