"""The compiled kernel: one call per layer. csrc/delta.cpp describes the computation, csrc/layer.h the memory layout."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from loraf.system import pages
from loraf_serve.kernels import cpu_library
from loraf_serve.kernels.operand import BatchWeights, Extent, Operand, Part

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/layer.h
RANK_LIMIT = (1 << 16) - 1  # the lengths of a sheet are uint16, and a row may have as many nonzeros as its rank


class _TaskSource(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "cols", "values")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("row_bytes", "col_bytes", "value_kind", "reserved")),
    ]


class _PartSource(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rank", "first_row", "stop_row", "offset")),
        ("tasks", ctypes.POINTER(_TaskSource)),
        ("ends", ctypes.c_void_p),
    ]


class _LayerSource(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("d_in", "tasks", "parts")),
        *((name, ctypes.c_int32) for name in ("kind", "reserved")),
        ("part", ctypes.POINTER(_PartSource)),
    ]


class NativeOperand(Operand):
    """An operand of the compiled kernel.

    Args:
        parts: of one layer.
        library: by default the one next to this file.
        variant: name of an instruction set; by default the best that this processor runs.

    Raises:
        ValueError: the parts do not fit together or are too large, or the library or variant cannot be used.
    """

    def __init__(
        self, parts: Sequence[Part], library: cpu_library.CpuLibrary | None = None, variant: str | None = None
    ):
        self._extent = Extent.of(parts)
        try:
            library = cpu_library.load() if library is None else library
        except cpu_library.NotUsable as error:
            raise ValueError(f"the native kernel cannot be used: {error}") from error
        variant = next(reversed(library.variants)) if variant is None else variant
        if variant not in library.variants:
            raise ValueError(f"this processor runs {', '.join(library.variants)}, not {variant!r}")
        rank = max(part.rank for part in parts)
        if rank > RANK_LIMIT:
            raise ValueError(f"rank {rank} is above the native kernel's limit of {RANK_LIMIT}")
        self.variant = variant
        self._number = library.variants[variant]
        self._add_delta = library.add_delta
        self._memory = _pack(parts, self._extent, library)
        self._address = self._memory.data_ptr()
        self.nbytes = self._memory.nbytes

    def add_delta(self, y: torch.Tensor, x: torch.Tensor, batch: BatchWeights) -> None:
        y_stride, x_stride = self._extent.check(y, x, batch)
        if not batch.count:
            return
        failed = self._add_delta(
            self._number,
            self._address,
            y.data_ptr(),
            y_stride,
            x.data_ptr(),
            x_stride,
            batch.indices_address,
            batch.weights_address,
            batch.count,
        )
        if failed:
            raise MemoryError("not enough memory for the kernel's scratch space")


def _pack(parts: Sequence[Part], extent: Extent, library: cpu_library.CpuLibrary) -> torch.Tensor:
    """Returns the packed layer, (nbytes,) uint8."""
    tensors: list[torch.Tensor] = []  # kept alive until the library has read them

    def address(tensor: torch.Tensor) -> int:
        tensors.append(tensor.contiguous())
        return tensors[-1].data_ptr()

    sources = (_PartSource * len(parts))()
    for source, part in zip(sources, parts, strict=True):
        tasks = (_TaskSource * len(part.tasks))()
        for task, b in zip(tasks, part.tasks, strict=True):
            task.rows, task.cols, task.values = address(b.rows), address(b.cols), address(b.values)
            task.count, task.value_kind = len(b.values), KINDS[b.values.dtype]
            task.row_bytes, task.col_bytes = b.rows.element_size(), b.cols.element_size()
        source.a, source.rank, source.offset = address(part.a), part.rank, part.offset
        source.first_row, source.stop_row = part.first_row, part.stop_row
        source.tasks = tasks
        source.ends = address(torch.empty(len(part.tasks) * (part.d_out + 1), dtype=torch.int64))
    layer = _LayerSource(extent.d_in, extent.tasks, len(parts), KINDS[extent.dtype], 0, sources)
    counters = torch.zeros(max(part.rank for part in parts) + 2, dtype=torch.int32)  # scratch
    nbytes = library.measure(ctypes.byref(layer), counters.data_ptr())
    if nbytes < 0:
        raise ValueError("B of a part takes more than 64 GiB")
    memory = pages(nbytes)  # page-aligned; the library needs 64 bytes
    library.pack(ctypes.byref(layer), counters.data_ptr(), memory.data_ptr())
    return memory
