"""Training a task's K values at the positions that calibration chose; nothing else is a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loraf.delta import task_scale
from loraf.errors import ConfigError, Problem
from loraf.sparse import SparseB
from loraf_train.adapter.host import Host, attached
from loraf_train.adapter.layer import Earlier, LorafLinear
from loraf_train.trainer import loop, trackers

if TYPE_CHECKING:
    from loraf_train.data.examples import Example
    from loraf_train.settings.config import TaskConfig


def adapt(
    host: Host,
    task: TaskConfig,
    examples: Sequence[Example],
    masks: Mapping[str, torch.Tensor],
    earlier: Mapping[str, Earlier],
    seed: int,
    dtype: torch.dtype,
    on_step: loop.OnStep = lambda loss, rate, step, total: None,
    on_adapted: Callable[[], None] = lambda: None,
    journal: loop.Journal = loop.NO_JOURNAL,
    start: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, SparseB], loop.Outcome]:
    """Trains a task's values, and rounds them to the dtype that the checkpoint stores.

    Args:
        masks: module → (K,) flat positions, ascending.
        earlier: module → what acts on the model meanwhile (scaled).
        seed: of the order of the examples and of dropout.
        on_adapted: called at the end while the layers, holding the rounded values, still stand in the model.
        journal: where to begin, and what is kept meanwhile.
        start: module → (K,) values to begin with; None: zeros.

    Raises:
        ConfigError: see `loop.fit`; also values that `dtype` cannot hold.
    """
    layers = host.layers(masks, task_scale(task.alpha, host.rank), earlier, task.training.dropout)
    for name, values in (start or {}).items():
        layers[name].values.data.copy_(values)
    with attached(host.model, layers):
        outcome = loop.fit(host.model, examples, phase_of(task, seed, host.output), host.pad_id, on_step, journal)
        trained = _rounded(task, layers, masks, dtype)
        on_adapted()
    return trained, outcome


def phase_of(task: TaskConfig, seed: int, output: Path | None = None) -> loop.Phase:
    """A task's training, as its settings say.

    Args:
        seed: of the order of the examples and of dropout.
        output: the checkpoint's folder, where trackers write beside it; None: nobody tracks.
    """
    training = task.training
    return loop.Phase(
        name=f"training of task {task.name!r}",
        seed=seed,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        epochs=training.epochs,
        steps=training.max_steps,
        micro_batch_size=training.micro_batch_size,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        gradient_checkpointing=training.gradient_checkpointing,
        packed_length=training.max_length if training.packing else None,
        tracking=trackers.tracking(task, output, "training"),
    )


@torch.no_grad()
def _rounded(
    task: TaskConfig, layers: Mapping[str, LorafLinear], masks: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, SparseB]:
    """The values in `dtype`, also put back into the layers: what is trained is what will be served."""
    trained = {}
    for name, layer in layers.items():
        values = layer.values.to(dtype)
        if not bool(torch.isfinite(values).all()):
            message = f"task {task.name!r}: values of {name} are beyond {str(dtype).removeprefix('torch.')}"
            remedy = "lower the learning rate, or store them as bfloat16 or float32 (adapter.dtype)"
            raise ConfigError(Problem(message, "adapter.dtype", remedy=remedy))
        layer.values.copy_(values)
        trained[name] = SparseB.from_flat(masks[name], values.cpu(), (layer.base.out_features, layer.rank))
    return trained
