"""Which K positions of each matrix a task takes: Algorithm 1 of the paper «LoRA without Forgetting».

B is trained dense on its feasible positions for a few mini-batches, from B⁰ (what earlier tasks add up to), and the K
positions with the largest |B − B⁰| are kept. B itself then goes back to B⁰.

Only the difference B − B⁰ at feasible positions is a parameter, so positions of earlier tasks cannot move. One step of
plain gradient descent leaves −learning rate · ∇B there: its top K is that of |∇B ⊙ Ω|. Gradients are not clipped and
the adapter has no dropout, as in the algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from loraf.delta import task_scale
from loraf.errors import ConfigError, Problem
from loraf.manifest import positions
from loraf.sparse import SparseB
from loraf_train.adapter.host import Host, attached
from loraf_train.adapter.layer import Earlier
from loraf_train.adapter.masks import feasible, top_k
from loraf_train.trainer import loop, trackers

if TYPE_CHECKING:
    from loraf_train.data.examples import Example
    from loraf_train.settings.config import TaskConfig


def calibrate(
    host: Host,
    task: TaskConfig,
    examples: Sequence[Example],
    taken: Mapping[str, Sequence[SparseB]],
    earlier: Mapping[str, Earlier],
    seed: int,
    on_step: Callable[[float, int, int], None] = lambda loss, step, total: None,
    journal: loop.Journal = loop.NO_JOURNAL,
) -> dict[str, torch.Tensor]:
    """Chooses the positions of a task.

    Args:
        taken: module → what any earlier task owns.
        earlier: module → what acts on the model meanwhile (B⁰, scaled).
        seed: of the choice of mini-batches.
        on_step: loss, step, number of steps.
        journal: where to begin, and what is kept meanwhile.

    Returns:
        Module → (K,) int64 flat positions, ascending, K = ⌊(1 − s)·d_out·r⌋.

    Raises:
        ConfigError: see `loop.fit`; also a B that is not finite.
    """
    shapes = {name: (base.out_features, host.rank) for name, base in host.targets.items()}
    candidates = {name: feasible(shape, taken[name]) for name, shape in shapes.items()}
    layers = host.layers(candidates, task_scale(task.alpha, host.rank), earlier)
    training, calibration = task.training, task.calibration
    phase = loop.Phase(
        name=f"calibration of task {task.name!r}",
        seed=seed,
        optimizer=calibration.optimizer,
        learning_rate=training.learning_rate if calibration.learning_rate is None else calibration.learning_rate,
        batch_size=calibration.batch_size or training.batch_size,
        steps=calibration.steps,
        micro_batch_size=training.micro_batch_size,
        gradient_checkpointing=training.gradient_checkpointing,
        packed_length=training.max_length if training.packing else None,
        tracking=trackers.tracking(task, host.output, "calibration"),
    )
    with attached(host.model, layers):
        loop.fit(
            host.model,
            examples,
            phase,
            host.pad_id,
            lambda loss, rate, step, total: on_step(loss, step, total),
            journal,
        )
    chosen = {}
    for name, layer in layers.items():
        change = layer.values.detach()
        if not bool(torch.isfinite(change).all()):
            remedy = f"use a calibration learning rate below {phase.learning_rate:g}"
            raise ConfigError(Problem(f"{phase.name}: B in {name} is not finite", remedy=remedy))
        best = top_k(change, positions(task.sparsity, *shapes[name]))
        chosen[name] = candidates[name][best.cpu()]
    return chosen
