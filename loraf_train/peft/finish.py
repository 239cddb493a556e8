"""Ends a task: rounds its values to the stored dtype, freezes them, and gathers the statistics that protect it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from loraf.errors import ConfigError, Problem
from loraf_train.adapter.trainable_base import attached
from loraf_train.peft.batches import Batch, examples_of
from loraf_train.peft.config import SHARED, LorafConfig
from loraf_train.peft.model import LorafModel, TaskState, tuner_of
from loraf_train.peft.protect import retention_of
from loraf_train.sequence.phases import TRAINING_SEED, seeds_of
from loraf_train.sequence.train_task import rounded

if TYPE_CHECKING:
    from peft import PeftModel


def next_task(
    model: PeftModel, config: LorafConfig, data: Iterable[Batch] | None = None, adapter_name: str | None = None
) -> None:
    """Finishes the task in training, adds the next one and makes it the active one; then `calibrate` it.

    The new task trains on top of the finished ones, at other positions, and within its `retention` budget. Copies that
    a trainer made for reference are deleted.

    Args:
        config: of the new task. What all tasks share may be left out: r, seed, init_std, target_modules.
        data: batches of the task that is finished, see `finish_task`.
        adapter_name: None: the task's name.

    Raises:
        ConfigError: the task in training has not been calibrated, or the new one does not fit beside the others; data
            are given for a task that `finish_task` does not take them for.
    """
    tuner = tuner_of(model)
    if config.task_name is None:
        raise ConfigError(Problem("is missing", "task_name", "LorafConfig", "name the new task"))
    if any(state.config is config for state in tuner.states.values()):
        message = "belongs to a task of the model already"
        raise ConfigError(Problem(message, "config", remedy="make a LorafConfig for the new task"))
    first = next(iter(tuner.tasks.values()), None)
    if first is not None:
        inherit(config, first.config)
    if data is not None:
        finish_task(model, data)
    for name, state in list(tuner.tasks.items()):
        if not state.is_finished:
            finish_task(model, adapter=name)
    for name in [name for name, state in tuner.states.items() if state.copy_of is not None]:
        model.delete_adapter(name)
    adapter = adapter_name or config.task_name
    model.add_adapter(adapter, config)
    model.set_adapter(adapter)


def inherit(config: LorafConfig, first: LorafConfig) -> None:
    """Takes over what all tasks of a model share, where a configuration says nothing of it."""
    for key in SHARED:
        if config.left_out(key):
            setattr(config, key, getattr(first, key))


def finish_task(model: nn.Module, data: Iterable[Batch] | None = None, adapter: str | None = None) -> None:
    """Ends a task: its values are rounded to the stored dtype and stay, and later tasks are kept from disturbing it.

    Idempotent. `next_task` and `calibrate` finish the tasks before; call it to name other data. A task that is finished
    without statistics, such as one from a hub, gets them from data.

    Args:
        data: batches of the task's training, from which the statistics are gathered that protect it; None: those that
            `calibrate` has seen. At most 128 examples of them are used.
        adapter: None: the active one.

    Raises:
        ConfigError: it has not been calibrated, its values are not finite, the data hold no labels, or they would not
            be used: it has its statistics, or none since its retention is None.
    """
    tuner = tuner_of(model)
    adapter = tuner.active_task() if adapter is None else adapter
    state = tuner.states[adapter]
    if data is not None:
        _require_wanted(state)
    elif state.is_finished:
        return
    if not tuner.is_calibrated(adapter):
        message = f"task {state.name!r} has not been trained"
        remedy = "calibrate and train it, or call model.delete_adapter"
        raise ConfigError(Problem(message, remedy=remedy))
    if data is not None:
        examples = [example for batch in data for example in examples_of(batch)]
        if not examples:
            message = f"holds nothing that task {state.name!r} could have learned, so nothing would protect it"
            remedy = (
                "pass batches with input_ids and labels, or leave it out: then those that calibrate has seen are used"
            )
            raise ConfigError(Problem(message, "data", remedy=remedy))
        state.examples = examples
        state.gathered_at = {}
    gather(tuner, adapter)
    if state.is_finished:
        tuner.stand()
        return
    rounded(state.name, {m: layer.task(adapter) for m, layer in tuner.layers().items()}, _dtype(state.config))
    state.is_finished = True
    if state.order is None:
        state.order = tuner.next_order()
    for layer in tuner.layers().values():
        layer.task(adapter).is_frozen = True
        layer.task(adapter).values.requires_grad_(False)
    tuner.stand()


def _require_wanted(state: TaskState) -> None:
    """Raises ConfigError if a task's data would be ignored."""
    message = ""
    if state.config.retention is None:
        message = f"nothing protects task {state.name!r}, whose retention is None, so these batches would not be used"
    elif state.is_finished and state.statistics is not None:
        message = f"task {state.name!r} is finished, with the statistics that protect it, so these would not be used"
    if message:
        raise ConfigError(Problem(message, "data", remedy="leave it out"))


def finish_others(model: nn.Module, adapter: str) -> None:
    """Finishes every calibrated task but one."""
    tuner = tuner_of(model)
    for name, state in list(tuner.tasks.items()):
        if name != adapter and not state.is_finished and tuner.is_calibrated(name):
            finish_task(model, adapter=name)


def gather(tuner: LorafModel, adapter: str) -> None:
    """Gathers the statistics of a task with its present values, rounded, unless they were gathered with the same."""
    state = tuner.states[adapter]
    layers = tuner.layers()
    values = {name: layer.task(adapter).sparse(_dtype(state.config)).values for name, layer in layers.items()}
    known = state.gathered_at
    if known and all(torch.equal(known[name], values[name]) for name in values):
        return
    state.statistics = None
    if state.config.retention is None:
        return
    if not state.examples:
        _warn(state.name, "no batch with input_ids and labels was seen")
        return
    base = tuner.base()
    positions = {name: layer.task(adapter).positions.cpu().long() for name, layer in layers.items()}
    still = base.layers(positions, state.config.scaling, tuner.earlier(state.trained_with))
    for name, layer in still.items():
        layer.values.data.copy_(values[name])
    retention = retention_of(tuner, adapter)
    with attached(base.model, still):
        retention.gather(base, state.examples, seeds_of(state.config.seed, state.name)[TRAINING_SEED], None)
    if retention.failure:
        _warn(state.name, retention.failure)
    state.statistics, state.gathered_at = retention.statistics, values


def _warn(task: str, why: str) -> None:
    message = f"the statistics of task {task!r} could not be gathered ({why}), so later tasks may change its answers"
    warnings.warn(message, UserWarning, stacklevel=3)


def _dtype(config: LorafConfig) -> torch.dtype:
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
