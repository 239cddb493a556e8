"""Records which of vLLM's layers a forward pass calls, and with how many tokens.

A delta is added when a layer is called. If vLLM uses a layer's weight in another way in some steps (DeepSeek's absorbed
`kv_b_proj`), or calls the layer with some of a step's tokens, other tokens would not get their delta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

PREFILL, DECODE, MIXED = "prefill", "decode", "mixed"


@dataclass
class _Step:
    """
    Attributes:
        rows: layer → the fewest tokens that it was called with.
    """

    tokens: int
    requests: int
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """A mixed step has several requests, and one of them brings several tokens."""
        if self.tokens == self.requests:
            return DECODE
        return PREFILL if self.requests == 1 else MIXED


class Calls:
    """Records from `start` to `stop`. Meanwhile the model runs without compiled code and CUDA graphs, which call no
    layer in Python.

    Args:
        layers: by vLLM's names.
        model: the model that they are part of.
        runner: vLLM's model runner.
    """

    def __init__(self, layers: Mapping[str, BaseLinearLayerWithLoRA], model: torch.nn.Module, runner: Any):
        self._layers, self._model, self._runner = layers, model, runner
        self._steps: list[_Step] = []
        self._undo = ExitStack()

    def start(self) -> None:
        for module in self._model.modules():
            if getattr(module, "do_not_compile", None) is False:
                self._set(module, "do_not_compile", True)
        _without_graphs(self._runner, self._set)
        for name, layer in self._layers.items():
            self._set(layer, "apply", partial(self._call, name, layer.apply))

    def begin_step(self, tokens: int, requests: int) -> None:
        self._steps.append(_Step(tokens, requests))

    def kinds(self) -> set[str]:
        """Returns the kinds of steps that have been recorded."""
        return {step.kind for step in self._steps}

    def stop(self) -> set[str]:
        """Returns the layers that were called with all tokens of every recorded step."""
        self._undo.close()
        if not self._steps:
            return set()
        return {name for name in self._layers if all(step.rows.get(name, 0) >= step.tokens for step in self._steps)}

    def _call(self, name: str, apply: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self._steps:
            rows, count = self._steps[-1].rows, x.numel() // x.shape[-1]
            rows[name] = min(count, rows.get(name, count))
        return apply(x, *rest)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of an object until `stop`."""
        if name in vars(owner):
            self._undo.callback(setattr, owner, name, vars(owner)[name])
        else:
            self._undo.callback(delattr, owner, name)
        setattr(owner, name, value)


def _without_graphs(runner: Any, set_: Callable[[Any, str, Any], None]) -> None:
    """Makes vLLM's model runner, of either version, launch no CUDA graph."""
    dispatcher = getattr(runner, "cudagraph_dispatcher", None)
    if dispatcher is not None:
        from vllm.config.compilation import CUDAGraphMode

        stock = dispatcher.dispatch
        set_(
            dispatcher, "dispatch", lambda *args, **named: stock(*args, **named | {"valid_modes": {CUDAGraphMode.NONE}})
        )
    graphs = getattr(runner, "cudagraph_manager", None)
    if graphs is not None:
        set_(graphs, "_graphs_captured", False)
