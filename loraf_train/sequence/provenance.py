"""What a checkpoint remembers of its making, and what keeps a tasks.yaml from going on with it.

Recorded are the settings that decide which values training ends with. Left out are those that only decide how it is
done (examples at once, gradient checkpointing, when to save) or measured (evaluation sets, metric), and the folder that
data lie in: files are named as seen from the tasks.yaml.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraf import base_model
from loraf.errors import BaseMismatch, ConfigError, Problem
from loraf.manifest import Manifest, Task
from loraf_train.settings.config import CalibrationConfig, RunConfig, TaskConfig, TrainingConfig

_HOW_ONLY = {"micro_batch_size", "gradient_checkpointing", "packing", "report_to", "save_seconds"}
_FIRST_RECIPE = "paper"  # of tasks that say none
_ANOTHER_OUTPUT = "name another output folder"


def settings(config: RunConfig, task: TaskConfig) -> dict[str, Any]:
    """The settings of a task that decide its values, as plain JSON."""
    folder = config.file.absolute().parent
    train = []
    for source in task.data.train:
        entry = source.model_dump(mode="json", exclude_none=True)
        if source.file is not None:
            entry["file"] = Path(os.path.relpath(source.file, folder)).as_posix()
        train.append(entry)
    worded = task.data.prompt is not None and task.data.completion is not None  # so that the recipe decides nothing
    return {
        "alpha": task.alpha,
        "sparsity": task.sparsity,
        "start": task.start,
        **({} if worded or task.recipe == _FIRST_RECIPE else {"recipe": task.recipe}),
        "dtype": config.adapter.dtype,
        "calibration": task.calibration.model_dump(mode="json"),
        "training": task.training.model_dump(mode="json", exclude=_HOW_ONLY),
        "data": {**task.data.model_dump(mode="json", include={"prompt", "completion", "limit"}), "train": train},
    }


def conflicts(
    config: RunConfig, manifest: Manifest, folder: Path, shapes: Mapping[str, tuple[int, int]]
) -> list[Problem]:
    """Why this checkpoint cannot be the file's output; empty if it can. All differences at once.

    Args:
        folder: of the base model.
        shapes: target module → (d_out, d_in), as the file and the model give them.
    """
    return [
        *_base_differences(config, manifest, folder),
        *_adapter_differences(config, manifest, shapes),
        *_order_differences(config, manifest),
        *(problem for i, task in enumerate(config.tasks) for problem in _task_differences(config, manifest, i, task)),
    ]


def _base_differences(config: RunConfig, manifest: Manifest, folder: Path) -> list[Problem]:
    try:
        base_model.require_same_base(manifest.base_model, folder, config.output)
    except BaseMismatch as mismatch:
        remedy = f"set model to {manifest.base_model.name}, or {_ANOTHER_OUTPUT}"
        return [dataclasses.replace(problem, remedy=remedy) for problem in mismatch.problems]
    except ConfigError as error:  # the model's files cannot be read
        return list(error.problems)
    return []


def _adapter_differences(
    config: RunConfig, manifest: Manifest, shapes: Mapping[str, tuple[int, int]]
) -> Iterator[Problem]:
    values = {
        "adapter.rank": (manifest.rank, config.adapter.rank),
        "seed": (manifest.projection.seed, config.seed),
        "adapter.init_std": (manifest.projection.init_std, config.adapter.init_std),
    }
    if set(shapes) != set(manifest.modules):
        values["adapter.target_modules"] = (_endings(manifest.modules), _endings(shapes))
    for field, (has, asked) in values.items():
        if has != asked:
            message = f"the checkpoint in {config.output} has {said(has)}, the file says {said(asked)}"
            yield Problem(message, field, str(config.file), f"say {said(has)}, or {_ANOTHER_OUTPUT}")


def _endings(modules: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules))


def _order_differences(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    """Finished tasks must stand in the checkpoint's order, before those that are still to be trained."""
    finished = [task.name for task in config.tasks if task.name in manifest.task_names]
    expected = [name for name in manifest.task_names if name in finished]
    wanted = expected + [task.name for task in config.tasks if task.name not in finished]
    for i, (task, name) in enumerate(zip(config.tasks, wanted, strict=True)):
        if task.name != name:
            message = f"{task.name!r} stands where {name!r} was trained"
            remedy = f"write the tasks in the order {', '.join(wanted)}; or {_ANOTHER_OUTPUT}"
            yield Problem(message, f"tasks[{i}]", str(config.file), remedy)
            return


def _task_differences(config: RunConfig, manifest: Manifest, index: int, task: TaskConfig) -> Iterator[Problem]:
    if task.name not in manifest.task_names:
        return
    now = {"recipe": _FIRST_RECIPE, **settings(config, task)}
    before = _recorded(manifest.task(task.name))
    for field, has, asked in differences(before, {key: now[key] for key in before}):
        message = f"task {task.name!r} was trained with {said(has)}, the file says {said(asked)}"
        remedy = f"say {said(has)}, give the task another name, or {_ANOTHER_OUTPUT}"
        where = field if field == "recipe" else f"tasks[{index}].{field}"  # the one setting that all tasks share
        yield Problem(message, where, str(config.file), remedy)


def _recorded(task: Task) -> dict[str, Any]:
    """A finished task's settings; of a task that came from elsewhere only what every task has.

    A setting that came later than the record had its default then.
    """
    always = {"alpha": task.alpha, "sparsity": task.sparsity, "dtype": task.dtype}
    found = task.training.get("settings")
    if found is None:
        return always
    defaults = {
        "calibration": CalibrationConfig().model_dump(mode="json"),
        "training": TrainingConfig().model_dump(mode="json", exclude=_HOW_ONLY),
    }
    return {
        "recipe": _FIRST_RECIPE,
        **found,
        **always,
        **{part: {**values, **found[part]} for part, values in defaults.items()},
    }


def differences(before: Any, now: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, before, now) of every leaf that differs; a list is a leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{field}.{key}" if field else key)
    elif before != now:
        yield field, before, now


def said(value: object) -> str:
    """A setting's value as messages show it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"[{', '.join(map(said, value))}]"
    if isinstance(value, dict):
        return str(value.get("file") or value.get("dataset") or value)
    return f"{value!r}" if isinstance(value, str) else f"{value}"
