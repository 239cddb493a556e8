"""The statistics in a checkpoint, as what they are for: the earlier tasks that a new one is kept from disturbing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from loraf.checkpoint import Checkpoint
from loraf_train.adapter.trainable_base import TrainableBase, attached, earlier_tasks
from loraf_train.retention.gather import gather
from loraf_train.retention.protection import ProtectedTask
from loraf_train.retention.statistics import ModuleStatistics, decode, encode

if TYPE_CHECKING:
    from loraf_train.data.examples import Example


def stored_statistics(checkpoint: Checkpoint, task: str) -> dict[str, ModuleStatistics] | None:
    """Returns the statistics of a task; None if the checkpoint has none of it.

    Raises:
        CorruptCheckpoint: the file is missing or damaged.
    """
    stored = checkpoint.manifest.task(task).statistics
    data = checkpoint.statistics_bytes(task)
    if stored is None or data is None:
        return None
    shapes = {name: (module.d_out, checkpoint.manifest.rank) for name, module in checkpoint.manifest.modules.items()}
    return decode(data, shapes, str(checkpoint.path / stored.path))


def protected_tasks(checkpoint: Checkpoint) -> list[ProtectedTask]:
    """Returns the tasks of a checkpoint that have statistics, in order. Raises CorruptCheckpoint."""
    names = checkpoint.manifest.task_names
    found = []
    for i, name in enumerate(names):
        statistics = stored_statistics(checkpoint, name)
        if statistics is not None:
            later = {
                module: earlier_tasks(checkpoint, names[i + 1 :], module) for module in checkpoint.manifest.modules
            }
            found.append(ProtectedTask(name, statistics, later))
    return found


def unprotected(checkpoint: Checkpoint) -> Sequence[str]:
    """Returns the names of the tasks without statistics."""
    return [task.name for task in checkpoint.manifest.tasks if task.statistics is None]


def gather_again(
    base: TrainableBase, checkpoint: Checkpoint, task: str, examples: Sequence[Example], seed: int
) -> bytes:
    """Gathers a finished task's statistics, with the tasks on that it was trained with.

    Args:
        examples: of its training.
        seed: see `gather.gather`.

    Returns:
        The content of its statistics file.
    """
    manifest = checkpoint.manifest
    active = [*manifest.task(task).trained_with, task]
    none = {module: torch.empty(0, dtype=torch.int64) for module in base.targets}
    layers = base.layers(none, 1.0, {module: earlier_tasks(checkpoint, active, module) for module in base.targets})
    with attached(base.model, layers):
        return encode(gather(base.model, layers, examples, base.pad_id, seed))
