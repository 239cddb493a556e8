"""The GPU kernel: two or three launches per layer serve all adapters. triton_ops.py describes what they compute.

B of all tasks is one dense matrix, plus two bytes at each position for the task that owns it (two for every 16 tasks if
there are more). It is read once per step, regardless of the task sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton

from loraf_serve.kernels import triton_ops
from loraf_serve.kernels.device_weights import MAX_SPLITS, DeviceWeights
from loraf_serve.kernels.operand import BatchWeights, Extent, Operand, Part

_OUTPUTS = 64  # outputs of a tile
_RANKS = 64  # ranks of a chunk
_RANK_MULTIPLE = 16  # ranks are rounded up to a multiple of it, the least that a tensor core multiplies


class Layer:
    """The limits that a layer's launches are built for, independent of the adapters that are loaded.

    Args:
        bands: (first column, number of columns) of y that a part of an adapter may add to; they do not overlap.
        rank, tasks: maximum rank and number of tasks of an adapter.
        device: where the layer computes.

    Attributes:
        width: maximum number of columns of z.
        rows: of B.
        first_rows: first column of each band → its first row of B.
        tiles: (tiles, TILE) int32, see triton_ops.
        aligned: whether every band begins at a multiple of 16.
    """

    def __init__(self, bands: Sequence[tuple[int, int]], rank: int, tasks: int, device: torch.device):
        self.bands, self.rank, self.tasks, self.device = tuple(bands), _rounded(rank), tasks, device
        self.width = self.rank * len(bands)
        self.first_rows: dict[int, int] = {}
        tiles: list[tuple[int, int, int, int]] = []
        first = 0
        for number, (offset, columns) in enumerate(bands):
            self.first_rows[offset] = first
            tiles += [
                (offset + at, min(_OUTPUTS, columns - at), number, first + at) for at in range(0, columns, _OUTPUTS)
            ]
            first += columns
        self.rows = first
        self.aligned = all(offset % 16 == 0 for offset, _ in bands)
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device)


class TritonOperand(Operand):
    """An operand of the GPU kernel.

    Args:
        parts: of one layer. The positions of its tasks must not overlap. B is held in the dtype of A.
        layer: the layer of the parts; by default one built for these parts alone.

    Attributes:
        record: the operand's numbers in the `AdapterTable`, see triton_ops.

    Raises:
        ValueError: the parts do not fit together or into the layer, or two tasks own the same position.
    """

    def __init__(self, parts: Sequence[Part], layer: Layer | None = None):
        self._extent = Extent.of(parts)
        rank = _rounded(max(part.rank for part in parts))
        tasks, dtype = self._extent.tasks, self._extent.dtype
        layer = layer or Layer([(part.offset, part.d_out) for part in parts], rank, tasks, default_device())
        self._layer, self.device = layer, layer.device
        limits = (("rank", rank, layer.rank), ("tasks", tasks, max(layer.tasks, triton_ops.TASKS)))
        for name, value, limit in limits:
            if value > limit:
                raise ValueError(f"{name}: {value} is above the layer's limit of {limit}")
        band_numbers = {band: number for number, band in enumerate(layer.bands)}
        self._a = torch.zeros(rank * len(band_numbers), self._extent.d_in, dtype=dtype, device=self.device)
        self._b = torch.zeros(layer.rows, rank, dtype=dtype, device=self.device)
        planes = triton.cdiv(tasks, triton_ops.TASKS)
        self._owner = torch.zeros(planes, *self._b.shape, dtype=torch.int16, device=self.device)
        for part in parts:
            number = band_numbers.get((part.offset, part.d_out))
            if number is None:
                columns = f"columns {part.offset} to {part.offset + part.d_out}"
                raise ValueError(f"{columns} are not one of the layer's bands, {layer.bands}")
            self._a[number * rank : number * rank + part.rank] = part.a.to(self.device)
            self._scatter(part, layer.first_rows[part.offset])
        tensors = (self._a, self._b, self._owner)
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self.record = (*(tensor.data_ptr() for tensor in tensors), len(self._a), rank, 0, 0, 0)
        if self.device.type == "cuda":
            # Other streams will read the tensors, so they must be complete before the operand is published.
            torch.cuda.current_stream(self.device).synchronize()

    def _scatter(self, part: Part, first: int) -> None:
        """Writes B of all tasks of a part into the rows from `first` on."""
        b, owner = self._b[first : first + part.d_out], self._owner[:, first : first + part.d_out]
        taken = torch.zeros(b.shape, dtype=torch.bool, device=self.device)
        for number, task in enumerate(part.tasks):
            rows = task.rows.to(self.device).to(torch.int64) - part.first_row
            inside = (rows >= 0) & (rows < part.d_out)
            coordinates = (rows[inside], task.cols.to(self.device).to(torch.int64)[inside])
            if taken[coordinates].any():
                raise ValueError(f"task {number} has positions that an earlier task owns")
            taken[coordinates] = True
            b[coordinates] = task.values.to(self.device)[inside].to(b.dtype)
            bit = 1 << number % triton_ops.TASKS
            owner[number // triton_ops.TASKS][coordinates] = bit - (bit >> 15 << 16)  # as a signed number

    def add_delta(self, y: torch.Tensor, x: torch.Tensor, batch: BatchWeights) -> None:
        self._extent.check(y, x, batch)
        if not batch.count:
            return
        step = DeviceWeights(self.device, len(x), batch.tasks, self._layer.width, 1)
        step.set([(0, batch)])
        records = torch.tensor([self.record], dtype=torch.int64, device=self.device)
        add_deltas(y, x, step, records, self._layer)


class AdapterTable:
    """The operands of all adapters in all layers: on the device, at a fixed address.

    Args:
        layers: names.
        adapters: maximum number at once.
    """

    def __init__(self, layers: Sequence[str], adapters: int, device: torch.device):
        self._layer_numbers = {name: i for i, name in enumerate(layers)}
        self._records = torch.zeros(len(layers), adapters, triton_ops.RECORD, dtype=torch.int64, device=device)
        self._indices: dict[str, int] = {}
        self._operands: dict[str, Mapping[str, TritonOperand]] = {}  # keeps alive the memory that records point to

    def of(self, layer: str) -> torch.Tensor:
        """Returns a layer's records for its launches, (adapters, RECORD) int64."""
        return self._records[self._layer_numbers[layer]]

    def holds(self, adapter: str) -> bool:
        return adapter in self._indices

    def index(self, adapter: str) -> int:
        return self._indices[adapter]

    def free(self) -> int:
        """Returns how many more adapters fit."""
        return self._records.shape[1] - len(self._indices)

    def put(self, adapter: str, operands: Mapping[str, TritonOperand]) -> None:
        """Adds an adapter. `operands`: layer → operand.

        Raises:
            ValueError: the table is full.
        """
        if not self.free():
            raise ValueError(f"the GPU's adapter table is full with {len(self._indices)} adapters")
        index = next(i for i in range(self._records.shape[1]) if i not in self._indices.values())
        records = torch.zeros(self._records.shape[0], triton_ops.RECORD, dtype=torch.int64)
        for name, operand in operands.items():
            records[self._layer_numbers[name]] = torch.tensor(operand.record)
        self._records[:, index] = records.to(self._records.device)
        self._indices[adapter], self._operands[adapter] = index, operands

    def remove(self, adapter: str) -> None:
        """Call it only when no step that the adapter acts in is running."""
        self._records[:, self._indices.pop(adapter)] = 0
        del self._operands[adapter]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU Triton interprets


