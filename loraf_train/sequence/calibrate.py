"""Selects the K positions of each matrix that a task owns: Algorithm 1 of the paper «LoRA without Forgetting».

B is trained dense on its feasible positions for a few mini-batches, starting from B⁰ (the sum of the active earlier
tasks). The K positions with the largest |B − B⁰| become the task's; B itself is discarded.

Only the difference B − B⁰ at feasible positions is a parameter, so positions of earlier tasks cannot move. One step of
plain gradient descent leaves −learning rate · ∇B there: its top K is that of |∇B ⊙ Ω|. The adapter has no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from loraf.delta import task_scale
from loraf.errors import ConfigError, Problem
from loraf.manifest import positions_per_matrix
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.layer import EarlierTasks, LorafLinear
from loraf_train.adapter.masks import feasible, top_k
from loraf_train.adapter.trainable_base import TrainableBase, attached
from loraf_train.data.stream import ExampleStream, have_changed
from loraf_train.sequence.phases import calibration_phase
from loraf_train.trainer import loop
from loraf_train.trainer.penalty import NO_PENALTY, Penalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.data.examples import Example
    from loraf_train.data.preferences import Pair
    from loraf_train.settings.config import TaskConfig


def calibrate(
    base: TrainableBase,
    task: TaskConfig,
    examples: Sequence[Example] | Sequence[Pair],
    taken: Mapping[str, Sequence[SparseB]],
    earlier: Mapping[str, EarlierTasks],
    seed: int,
    on_step: Callable[[float, int, int], None] = lambda loss, step, total: None,
    journal: loop.Journal = loop.NO_JOURNAL,
    penalty: Callable[[Mapping[str, LorafLinear]], Penalty] = lambda layers: NO_PENALTY,
) -> dict[str, torch.Tensor]:
    """Selects the positions of a task.

    Args:
        taken: module → B of every task that owns positions.
        earlier: module → the earlier tasks that are active during calibration (B⁰, scaled).
        seed: determines the mini-batches.
        on_step: called with loss, step (from 1) and number of steps.
        journal: where to start, and what to save on the way.
        penalty: returns what is added to the loss, for the dense layers; so positions whose change would disturb
            earlier tasks are not chosen.

    Returns:
        Module → (K,) int64 positions, ascending, K = ⌊(1 − s)·d_out·r⌋.

    Raises:
        ConfigError: see `loop.fit`; also a B that is not finite.
    """
    shapes = {name: (linear.out_features, base.rank) for name, linear in base.targets.items()}
    candidates = {name: feasible(shape, taken[name]) for name, shape in shapes.items()}
    layers = base.layers(candidates, task_scale(task.alpha, base.rank), earlier)
    phase = calibration_phase(task, seed, base.output)
    with attached(base.model, layers):
        loop.fit(
            base.model,
            examples,
            phase,
            base.pad_id,
            lambda loss, rate, step, total: on_step(loss, step, total),
            journal,
            penalty(layers),
        )
    return largest_changes(layers, candidates, task.sparsity, phase.name, phase.settings.learning_rate)


def read_by_calibration(
    model: PreTrainedModel, task: TaskConfig, examples: Sequence[Example] | Sequence[Pair], seed: int
) -> bytes:
    """Returns the SHA-256 of the streamed examples that calibration trains on; empty: they are not streamed.

    Args:
        examples: of the task.
        seed: of the calibration.
    """
    if not isinstance(examples, ExampleStream):
        return b""
    assert task.calibration.batch_size is not None  # CalibrationConfig.resolved
    return examples.digest_of_first(seed, task.calibration.steps * task.calibration.batch_size, loop.limits_of(model))


def require_read(
    model: PreTrainedModel,
    task: TaskConfig,
    examples: Sequence[Example] | Sequence[Pair],
    seed: int,
    calibrated_on: bytes,
) -> None:
    """Raises ConfigError if calibration would no longer read what it did when it chose the positions.

    Args:
        calibrated_on: what `read_by_calibration` returned then; empty: it is not known.
    """
    if calibrated_on and read_by_calibration(model, task, examples, seed) != calibrated_on:
        raise have_changed(task.name)


def largest_changes(
    layers: Mapping[str, LorafLinear],
    candidates: Mapping[str, torch.Tensor],
    sparsity: float,
    phase: str,
    learning_rate: float,
) -> dict[str, torch.Tensor]:
    """Selects the positions of each matrix at which calibration has moved B most.

    Args:
        layers: module → the layer that was trained at the candidates, from zeros.
        candidates: module → positions, ascending.
        phase, learning_rate: for messages.

    Returns:
        Module → (K,) int64 positions, ascending, K = ⌊(1 − s)·d_out·r⌋.

    Raises:
        ConfigError: a B is not finite.
    """
    positions = {}
    for name, layer in layers.items():
        change = layer.values.detach()
        if not bool(torch.isfinite(change).all()):
            remedy = f"use a calibration learning rate below {learning_rate:g}"
            raise ConfigError(Problem(f"{phase}: B in {name} is not finite", remedy=remedy))
        largest = top_k(change, positions_per_matrix(sparsity, layer.out_features, layer.rank))
        positions[name] = candidates[name][largest.cpu()]
    return positions
