"""Trains a task's K values per matrix at the positions that calibration selected; nothing else is a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from loraf.delta import task_scale
from loraf.errors import ConfigError, Problem
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.layer import EarlierTasks, LorafLinear, TaskValues
from loraf_train.adapter.trainable_base import TrainableBase, attached
from loraf_train.sequence.phases import training_phase
from loraf_train.trainer import loop
from loraf_train.trainer.penalty import NO_PENALTY, Penalty
from loraf_train.trainer.stopping import Stopping

if TYPE_CHECKING:
    from loraf_train.data.examples import Example
    from loraf_train.data.preferences import Pair
    from loraf_train.settings.config import TaskConfig


def train_task(
    base: TrainableBase,
    task: TaskConfig,
    examples: Sequence[Example] | Sequence[Pair],
    positions: Mapping[str, torch.Tensor],
    earlier: Mapping[str, EarlierTasks],
    seed: int,
    dtype: torch.dtype,
    on_step: loop.OnStep = lambda loss, rate, step, total: None,
    on_trained: Callable[[], None] = lambda: None,
    journal: loop.Journal = loop.NO_JOURNAL,
    start: Mapping[str, torch.Tensor] | None = None,
    penalty: Callable[[Mapping[str, LorafLinear]], Penalty] = lambda layers: NO_PENALTY,
    stopping: Stopping | None = None,
) -> tuple[dict[str, SparseB], loop.Outcome]:
    """Trains a task's values, then rounds them to the dtype that the checkpoint stores.

    Args:
        positions: module → (K,) positions, ascending.
        earlier: module → the earlier tasks that are active during training.
        seed: determines the order of the examples and dropout.
        dtype: of the returned values.
        on_trained: called at the end, while the layers with the rounded values are still in the model.
        journal: where to start, and what to save on the way.
        start: module → (K,) initial values; None: zeros.
        penalty: returns what is added to the loss, for the layers in training.
        stopping: ends the training early, and keeps the best values; None: all steps are done.

    Returns:
        Module → B, and the summary of the phase.

    Raises:
        ConfigError: see `loop.fit`; also values that `dtype` cannot represent.
    """
    layers = base.layers(positions, task_scale(task.alpha, base.rank), earlier, task.training.dropout)
    for name, values in (start or {}).items():
        layers[name].values.data.copy_(values)
    with attached(base.model, layers):
        phase = training_phase(task, seed, base.output)
        outcome = loop.fit(base.model, examples, phase, base.pad_id, on_step, journal, penalty(layers), stopping)
        trained = rounded(task.name, layers, dtype)
        on_trained()
    return trained, outcome


@torch.no_grad()
def rounded(task: str, layers: Mapping[str, TaskValues], dtype: torch.dtype) -> dict[str, SparseB]:
    """Rounds a task's values to `dtype`, in the layers too, so that what is measured is what will be served.

    Returns:
        Module → B.

    Raises:
        ConfigError: values that `dtype` cannot represent.
    """
    trained = {}
    for name, layer in layers.items():
        values = layer.values.to(dtype)
        if not bool(torch.isfinite(values).all()):
            message = f"task {task!r}: values of {name} are too large for {str(dtype).removeprefix('torch.')}"
            remedy = "lower the learning rate, or store them as bfloat16 or float32 (adapter.dtype)"
            raise ConfigError(Problem(message, "adapter.dtype", remedy=remedy))
        layer.values.copy_(values)
        shape = (layer.out_features, layer.rank)
        trained[name] = SparseB.from_positions(layer.positions.cpu().long(), values.cpu(), shape)
    return trained
