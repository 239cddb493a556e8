"""The compiled kernel: one call a layer; its meaning is at the top of csrc/delta.cpp, its memory in csrc/layer.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from loraf.pages import pages
from loraf_serve.kernels import cpu_library
from loraf_serve.kernels.operand import Extent, Operand, Part, Rows

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/layer.h
RANK_LIMIT = 1 << 16


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
    """
    Args:
        parts: of one layer.
        built: the library; the one beside the package by default.
        variant: an instruction set by name; the best that this processor runs by default.

    Raises:
        ValueError: parts that do not fit together or are too large; a library or variant that cannot be used.
    """

    def __init__(self, parts: Sequence[Part], built: cpu_library.Library | None = None, variant: str | None = None):
        self._extent = Extent.of(parts)
        try:
            built = cpu_library.load() if built is None else built
        except cpu_library.NotUsable as error:
            raise ValueError(f"the native kernel cannot be used: {error}") from error
        variant = next(reversed(built.variants)) if variant is None else variant
        if variant not in built.variants:
            raise ValueError(f"this processor runs {', '.join(built.variants)}, not {variant!r}")
        if max(part.rank for part in parts) > RANK_LIMIT:
            raise ValueError(f"a rank above {RANK_LIMIT}")
        self.variant = variant
        self._number = built.variants[variant]
        self._call = built.add_delta
        self._memory = _pack(parts, self._extent, built)
        self._address = self._memory.data_ptr()
        self.nbytes = self._memory.nbytes

    def add_delta(self, y: torch.Tensor, x: torch.Tensor, rows: Rows) -> None:
        y_stride, x_stride = self._extent.check(y, x, rows)
        if not rows.count:
            return
        failed = self._call(
            self._number,
            self._address,
            y.data_ptr(),
            y_stride,
            x.data_ptr(),
            x_stride,
            rows.indices_address,
            rows.weights_address,
            rows.count,
        )
        if failed:
            raise MemoryError("no memory for the kernel's scratch space")


def _pack(parts: Sequence[Part], extent: Extent, built: cpu_library.Library) -> torch.Tensor:
    """(nbytes,) uint8: the packed layer."""
    kept: list[torch.Tensor] = []  # alive until the library has read them

    def address(tensor: torch.Tensor) -> int:
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

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
    place = torch.zeros(max(part.rank for part in parts) + 2, dtype=torch.int32)
    nbytes = built.measure(ctypes.byref(layer), place.data_ptr())
    if nbytes < 0:
        raise ValueError("B of a part takes more than 64 GiB")
    memory = pages(nbytes)  # aligned to 64 bytes and more
    built.pack(ctypes.byref(layer), place.data_ptr(), memory.data_ptr())
    return memory
