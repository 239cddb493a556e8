"""The resident backend on a GPU: what vLLM's CUDA graphs may see stands at one address from the engine's start.

A graph is captured with vLLM's warm-up adapters, before any checkpoint is loaded. So in a step that names any adapter
at all every layer launches the same kernels, and these read from the device's memory who acts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from loraf.errors import BaseMismatch, Problem
from loraf_serve import kernels
from loraf_serve.kernels import triton_kernel
from loraf_serve.kernels.device_rows import DeviceRows

if TYPE_CHECKING:
    from loraf.manifest import Manifest

_SLOTS = 256  # checkpoints; memory ends long before
_TASKS = 16  # of a checkpoint: more would cost every step, see triton_ops


class Gpu:
    """The kernel's memory of one worker.

    Args:
        bands: of each layer, the columns of its output that modules add to: (first, how many).
        rank: the largest of a checkpoint.
        rows: at most in a step.

    Attributes:
        acting: the step names an adapter.
    """

    def __init__(self, bands: Mapping[str, Sequence[tuple[int, int]]], rank: int, rows: int, device: torch.device):
        self._device, self._rank = device, rank
        self._layers = {name: triton_kernel.Layer(of, rank, _TASKS, device) for name, of in bands.items()}
        self._slots = triton_kernel.Slots(list(bands), _SLOTS, device)
        self._views = {name: self._slots.of(name) for name in bands}
        width = max((layer.width for layer in self._layers.values()), default=1)
        self._rows = DeviceRows(device, rows, _TASKS, width, _SLOTS)
        self.acting = False
        # One for all threads that load: what a checkpoint leaves free on a stream serves the next one there only.
        self._loading = torch.cuda.Stream(device) if device.type == "cuda" else None

    def require(self, manifest: Manifest, where: str) -> None:
        """Raises BaseMismatch: a checkpoint beyond what the engine was started for."""
        problems = []
        if manifest.rank > self._rank:
            message = f"rank {manifest.rank} is beyond this engine's largest, {self._rank}"
            remedy = "start the server with this checkpoint as an --adapter, which makes room for its rank"
            problems.append(Problem(message, "rank", where, remedy))
        if len(manifest.tasks) > _TASKS:
            message = f"{len(manifest.tasks)} tasks are more than the {_TASKS} that resident can serve on a GPU"
            problems.append(Problem(message, "tasks", where, "name fewer after @, or serve with --backend slots"))
        if problems:
            raise BaseMismatch(problems)

    def operand(self, layer: str, parts: Sequence[kernels.Part]) -> kernels.Operand:
        """Packs the parts of a layer."""
        return triton_kernel.TritonOperand(parts, self._layers[layer])

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Copies and checks of the calling thread run beside the engine's work, on a stream of their own."""
        if self._loading is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._loading):
            yield

    def put(self, digest: str, operands: Mapping[str, kernels.Operand]) -> None:
        """A digest that is there already is nothing."""
        if not self._slots.holds(digest):
            self._slots.put(digest, operands)

    def remove(self, digest: str) -> None:
        """A digest that is not there is nothing."""
        if not self._slots.holds(digest):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a step that reads the operands may still be under way
        self._slots.remove(digest)
        self._rows.set([])  # the slot may go to another before the next step's rows are written

    def step(self, acting: bool, active: Sequence[tuple[str, kernels.Rows]]) -> None:
        """Args: whether the step names an adapter, if only one of vLLM's warm-up; the rows of each that acts."""
        self.acting = acting
        # In any case: vLLM may replay a graph that holds the kernels for a step in which nobody acts.
        self._rows.set([(self._slots.slot(digest), rows) for digest, rows in active])

    def add_deltas(self, layer: str, y: torch.Tensor, x: torch.Tensor) -> None:
        """y (n, d_out) += the delta of every adapter that acts in the step."""
        if self.acting and self._layers[layer].bands:
            triton_kernel.add_deltas(y, x, self._rows, self._views[layer], self._layers[layer])
