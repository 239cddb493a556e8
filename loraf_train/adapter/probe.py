"""Tries out, without weights, how a model uses its linear layers when it reads text.

An adapter stands in place of a layer and works only where the model calls that layer. A model may also compute with the
layer's weight itself (Mamba multiplies by `dt_proj.weight`), or never call it (a vision tower, when it reads text).
The trial runs the model on torch's `meta` device, where tensors have shapes and no values.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from loraf.errors import one_line

log = logging.getLogger(__name__)

_TOKENS = 5  # of the text that is read

# What may be asked of a weight without computing with it.
_QUERIES = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_cpu")
    ),
    *(
        getattr(torch.Tensor, name)
        for name in ("size", "dim", "numel", "element_size", "is_floating_point", "get_device", "stride")
    ),
}


class WatchedWeight(torch.Tensor):
    """The weight of a layer that an adapter replaces; calls `on_use` when something is computed with it.

    Asking for its dtype, device or shape is no use of it; `on_query` is called the first time.
    """

    _on_use: Callable[[], None]
    _on_query: Callable[[], None]

    @classmethod
    def of(
        cls, weight: torch.Tensor, on_use: Callable[[], None], on_query: Callable[[], None] = lambda: None
    ) -> WatchedWeight:
        watched = weight.detach().as_subclass(cls)
        watched._on_use, watched._on_query = on_use, on_query
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            for watched in _watched((*args, *(kwargs or {}).values())):
                if func in _QUERIES:
                    watched._on_query()
                    watched._on_query = lambda: None
                else:
                    watched._on_use()
            return func(*args, **(kwargs or {}))


def _watched(values: Iterable[Any]) -> Iterable[WatchedWeight]:
    for value in values:
        if isinstance(value, WatchedWeight):
            yield value
        elif isinstance(value, list | tuple):
            yield from _watched(value)


@dataclass(frozen=True)
class Uses:
    """How a model uses its linear layers. Layers whose names differ only in a number count as one.

    Attributes:
        called: layers that the model calls.
        weight_read: layers whose weight the model computes with itself, or hands to other code that may.
    """

    called: frozenset[str]
    weight_read: frozenset[str]

    def calls(self, module: str) -> bool:
        return numberless(module) in self.called

    def reads_weight(self, module: str) -> bool:
        return numberless(module) in self.weight_read


def numberless(name: str) -> str:
    """Returns a module's name with `*` for each number between dots: the same for all layers of a model."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def uses(model: nn.Module) -> Uses | None:
    """Returns how the model uses its linear layers in training and in evaluation.

    None if the model cannot be tried: it is not one of transformers', or what it runs depends on values of tensors.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    key = (type(model), json.dumps(_without_dtype(model.config.to_dict()), sort_keys=True, default=str))
    if key not in _KNOWN:
        _KNOWN[key] = _try_out(type(model), model.config)
    return _KNOWN[key]


_KNOWN: dict[tuple[type[PreTrainedModel], str], Uses | None] = {}  # a trial of a large model takes seconds


def _without_dtype(config: Any) -> Any:
    """Leaves out what differs between a config as it was read and that of the loaded model."""
    if not isinstance(config, dict):
        return config
    return {key: _without_dtype(value) for key, value in config.items() if key not in ("dtype", "_name_or_path")}


def _try_out(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Uses | None:
    watched: dict[str, _WatchedLinear] = {}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            # bfloat16, because the kernels of some experts take nothing else; eager attention runs everywhere.
            build: Callable[..., PreTrainedModel] = kind._from_config
            model = build(copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager")
            for name, linear in list(model.named_modules()):
                if type(linear) is nn.Linear:
                    parent, _, child = name.rpartition(".")
                    watched[name] = _WatchedLinear(linear)
                    setattr(model.get_submodule(parent), child, watched[name])
            ids = torch.zeros((1, _TOKENS), dtype=torch.long)
            for training in (True, False):
                with torch.no_grad(), _AnyBranch():
                    model.train(training)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # a model may do anything with its tensors
        log.debug("%s cannot be tried out without weights: %s", kind.__name__, one_line(error))
        return None
    return Uses(
        frozenset(numberless(name) for name, linear in watched.items() if linear.is_called),
        frozenset(numberless(name) for name, linear in watched.items() if linear.is_weight_read or linear.handed_on),
    )


class _WatchedLinear(nn.Module):
    """A linear layer that notes how it is used.

    Attributes:
        handed_on: how often its weight was taken without a question about its dtype, device or shape: other code gets
            it, and what that does with it may depend on the machine (Mamba's fused kernels).
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.is_called = self.is_weight_read = False
        self.handed_on = 0

    @property
    def weight(self) -> torch.Tensor:
        self.handed_on += 1
        return WatchedWeight.of(self.base.weight, self._note_use, self._note_query)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def _note_use(self) -> None:
        self.is_weight_read = True

    def _note_query(self) -> None:
        self.handed_on -= 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.is_called = True
        y: torch.Tensor = self.base(x)
        return y


class _AnyBranch(TorchFunctionMode):
    """Answers questions about the values of meta tensors, which have none, so that a branch can be taken.

    They come up where masks are made ("are all tokens real?"), and which branch is taken does not matter there.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__) and args[0].is_meta:
            return True if func is torch.Tensor.__bool__ or args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))
