"""The resident backend on a GPU: everything that vLLM's CUDA graphs read keeps its address from the engine's start on.

A graph is captured with vLLM's warm-up adapters, before any checkpoint is loaded. So in every step with adapters each
layer launches the same kernels, and these read from device memory which adapters act.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from loraf.errors import BaseMismatch, Problem
from loraf_serve import kernels
from loraf_serve.kernels import triton_kernel
from loraf_serve.kernels.device_weights import DeviceWeights

if TYPE_CHECKING:
    from loraf.manifest import Manifest

_ADAPTERS = 256  # maximum at once; memory runs out long before
_TASKS = 16  # maximum of a checkpoint; more would slow down every step, see triton_ops


class Gpu:
    """The GPU kernel's memory in one worker.

    Args:
        bands: for each layer (first column, number of columns) of its output for every part that an adapter may have.
        rank: the largest rank of a checkpoint.
        rows: maximum number in a step.

    Attributes:
        acting: whether the step names an adapter, possibly only one of vLLM's warm-up.
    """

    def __init__(self, bands: Mapping[str, Sequence[tuple[int, int]]], rank: int, rows: int, device: torch.device):
        self._device, self._rank = device, rank
        self._layers = {name: triton_kernel.Layer(spans, rank, _TASKS, device) for name, spans in bands.items()}
        self._adapters = triton_kernel.AdapterTable(list(bands), _ADAPTERS, device)
        self._records = {name: self._adapters.of(name) for name in bands}
        width = max((layer.width for layer in self._layers.values()), default=1)
        self._step = DeviceWeights(device, rows, _TASKS, width, _ADAPTERS)
        self.acting = False
        # One stream for all loading threads, because torch reuses freed memory only on the stream that it was used on.
        self._loading: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._loading = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def require(self, manifest: Manifest, where: str) -> None:
        """Checks whether a checkpoint fits.

        Raises:
            BaseMismatch: the checkpoint exceeds the limits that the engine was started with.
        """
        problems = []
        if manifest.rank > self._rank:
            message = f"rank {manifest.rank} is beyond this engine's largest, {self._rank}"
            remedy = "pass this checkpoint as an --adapter at start, which raises the limit to its rank"
            problems.append(Problem(message, "rank", where, remedy))
        if len(manifest.tasks) > _TASKS:
            message = f"{len(manifest.tasks)} tasks exceed the {_TASKS} that the resident backend can serve on a GPU"
            remedy = "select fewer (--adapter CKPT@a+b), or serve with --backend slots"
            problems.append(Problem(message, "tasks", where, remedy))
        if problems:
            raise BaseMismatch(problems)

    def operand(self, layer: str, parts: Sequence[kernels.Part]) -> triton_kernel.TritonOperand:
        """Packs the parts of a layer."""
        return triton_kernel.TritonOperand(parts, self._layers[layer])

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Moves the calling thread's copies and checks to a separate stream, so that they overlap the engine's work."""
        if self._loading is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._loading):
            yield

    def put(self, digest: str, operands: Mapping[str, triton_kernel.TritonOperand]) -> None:
        """Makes a checkpoint available to steps. Idempotent."""
        if not self._adapters.holds(digest):
            self._adapters.put(digest, operands)

    def remove(self, digest: str) -> None:
        """Removes a checkpoint. Idempotent."""
        if not self._adapters.holds(digest):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a step that reads the operands may still be running
        self._adapters.remove(digest)
        self._step.set([])  # another adapter may take the index before the next step's weights are written

    def set_step(self, acting: bool, active: Sequence[tuple[str, kernels.BatchWeights]]) -> None:
        """Writes the weights of the next step.

        Args:
            acting: see the attribute.
            active: digest and batch weights of each adapter that acts.
        """
        self.acting = acting
        # Always written: vLLM may replay a graph that contains the kernels for a step without adapters.
        self._step.set([(self._adapters.index(digest), batch) for digest, batch in active])

    def add_deltas(self, layer: str, y: torch.Tensor, x: torch.Tensor) -> None:
        """Adds to y (n, d_out) the delta of every adapter that acts in the step."""
        if self.acting and self._layers[layer].bands:
            triton_kernel.add_deltas(y, x, self._step, self._records[layer], self._layers[layer])