@dataclass(frozen=True)
class Launch:
    """How a layer's work is divided into programs.

    Attributes:
        shrink_rows, ranks, columns: rows of x, rows of A and columns of A that a program of `shrink` handles at a time.
        splits: the number of partial sums of `shrink`.
        gather: whether a separate launch adds the splits, instead of every program of `expand`.
        expand_rows: rows of y that a program of `expand` handles at a time.
        groups: programs of `expand` that share the rows.
        terms: see triton_ops.
        registers: maximum number for a thread of `expand`; None for no limit.
        early: whether `expand` starts while `shrink` runs (programmatic dependent launch, from Hopper on).
    """

    shrink_rows: int
    ranks: int
    columns: int
    splits: int
    gather: bool
    expand_rows: int
    groups: int
    terms: int
    early: bool
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4
    registers: int | None = 128


def launch_for(n: int, d_in: int, layer: Layer, step: DeviceWeights, dtype: torch.dtype) -> Launch:
    """Returns the launch for x (n, d_in) of a dtype, based on measurements on an H200 (benchmarks/gpu.py)."""
    few = n <= 64
    shrink_rows = 16 if n <= 16 else 32 if n < 1024 else 64
    ranks = min(16 if few else 32 if n < 1024 else 64, triton.next_power_of_2(layer.width))
    columns = 64 if dtype is torch.float32 or n >= 1024 else 128
    # With few rows most of the GPU would be idle unless the sums are split.
    programs = triton.cdiv(n, shrink_rows) * triton.cdiv(layer.width, ranks)
    room = len(step.z) // (n * layer.width)
    splits = max(1, min(MAX_SPLITS, room, (128 if few else 400) // programs, d_in // (2 * columns)))
    expand_rows = 16 if n <= 16 else 32 if n <= 32 else 64
    return Launch(
        shrink_rows=shrink_rows,
        ranks=ranks,
        columns=columns,
        splits=splits,
        gather=splits > 1 and not few,
        expand_rows=expand_rows,
        groups=min(triton.cdiv(n, expand_rows), max(1, triton.cdiv(1024, len(layer.tiles)))),
        terms=3 if n <= 16 else 2 if few or dtype is not torch.bfloat16 else 1,
        registers=128 if n <= 16 else None,
        shrink_stages=5 if n <= 16 else 3,
        early=_is_hopper(step.device),
    )


def add_deltas(
    y: torch.Tensor,
    x: torch.Tensor,
    step: DeviceWeights,
    records: torch.Tensor,
    layer: Layer,
    launch: Launch | None = None,
) -> None:
    """Adds to y the delta of every adapter that acts in the step, always with the same two or three launches.

    Args:
        y: (n, columns), last dimension contiguous; n is at most the rows of `step`.
        x: (n, d_in) in the same dtype, last dimension contiguous.
        records: of this layer, from `AdapterTable.of`.
        layer: not wider than `step`.

    Raises:
        ValueError: z does not fit the scratch memory of `step`.
    """
    n, d_in = x.shape
    launch = launch or launch_for(n, d_in, layer, step, x.dtype)
    shrink(x, step, records, layer, launch)
    expand(y, step, records, layer, launch)


def shrink(x: torch.Tensor, step: DeviceWeights, records: torch.Tensor, layer: Layer, launch: Launch) -> None:
    """Computes z, the first part of `add_deltas`."""
    n, d_in = x.shape
    if launch.splits * n * layer.width > len(step.z):
        raise ValueError(f"z of {n} rows in {launch.splits} splits of {layer.width} columns exceeds the step's scratch")
    span = triton.cdiv(triton.cdiv(d_in, launch.splits), launch.columns) * launch.columns
    triton_ops.shrink[(triton.cdiv(n, launch.shrink_rows), triton.cdiv(layer.width, launch.ranks), launch.splits)](
        x,
        x.stride(0),
        d_in,
        step.z,
        n * layer.width,
        layer.width,
        step.step,
        records,
        span,
        ROWS=launch.shrink_rows,
        RANKS=launch.ranks,
        COLUMNS=launch.columns,
        EARLY=launch.early,
        num_warps=launch.shrink_warps,
        num_stages=launch.shrink_stages,
    )


def expand(y: torch.Tensor, step: DeviceWeights, records: torch.Tensor, layer: Layer, launch: Launch) -> None:
    """Adds to y, the second part of `add_deltas`."""
    early = {"launch_pdl": True} if launch.early else {}
    splits = launch.splits
    if launch.gather:
        size, block = len(y) * layer.width, 1024
        triton_ops.gather[(triton.cdiv(size, block),)](step.z, size, splits, block, launch.early, **early)
        splits = 1
    ranks = min(_RANKS, triton.next_power_of_2(layer.rank))
    chunks = triton.cdiv(layer.rank, ranks)
    triton_ops.expand[(len(layer.tiles), launch.groups)](
        y,
        y.stride(0),
        step.z,
        len(y) * layer.width,
        layer.width,
        step.step,
        step.step_floats,
        records,
        layer.tiles,
        layer.rows,
        ROWS=launch.expand_rows,
        OUTPUTS=_OUTPUTS,
        RANKS=ranks,
        CHUNKS=chunks,
        ONCE=chunks == 1 and layer.tasks <= triton_ops.TASKS,
        SPLITS=splits,
        TERMS=launch.terms,
        ALIGNED=layer.aligned,
        EARLY=launch.early,
        num_warps=launch.expand_warps,
        num_stages=1,
        maxnreg=launch.registers,
        **early,
    )


def _rounded(rank: int) -> int:
    return -(-rank // _RANK_MULTIPLE) * _RANK_MULTIPLE


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
