"""The tuner: which tasks a model has, in which order, and what a new one stands on.

An adapter goes through three states:

    new          no positions yet; it computes what the finished tasks compute
    calibrated   its positions are chosen (`calibrate`), and its values train
    finished     its values are rounded to the stored dtype and frozen (`finish_task`)

A task stands on those that were finished when its positions were chosen. Choosing positions finishes every other
calibrated task, since masks must not overlap.
"""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from loraf.errors import ConfigError, Problem
from loraf.manifest import Templates, positions_per_matrix
from loraf.matrices import projection
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.layer import EarlierTasks
from loraf_train.adapter.masks import PlannedTask, shortage
from loraf_train.adapter.trainable_base import TrainableBase, adaptable
from loraf_train.adapter.weights import computes_in
from loraf_train.data.examples import Example
from loraf_train.peft.config import LorafConfig
from loraf_train.peft.layer import LorafLayer, joined
from loraf_train.peft.own_values import made_with, require_own_values
from loraf_train.settings.parts import PROJECTIONS

REFERENCE = "ref"  # TRL's name for the frozen copy of an adapter that it adds with the same configuration
_SHARED = ("r", "seed", "init_std")  # by all tasks of a model


@dataclass
class TaskState:
    """What is known of an adapter besides its values.

    Attributes:
        config: its configuration; `name`: of the task.
        copy_of: the adapter that this one is a frozen copy of; None: it is a task.
        order: place among the model's tasks, by the time at which positions were chosen; None: they are not.
        trained_with: the adapters that it stands on.
        examples: of its training, from which its statistics are gathered.
        statistics: content of its statistics file; `gathered_at`: the values that they belong to.
        record: what the manifest says of its training.
        saved_in: folders whose checkpoint has its values from this model.
    """

    config: LorafConfig
    name: str
    copy_of: str | None = None
    order: int | None = None
    is_finished: bool = False
    trained_with: tuple[str, ...] = ()
    examples: list[Example] = field(default_factory=list)
    statistics: bytes | None = None
    gathered_at: dict[str, torch.Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    templates: Templates = field(default_factory=Templates)
    saved_in: set[str] = field(default_factory=set)

    def is_own(self, folder: Path) -> bool:
        """Whether the checkpoint in a folder has the task from this model, which may then replace it."""
        return os.path.realpath(folder) in self.saved_in


class LorafModel(BaseTuner):
    """A causal language model with tasks as its adapters.

    Attributes:
        states: adapter → what is known of it, in the order in which they were added.
        shared: what all tasks of the model have in common; empty until the first is added.
    """

    prefix = "loraf_"
    tuner_layer_cls = LorafLayer
    target_module_mapping: dict[str, list[str]] = {}
    states: dict[str, TaskState]
    shared: dict[str, Any]
    write: Callable[[LorafModel, str, str], None]  # `save.save_from_peft`, which the package sets: it builds on this

    # --- adding an adapter ----------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        states = self.__dict__.setdefault("states", {})
        config = self.peft_config[adapter_name]
        if adapter_name != REFERENCE and any(state.config is config for state in states.values()):
            config = self.peft_config[adapter_name] = copy.deepcopy(config)  # each task has its own
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            states.pop(adapter_name, None)
            raise
        if self.states[adapter_name].copy_of is not None:
            self._copy(adapter_name)
        else:
            assert isinstance(config, LorafConfig)
            self.shared = {key: getattr(config, key) for key in _SHARED}
            self._bind()
            if config._folder is not None:
                self._restore(adapter_name)
        self.stand()

    def _bind(self) -> None:
        """Lets the configurations write this model's checkpoint when PEFT saves it."""
        for name, state in self.tasks.items():
            state.config._write = partial(_write, weakref.ref(self), name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        self._bind()  # a copy writes its own values

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Plans the new adapter. Raises ConfigError, which lists all that speaks against it."""
        super()._check_new_adapter_config(config)
        if not isinstance(config, LorafConfig):
            raise ConfigError(f"{type(config).__name__} is not a LorafConfig")
        config.check()  # PEFT and TRL may have changed it since it was made
        adapter = next(name for name, other in reversed(self.peft_config.items()) if other is config)
        if adapter in self.states:
            return
        source = next((name for name, state in self.states.items() if state.config is config), None)
        if source is not None:
            self.states[adapter] = TaskState(config, self.states[source].name, copy_of=source)
            return
        name = config.task_name or adapter
        problems = self._misfits(config, name)
        if problems:
            raise ConfigError(problems)
        self.states[adapter] = TaskState(config, name)

    def _misfits(self, config: LorafConfig, name: str) -> list[Problem]:
        """What keeps a task from being added."""
        problems: list[Problem] = []
        known = [state.name for state in self.tasks.values()]
        is_causal = isinstance(self.model, PreTrainedModel)
        is_causal = is_causal and self.model.get_output_embeddings() is not None
        if not is_causal:
            message = f"a {type(self.model).__name__} is not a causal language model of transformers"
            problems.append(Problem(message, "model", remedy="load it with AutoModelForCausalLM.from_pretrained"))
        if name in known:
            problems.append(
                Problem(f"the model has a task {name!r} already", "task_name", remedy="choose another name")
            )
        for key, theirs in self.__dict__.get("shared", {}).items():
            ours = getattr(config, key)
            if ours != theirs:
                message = f"is {ours!r}, but the model's first task has {theirs!r}, and all tasks of a model share it"
                problems.append(Problem(message, key, remedy=f"use {theirs!r}"))
        missing = [task for task in config.trained_with or () if config._folder is not None and task not in known]
        if missing:
            message = f"task {name!r} was trained on top of {', '.join(missing)}, which the model does not have"
            remedy = "load them first, or all tasks of the checkpoint by `loraf_train.peft.load_tasks`"
            problems.append(Problem(message, "trained_with", remedy=remedy))
        targets = self.matched(config)
        if not self.layers():
            if targets:  # PEFT reports that nothing matches
                adaptable(self.model, targets, "target_modules")
        elif set(targets) != self.layers().keys():
            message = "names other layers than the model's first task, and all tasks of a model share them"
            problems.append(Problem(message, "target_modules", remedy="leave it as it was for the first task"))
        if not problems and targets:
            planned = [PlannedTask(s.name, s.config.sparsity, "sparsity") for s in self.tasks.values()]
            shapes = {target: _shape(self.model.get_submodule(target)) for target in targets}
            problems += shortage(shapes, config.r, [*planned, PlannedTask(name, config.sparsity, "sparsity")])
        return problems

    def matched(self, config: LorafConfig) -> list[str]:
        """Returns the modules that a configuration names, as PEFT matches them."""
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

        self._prepare_adapter_config(config, {})
        if isinstance(config.target_modules, str) and config.target_modules == "all-linear" and self.states:
            return list(self.layers())
        _maybe_include_all_linear_layers(config, self.model)
        names = [name for name, _ in self.model.named_modules() if ".loraf_" not in name and ".base_layer" not in name]
        return [name for name in names if name and self._check_target_module_exists(config, name)]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Any) -> PeftConfig:
        assert isinstance(peft_config, LorafConfig)
        if peft_config.target_modules is None:
            endings = {name.rsplit(".", 1)[-1] for name, _ in self.model.named_modules()}
            peft_config.target_modules = endings.intersection(PROJECTIONS)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, LorafConfig)
        if not isinstance(target, LorafLayer):
            assert isinstance(target, nn.Linear)  # by `adaptable`
            a = projection.projection_and_digest(
                peft_config.seed,
                current_key,
                peft_config.r,
                target.in_features,
                peft_config.init_std,
                computes_in(target),
            )[0]
            layer = LorafLayer(target, a, current_key)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        k = positions_per_matrix(peft_config.sparsity, target.out_features, peft_config.r)
        target.add_task(adapter_name, k, peft_config.scaling, peft_config.dropout, made_with(peft_config))

    def _copy(self, adapter: str) -> None:
        """Makes an adapter a frozen copy of what the active task is before it trains, as TRL wants it for DPO."""
        state = self.states[adapter]
        source = state.copy_of
        active = next((name for name in self.active_adapters if name in self.tasks), source)
        for layer in self.layers().values():
            task, original = layer.task(adapter), layer.task(str(source))
            task.is_frozen = True
            task.values.requires_grad_(False)
            if active == source and original.is_calibrated:
                task.choose(original.positions)
                task.values.data.copy_(original.values)
        state.trained_with = self.states[str(active)].trained_with
        state.order = None

    def _restore(self, adapter: str) -> None:
        """Marks an adapter that PEFT loads from a folder: what it stands on, and whether it is finished."""
        state = self.states[adapter]
        by_task = {other.name: name for name, other in self.tasks.items()}
        state.trained_with = tuple(by_task[name] for name in state.config.trained_with or ())
        state.order = self.next_order()
        state.is_finished = state.config.inference_mode
        for layer in self.layers().values():
            layer.task(adapter).is_frozen = state.is_finished

    # --- the tasks ------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> dict[str, TaskState]:
        """Adapter → its state, without copies."""
        return {name: state for name, state in self.states.items() if state.copy_of is None}

    def layers(self) -> dict[str, LorafLayer]:
        """Module, by the base model's own names → its layer."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, LorafLayer)}

    def is_calibrated(self, adapter: str) -> bool:
        return all(layer.task(adapter).is_calibrated for layer in self.layers().values())

    def finished(self) -> list[str]:
        """The adapters whose tasks are finished, in order."""
        names = [name for name, state in self.tasks.items() if state.is_finished]
        return sorted(names, key=lambda name: self.states[name].order or 0)

    def in_order(self) -> list[str]:
        """The adapters whose positions are chosen, in the order of the checkpoint."""
        names = [name for name in self.tasks if self.is_calibrated(name)]
        orders = {name: self.states[name].order for name in names}
        return sorted(names, key=lambda name: math.inf if (order := orders[name]) is None else order)

    def next_order(self) -> int:
        return 1 + max((state.order for state in self.states.values() if state.order is not None), default=-1)

    def active_task(self) -> str:
        """Returns the one active adapter. Raises ConfigError if several are active, or none."""
        names = [name for name in self.active_adapters if name in self.tasks]
        if len(names) != 1:
            message = f"one task is trained at a time, and {len(names)} are active"
            raise ConfigError(Problem(message, remedy="call model.set_adapter with the name of one"))
        return names[0]

    def stand(self) -> None:
        """Puts every task that is not calibrated on top of the finished ones, and each layer on what its task needs."""
        finished = tuple(self.finished())
        known = any(self.states[name].statistics is not None for name in finished)
        for name, state in self.states.items():
            if state.copy_of is None and not state.is_finished and not self.is_calibrated(name):
                state.trained_with = finished if state.config.start == "previous" else ()
            for layer in self.layers().values():
                task = layer.task(name)
                task.trained_with = state.trained_with
                task.needs_guard = known and state.config.retention is not None and not state.is_finished
                task.stand_on(joined([layer.task(other).own() for other in state.trained_with]))
        for layer in self.layers().values():
            if len(layer.active_adapters) > 1:
                layer.set_adapter(layer.active_adapters)

    def taken(self, leave_out: str) -> dict[str, list[SparseB]]:
        """Module → B of every other task that owns positions."""
        names = [name for name in self.tasks if name != leave_out and self.is_calibrated(name)]
        return {
            module: [layer.task(name).sparse(torch.float32) for name in names]
            for module, layer in self.layers().items()
        }

    def earlier(self, adapters: Any) -> dict[str, EarlierTasks]:
        """Module → the part of B of some adapters, on their own."""
        return {m: joined([layer.task(name).own() for name in adapters]) for m, layer in self.layers().items()}

    def base(self) -> TrainableBase:
        """The model, its target layers and A, as the code of `loraf-train` takes them."""
        layers = self.layers()
        return TrainableBase(
            self.model,
            {name: layer.linear for name, layer in layers.items()},
            {name: layer.loraf_a for name, layer in layers.items()},
            _padding(self.model),
        )

    # --- PEFT's calls ---------------------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        dependent = [
            state.name
            for name, state in self.tasks.items()
            if adapter_name in state.trained_with and self.is_calibrated(name)
        ]
        if dependent:
            message = f"{', '.join(dependent)} was trained on top of {adapter_name!r}, and would compute something else"
            raise ConfigError(Problem(message, remedy="delete it first"))
        super().delete_adapter(adapter_name)
        del self.states[adapter_name]
        self.stand()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            message = "one batch cannot hold requests for several adapters here"
            raise ConfigError(Problem(message, "adapter_names", remedy="serve the checkpoint with loraf-serve"))
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Checks the values, and rounds those of a task that is loaded to be used, as the checkpoint's are."""
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        if config.inference_mode and isinstance(config, LorafConfig):
            dtype = getattr(torch, config.dtype)
            remapped = {
                name: value.to(dtype).to(value.dtype) if name.endswith(".values") else value
                for name, value in remapped.items()
            }
        tuner = tuner_of(model)
        state = tuner.tasks.get(adapter_name)
        if state is not None:
            layers, taken = tuner.layers(), tuner.taken(adapter_name)
            require_own_values(adapter_name, state.name, state.config, state.is_finished, layers, taken, remapped)
        return remapped


def tuner_of(model: nn.Module) -> LorafModel:
    """Returns the tuner inside a model that `get_peft_model` made, also if it is wrapped for several processes.

    Raises:
        ConfigError: it has no LoRAF adapter.
    """
    for module in model.modules():
        if isinstance(module, LorafModel):
            return module
    remedy = "pass what `get_peft_model(model, LorafConfig(…))` returned"
    raise ConfigError(Problem(f"a {type(model).__name__} has no LoRAF adapter", "model", remedy=remedy))


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear | LorafLayer)
    return module.out_features, module.in_features


def _padding(model: nn.Module) -> int:
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return padding if isinstance(padding, int) else 0


def _write(tuner: weakref.ref[LorafModel], adapter: str, folder: str) -> None:
    model = tuner()
    if model is not None:
        model.write(model, adapter, folder)
