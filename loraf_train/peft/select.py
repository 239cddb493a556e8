"""A task set, as it is written for the server and at every command, on a model in memory."""

from __future__ import annotations

from torch import nn

from loraf.errors import ConfigError, Problem
from loraf.set_text import AS_TRAINED, parse
from loraf.tasksets import TaskSet
from loraf_train.peft.model import tuner_of


def select_tasks(model: nn.Module, text: str | None) -> None:
    """Computes with exactly this task set, for use and not for training.

    An adapter that PEFT activates computes as it was trained, with the tasks that it stands on. A set is taken
    literally: `nlu` means the values of nlu alone.

    Args:
        text: `math`, `math+nlu:0.5`, `all`, `base`, `as_trained=nlu`; None: the active adapters again. The next
            `set_adapter` ends it too.

    Raises:
        SelectionError, UnknownTask: the text is not a set of the model's tasks.
        ConfigError: the adapters are merged or switched off.
    """
    tuner = tuner_of(model)
    layers = tuner.layers()
    if text is None:
        for layer in layers.values():
            layer.select(None)
        return
    if any(layer.merged for layer in layers.values()):
        raise ConfigError(Problem("the adapters are merged", remedy="call unmerge_adapter first"))
    if any(layer.disable_adapters for layer in layers.values()):
        raise ConfigError(Problem("the adapters are switched off", remedy="leave disable_adapter first"))
    adapters = {tuner.states[name].name: name for name in tuner.in_order()}
    written = parse(text)
    if written.kind == AS_TRAINED:
        TaskSet.of([(written.name, 1.0)], list(adapters))  # raises if there is no such task
        adapter = adapters[written.name]
        weights = dict.fromkeys((*tuner.states[adapter].trained_with, adapter), 1.0)
    elif written.kind == "base":
        weights = {}
    elif written.kind == "all":
        weights = dict.fromkeys(adapters.values(), 1.0)
    else:
        weights = {adapters[name]: weight for name, weight in TaskSet.of(written.pairs, list(adapters)).weights}
    for layer in layers.values():
        layer.select(weights)
