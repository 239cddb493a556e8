"""Proves for each module that LoRA on vLLM's layer acts as a change of the module's weight in transformers would.

vLLM's layer is not always the module. It may hold the rows in another order (Llama 4), be left out of some steps
(`loraf_serve.vllm.worker.calls`), or hold a weight that transformers uses for two outputs (Gemma 4's shared keys and
values). The base model's answers are right all the same, and only those of task sets would be wrong.

So each layer computes products with random vectors, and these are compared with the rows of the model's files. What
counts is what a layer computes: it may have packed its weights for the processor, or hold a part of them (tensor
parallelism).

    y[o] = Σ_k W[o, k] x[k],  x[k] = ±1          W from the files, in the engine's dtype

A row in the wrong place differs by about √2 ‖W[o]‖; the tolerance covers rounding and, in a layer that vLLM quantizes
while it loads, the error of that.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from loraf_serve.vllm.worker import parts, targets
from loraf_serve.vllm.worker.base_weights import BaseWeights
from loraf_serve.vllm.worker.calls import Calls

if TYPE_CHECKING:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager

    from loraf_serve.vllm.worker.parts import LayerPart

UNCHECKED = "the server did not check how vLLM applies it"
NOT_CALLED = "vLLM does not call it for every token of every step, so that an adapter would not act everywhere"
OTHER_ROWS = "vLLM's layer holds other rows than the model's files, or the same in another order"
_VECTORS = 8
_ROWS, _RUN = 512, 8  # of a part that are compared at most, in runs of this length
_QUANTIZED_TOLERANCE = 0.25
_SAME = 0.05  # relative distance below which two rows' products are equal


class Proof:
    """What has been proven about the layers of a worker.

    Call `start_recording`, then run forward passes, `stop_recording`, then `compare` until it returns True.

    Args:
        manager: vLLM's, with its LoRA layers.
        runner: vLLM's model runner.
        model: the model's folder, or its name on the hub. None if vLLM filled in random weights (`--load-format
            dummy`): there is nothing to compare, and no answer means anything.
        revision: on the hub.
        dtype: the engine's.
    """

    def __init__(
        self, manager: LoRAModelManager, runner: Any, model: str | None, revision: str | None, dtype: torch.dtype
    ):
        self._manager, self._runner, self._dtype = manager, runner, dtype
        self._model, self._revision = model, revision
        self._layers = targets.linear_layers(manager)
        self._shapes = targets.layer_shapes(manager)
        self._calls: Calls | None = None
        self._called: set[str] = set()
        self._waiting = list(self._layers)
        self._weights: BaseWeights | None = None
        self._problems: dict[str, str] = dict.fromkeys(self._shapes, UNCHECKED)  # of modules, by vLLM's names
        self._unnamed: list[tuple[str, LayerPart]] = []  # layer, part of it that the files do not name

    def problem(self, module: str) -> str | None:
        """Returns why the effect of an adapter on a module, by vLLM's name, is not proven. None if it is."""
        return self._problems.get(module)

    def is_any_proven(self, layer: str) -> bool:
        """Whether something is proven of a layer, by vLLM's name."""
        return any(self.problem(module) is None for module in targets.members(self._manager, layer))

    def start_recording(self) -> None:
        self._calls = Calls(self._layers, self._manager.model, self._runner)
        self._calls.start()

    def begin_step(self, tokens: int, requests: int) -> None:
        """Call it at the beginning of every step."""
        if self._calls is not None:
            self._calls.begin_step(tokens, requests)

    def recorded(self) -> set[str]:
        """Returns the kinds of steps that have been recorded."""
        return self._calls.kinds() if self._calls is not None else set()

    def stop_recording(self) -> None:
        if self._calls is not None:
            self._called, self._calls = self._calls.stop(), None

    def compare(self, elements: int) -> bool:
        """Compares the next layers with the model's files.

        Args:
            elements: stop after layers with this many weights, so that requests do not wait long.

        Returns:
            Whether all layers have been compared.
        """
        if self._model is None:
            self._problems = {module: NOT_CALLED for name in self._uncalled() for module in self._members(name)}
            return True
        if self._weights is None:
            self._weights = BaseWeights(self._manager.model, self._model, self._revision)
        while self._waiting and elements > 0:
            name = self._waiting.pop(0)
            elements -= self._layers[name].input_size * sum(self._layers[name].output_slices)
            try:
                self._compare_layer(name, self._weights)
            except Exception as error:  # whatever a layer of vLLM raises: it cannot be checked then
                reason = f"vLLM's layer cannot be checked ({type(error).__name__}: {error})"
                self._problems.update(dict.fromkeys(self._members(name), reason))
        if self._waiting:
            return False
        for name, part in self._unnamed:
            self._find_copies(name, part)
        self._unnamed = []
        self._weights.close()
        return True

    def _uncalled(self) -> list[str]:
        return [name for name in self._layers if name not in self._called]

    def _members(self, name: str) -> list[str]:
        """Returns the modules in a layer that have a shape. None if vLLM splits the layer differently."""
        return [member for member in targets.members(self._manager, name) if member in self._shapes]

    def _parts(self, name: str) -> list[LayerPart]:
        return parts.layer_parts(self._manager, name, self._layers[name], {m: m for m in self._members(name)})

    def _compare_layer(self, name: str, weights: BaseWeights) -> None:
        layer, held = self._layers[name], self._parts(name)
        reasons: dict[str, str | None] = dict.fromkeys(
            self._members(name), None if name in self._called else NOT_CALLED
        )
        if not held or any(reasons.values()):
            self._problems.update({module: reason for module, reason in reasons.items() if reason})
            return
        x, y, bias = products(layer, held[0].columns, self._dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for part in held:
            reason = reasons[part.module] or weights.problem(part.module, self._shapes[part.module])
            if part.module not in weights:
                self._unnamed.append((name, part))
            if reason is None:
                runs = _sample(*part.rows, generator)
                outputs = torch.cat([torch.arange(*run) for run in runs]) + (part.offset - part.rows[0])
                expected = weights.rows(part.module, runs, part.columns).to(self._dtype)
                if not same_rows(x, y[:, outputs], bias[outputs], expected, _tolerance(layer, self._dtype)):
                    reason = OTHER_ROWS
            reasons[part.module] = reason
        for module, reason in reasons.items():
            if reason is None:
                del self._problems[module]
            else:
                self._problems[module] = reason

    def _find_copies(self, name: str, unnamed: LayerPart) -> None:
        """Refuses the modules whose rows a part that the files do not name repeats.

        transformers then uses the module's output twice; in vLLM the delta would reach one of the two.
        """
        parent = unnamed.module.rpartition(".")[0]
        mine = _rows_of(products(self._layers[name], unnamed.columns, self._dtype)[1], unnamed)
        for other in self._layers:
            held = [part for part in self._parts(other) if part.module.rpartition(".")[0] == parent]
            held = [part for part in held if part.columns == unnamed.columns and self.problem(part.module) is None]
            if held:
                y = products(self._layers[other], unnamed.columns, self._dtype)[1]
            for part in held:
                if share_a_row(mine, _rows_of(y, part)):
                    copy = unnamed.module.rpartition(".")[2]
                    self._problems[part.module] = f"vLLM uses a copy of its weight as {copy}, without the adapter"


def products(
    layer: BaseLinearLayerWithLoRA, columns: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes a layer's products with random vectors, without adapters. The vectors depend on the columns only.

    Returns:
        The vectors (n, d_in), the products without the bias (n, d_out), and the bias (d_out,), all float64.
    """
    generator = torch.Generator().manual_seed(columns[0])
    signs = torch.randint(0, 2, (_VECTORS, columns[1] - columns[0]), generator=generator) * 2 - 1
    x = torch.cat([signs, torch.zeros_like(signs[:1])]).to(dtype)
    changed: Any = layer
    stock = changed.punica_wrapper
    changed.punica_wrapper, changed._apply_lora_to_output = _NoLora(), lambda _x, output: output
    try:
        with torch.inference_mode():
            y = layer.apply(x.to(layer.device)).double().cpu()
    finally:
        changed.punica_wrapper = stock
        del changed._apply_lora_to_output
    return signs.double(), y[:-1] - y[-1], y[-1]


class _NoLora:
    """Takes the place of vLLM's LoRA products. Does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **named: None


def same_rows(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, tolerance: float) -> bool:
    """Whether y (n, rows) is x (n, d_in) times the rows of a weight (rows, d_in).

    Args:
        bias: (rows,), which was added to y and subtracted again, and adds to the rounding error.
        tolerance: of a row's error, relative to the size of its products.
    """
    weight = weight.double()
    error = (y - x @ weight.T).square().mean(0).sqrt()
    return bool((error <= tolerance * (weight.norm(dim=1) + bias.abs())).all())


def share_a_row(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether products (n, rows) of two weights with the same vectors have a row other than zero in common."""
    size = one.norm(dim=0)
    near = torch.cdist(one.T, other.T) <= _SAME * size.unsqueeze(1)
    return bool(near[size > 0].any())


def _rows_of(y: torch.Tensor, part: LayerPart) -> torch.Tensor:
    return y[:, part.offset : part.offset + part.rows[1] - part.rows[0]]


def _sample(first: int, stop: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Returns runs of rows, spread at random over all of them; all rows if there are few."""
    if stop - first <= _ROWS:
        return [(first, stop)]
    edges = torch.linspace(first, stop, _ROWS // _RUN + 1).long().tolist()
    runs = []
    for begin, end in zip(edges, edges[1:], strict=False):
        start = int(torch.randint(begin, max(begin, end - _RUN) + 1, (1,), generator=generator))
        runs.append((start, min(start + _RUN, end)))
    return runs


def _tolerance(layer: BaseLinearLayerWithLoRA, dtype: torch.dtype) -> float:
    if isinstance(layer.base_layer.quant_method, UnquantizedLinearMethod):
        return 4 * torch.finfo(dtype).eps + 1e-3
    return _QUANTIZED_TOLERANCE
