"""What a checkpoint records of how a task was trained: its settings, and the environment of the run.

Recorded are the settings that determine the trained values. Left out are those that only affect how the values are
computed (micro-batches, gradient checkpointing, when to save) or measured (evaluation sets, metric), and the folder of
the data: files are named relative to the tasks.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loraf
from loraf.four_bits import QUANTIZATION as QUANTIZATION
from loraf.manifest import Task
from loraf_train.settings.config import RunConfig, TaskConfig
from loraf_train.settings.parts import CalibrationConfig, TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_RECORDED = {"micro_batch_size", "gradient_checkpointing", "packing", "report_to", "save_seconds"}
FIRST_OBJECTIVE = "sft"  # of tasks whose record has none
FIRST_RECIPE = "paper"  # of tasks whose record has none
EXAMPLES_DIGEST = "examples_sha256"  # where `training` has the digest of the training examples, see `digest_of`


def settings(config: RunConfig, task: TaskConfig) -> dict[str, Any]:
    """Returns the settings that determine a task's values, as plain JSON."""
    folder = config.file.absolute().parent
    train = []
    for source in task.data.train:
        entry = source.model_dump(mode="json", exclude_none=True)
        if source.file is not None:
            entry["file"] = Path(os.path.relpath(source.file, folder)).as_posix()
        train.append(entry)
    has_templates = task.data.prompt is not None and task.data.completion is not None  # the recipe then has no effect
    return {
        "alpha": task.alpha,
        "sparsity": task.sparsity,
        "start": task.start,
        **({} if task.objective == FIRST_OBJECTIVE else {"objective": task.objective}),
        **({} if has_templates or task.recipe == FIRST_RECIPE else {"recipe": task.recipe}),
        **({} if config.quantization is None else {QUANTIZATION: config.quantization}),
        "dtype": config.adapter.dtype,
        "calibration": task.calibration.model_dump(mode="json"),
        "training": task.training.model_dump(mode="json", exclude=_NOT_RECORDED),
        "data": {
            **task.data.model_dump(mode="json", include={"prompt", "completion", "limit"}),
            **({"streaming": True} if task.data.streaming else {}),
            **({"chosen": task.data.chosen, "rejected": task.data.rejected} if task.objective == "dpo" else {}),
            "train": train,
        },
    }


def recorded_settings(task: Task) -> dict[str, Any]:
    """Returns the settings that a manifest records of a task; of an imported task only those that every task has.

    A setting that did not exist yet when the task was trained has its default.
    """
    of_every_task = {"alpha": task.alpha, "sparsity": task.sparsity, "dtype": task.dtype}
    recorded = task.training.get("settings")
    if recorded is None:
        return of_every_task
    defaults = {
        "calibration": CalibrationConfig().model_dump(mode="json"),
        "training": TrainingConfig().model_dump(mode="json", exclude=_NOT_RECORDED),
    }
    return {
        "recipe": FIRST_RECIPE,
        "objective": FIRST_OBJECTIVE,
        QUANTIZATION: None,
        **recorded,
        **of_every_task,
        **{part: {**values, **recorded.get(part, {})} for part, values in defaults.items()},
        **({"data": {"streaming": False, **recorded["data"]}} if "data" in recorded else {}),
    }


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """Returns precision, device, number of processes and versions, which can change the last bits."""
    import torch
    import transformers

    from loraf_train.processes import group

    return {
        "precision": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "processes": group.count(),
        "versions": {
            "loraf": loraf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def differences(before: Any, now: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (field, before, now) of every leaf that differs between two JSON values; a list is a leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{field}.{key}" if field else key)
    elif before != now:
        yield field, before, now


def value_text(value: object) -> str:
    """A setting's value as messages show it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{key}: {value_text(part)}" for key, part in value.items() if part is not None)
        return str(value.get("file") or value.get("dataset") or f"{{{pairs}}}")
    return f"{value!r}" if isinstance(value, str) else f"{value}"
