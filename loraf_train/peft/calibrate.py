"""Chooses the positions of the active task, by the steps that `loraf-train` takes (sequence.calibrate)."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from loraf.errors import ConfigError, Problem
from loraf_train.adapter.masks import feasible
from loraf_train.adapter.trainable_base import attached
from loraf_train.data.examples import IGNORED
from loraf_train.peft.batches import Batch, examples_of, labelled_tokens, moved, rounds
from loraf_train.peft.finish import finish_others
from loraf_train.peft.model import LorafModel, tuner_of
from loraf_train.peft.protect import retention_of, warn_of_unprotected
from loraf_train.peft.save import saving_problem
from loraf_train.processes import group
from loraf_train.retention.extent import EXAMPLES
from loraf_train.sequence.calibrate import largest_changes
from loraf_train.trainer.randomness import own_randomness

Loss = Callable[[nn.Module, dict[str, Any]], torch.Tensor]


def model_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Returns the loss that the model itself computes.

    Raises:
        ConfigError: the batch has no labels.
    """
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, torch.Tensor):
        remedy = "add labels to the batches, or pass loss="
        raise ConfigError(Problem("the model returns no loss for a batch", "dataloader", remedy=remedy))
    return loss


def calibrate(
    model: nn.Module,
    dataloader: Iterable[Batch],
    *,
    steps: int = 32,
    learning_rate: float = 1e-4,
    optimizer: str = "adamw",
    loss: Loss = model_loss,
    on_step: Callable[[float, int, int], None] = lambda loss, step, total: None,
) -> None:
    """Chooses the positions of the active task, which can be trained from then on.

    A dense B is trained at all free positions for a few batches, without dropout, and thrown away; the positions at
    which it moved most become the task's. Every other task with positions is finished by this call, see `finish_task`.

    Args:
        model: what `get_peft_model` returned.
        dataloader: any iterable of the task's training batches, read from the beginning again if there are too few.
            Of several processes, each passes its own batches.
        steps: batches, one for each step.
        learning_rate: constant; best that of the training.
        optimizer: "adamw" or "sgd".
        loss: takes the model and a batch on its device.
        on_step: called with loss, step (from 1) and number of steps.

    Raises:
        ConfigError: there are no batches, the loss is not finite, or the active task is finished or in training.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # gradients are averaged here
    tuner = tuner_of(model)
    adapter = tuner.active_task()
    state = tuner.states[adapter]
    problems = _misuse(tuner, adapter, steps, learning_rate, optimizer)
    if problems:
        raise ConfigError(problems)
    unsaveable = "" if tuner.in_order() else saving_problem(tuner)
    if unsaveable:
        warnings.warn(f"what is trained here cannot be saved: {unsaveable}", UserWarning, stacklevel=2)
    finish_others(model, adapter)
    base = tuner.base()
    taken = tuner.taken(adapter)
    candidates = {
        name: feasible((linear.out_features, base.rank), taken[name]) for name, linear in base.targets.items()
    }
    dense = base.layers(candidates, state.config.scaling, tuner.earlier(state.trained_with))
    warn_of_unprotected(tuner, adapter)
    retention = retention_of(tuner, adapter)
    penalty = retention.penalty(dense)
    values = [layer.values for layer in dense.values()]
    kind = torch.optim.SGD(values, lr=learning_rate) if optimizer == "sgd" else _adamw(values, learning_rate)
    phase = f"calibration of task {state.name!r}"
    device = base.model.device
    with attached(base.model, dense), _training(model), _without_randomness(base.model):
        for step, batch in enumerate(rounds(dataloader, steps)):
            batch = moved(batch, device)
            state.examples += [e for e in examples_of(batch) if e not in state.examples]
            del state.examples[EXAMPLES:]
            value = loss(model, batch)
            value.backward()  # type: ignore[no-untyped-call]  # of torch
            _average(values, labelled_tokens(batch))
            _require_finite(float(value.detach()), phase, step + 1, learning_rate, labelled_tokens(batch))
            penalty.add_gradient(step, steps)
            kind.step()
            kind.zero_grad()
            on_step(float(value.detach()), step + 1, steps)
    chosen = largest_changes(dense, candidates, state.config.sparsity, phase, learning_rate)
    digest = hashlib.sha256(b"".join(positions.numpy().tobytes() for positions in chosen.values())).hexdigest()
    if not group.agree(int(digest[:15], 16), device):
        message = f"task {state.name!r}: the processes of this run selected different positions"
        raise ConfigError(Problem(message, remedy="run it on processors of one kind, or in one process"))
    for name, layer in tuner.layers().items():
        layer.task(adapter).choose(chosen[name])
    state.order = tuner.next_order()
    state.record = {"calibration": {"steps": steps, "learning_rate": learning_rate, "optimizer": optimizer}}


def _misuse(tuner: LorafModel, adapter: str, steps: int, learning_rate: float, optimizer: str) -> list[Problem]:
    state, problems = tuner.states[adapter], []
    if state.is_finished:
        message = f"task {state.name!r} is finished, and its positions stay"
        problems.append(Problem(message, remedy="add the next task with `loraf_train.peft.next_task`"))
    elif any(bool(layer.task(adapter).values.detach().any()) for layer in tuner.layers().values()):
        message = f"task {state.name!r} is in training, and other positions would lose its values"
        problems.append(Problem(message, remedy="calibrate a task once, before it is trained"))
    if steps < 1:
        problems.append(Problem(f"{steps} cannot be used", "steps", remedy="use a whole number from 1"))
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        problems.append(Problem(f"{learning_rate} cannot be used", "learning_rate", remedy="use a number above 0"))
    if optimizer not in ("adamw", "sgd"):
        problems.append(Problem(f"{optimizer!r} is not known", "optimizer", remedy="use adamw or sgd"))
    if any(isinstance(parameter, DTensor) for parameter in tuner.model.parameters()):
        message = "the model is sharded, which the PEFT method cannot train"
        problems.append(Problem(message, remedy="train it with `loraf-train`, which shards the base with FSDP2"))
    if any(layer.merged or layer.disable_adapters for layer in tuner.layers().values()):
        message = "the adapters are merged or switched off, so nothing would be trained"
        problems.append(Problem(message, remedy="call unmerge_adapter, or leave disable_adapter"))
    return problems


def _adamw(values: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(values, lr=learning_rate, weight_decay=0.0, fused=True)


def _average(values: list[nn.Parameter], weight: int) -> None:
    """Averages gradients over the processes, each weighted by the tokens of its batch. No-op in a single process."""
    if not distributed.is_initialized():
        return
    total = torch.tensor([float(weight)], device=values[0].device)
    distributed.all_reduce(total)
    for parameter in values:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad *= weight / total.item()
        distributed.all_reduce(parameter.grad)


def _require_finite(loss: float, phase: str, step: int, learning_rate: float, labelled: int) -> None:
    if not math.isfinite(loss):
        if not labelled:
            message = f"{phase}: the batch of step {step} has no label to learn, all are {IGNORED}"
            remedy = "label the tokens of the answers, and see that they are not cut off"
            raise ConfigError(Problem(message, "dataloader", remedy=remedy))
        remedy = f"use a learning rate below {learning_rate:g}"
        raise ConfigError(Problem(f"{phase}: the loss is {loss} at step {step}", remedy=remedy))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode for a `with` block, which leaves torch's generators as they were."""
    was_training = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            yield
        finally:
            for module, mode in was_training.items():
                module.training = mode


@contextmanager
def _without_randomness(model: nn.Module) -> Iterator[None]:
    """Switches off the base model's own dropout for a `with` block, as `loraf-train` does."""
    probabilities = [(holder, name, getattr(holder, name)) for holder, name in own_randomness(model)]
    try:
        for holder, name, _ in probabilities:
            setattr(holder, name, 0.0)
        yield
    finally:
        for holder, name, probability in probabilities:
            setattr(holder, name, probability)
