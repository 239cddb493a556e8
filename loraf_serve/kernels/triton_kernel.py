"""The kernel of a GPU: two or three launches a layer for all adapters at once; their meaning is in triton_ops.py.

B of all tasks stands as one dense matrix, with two bytes at each position for the task that owns it (more than 16
tasks: two for each 16), read once a step whatever the task sets are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton

from loraf_serve.kernels import triton_ops
from loraf_serve.kernels.device_rows import MOST_SPLITS, DeviceRows
from loraf_serve.kernels.operand import Extent, Operand, Part, Rows

_OUTPUTS = 64  # of a tile
_RANKS = 64  # of a piece
_STEP = 16  # ranks are rounded up to it: the least that a tensor core multiplies


class Layer:
    """What the launches of a layer are made for, whatever adapters are loaded.

    Args:
        bands: (first column, columns) of y that a part of an adapter may add to, none twice.
        rank, tasks: the most of an adapter.
        device: where the layer computes.

    Attributes:
        width: columns of z at most.
    """

    def __init__(self, bands: Sequence[tuple[int, int]], rank: int, tasks: int, device: torch.device):
        self.bands, self.rank, self.tasks, self.device = tuple(bands), _rounded(rank), tasks, device
        self.width = self.rank * len(bands)
        self.first_rows, tiles, first = {}, [], 0
        for number, (offset, columns) in enumerate(bands):
            self.first_rows[offset] = first
            tiles += [
                (offset + at, min(_OUTPUTS, columns - at), number, first + at) for at in range(0, columns, _OUTPUTS)
            ]
            first += columns
        self.rows = first  # of B
        self.aligned = all(offset % 16 == 0 for offset, _ in bands)
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device)


class TritonOperand(Operand):
    """
    Args:
        parts: of one layer. Positions of its tasks must not overlap. B is held in the dtype of A.
        layer: that the parts belong to; None: one made for these parts alone.

    Attributes:
        entry: the operand's numbers in a slot (see triton_ops).

    Raises:
        ValueError: parts that do not fit together or into the layer, tasks that overlap.
    """

    def __init__(self, parts: Sequence[Part], layer: Layer | None = None):
        self._extent = Extent.of(parts)
        rank = _rounded(max(part.rank for part in parts))
        tasks, dtype = self._extent.tasks, self._extent.dtype
        layer = layer or Layer([(part.offset, part.d_out) for part in parts], rank, tasks, default_device())
        self._layer, self.device = layer, layer.device
        for what, has, most in (("rank", rank, layer.rank), ("tasks", tasks, max(layer.tasks, triton_ops.TASKS))):
            if has > most:
                raise ValueError(f"{what}: {has} is more than the {most} that the layer was made for")
        numbers = {band: number for number, band in enumerate(layer.bands)}
        self._a = torch.zeros(rank * len(numbers), self._extent.d_in, dtype=dtype, device=self.device)
        self._b = torch.zeros(layer.rows, rank, dtype=dtype, device=self.device)
        planes = triton.cdiv(tasks, triton_ops.TASKS)
        self._owner = torch.zeros(planes, *self._b.shape, dtype=torch.int16, device=self.device)
        for part in parts:
            number = numbers.get((part.offset, part.d_out))
            if number is None:
                raise ValueError(f"columns {part.offset} to {part.offset + part.d_out} are no band of {layer.bands}")
            self._a[number * rank : number * rank + part.rank] = part.a.to(self.device)
            self._scatter(part, layer.first_rows[part.offset])
        held = (self._a, self._b, self._owner)
        self.nbytes = sum(tensor.nbytes for tensor in held)
        self.entry = (*(tensor.data_ptr() for tensor in held), len(self._a), rank, 0, 0, 0)
        if self.device.type == "cuda":
            # Other streams will read it: it must be there before anybody is told of it.
            torch.cuda.current_stream(self.device).synchronize()

    def _scatter(self, part: Part, first: int) -> None:
        """Puts B of all tasks of a part into rows `first` and on."""
        b, owner = self._b[first : first + part.d_out], self._owner[:, first : first + part.d_out]
        taken = torch.zeros(b.shape, dtype=torch.bool, device=self.device)
        for number, task in enumerate(part.tasks):
            rows = task.rows.to(self.device).to(torch.int64) - part.first_row
            inside = (rows >= 0) & (rows < part.d_out)
            at = (rows[inside], task.cols.to(self.device).to(torch.int64)[inside])
            if taken[at].any():
                raise ValueError(f"task {number} has positions that an earlier task owns")
            taken[at] = True
            b[at] = task.values.to(self.device)[inside].to(b.dtype)
            bit = 1 << number % triton_ops.TASKS
            owner[number // triton_ops.TASKS][at] = bit - (bit >> 15 << 16)  # as a signed number

    def add_delta(self, y: torch.Tensor, x: torch.Tensor, rows: Rows) -> None:
        self._extent.check(y, x, rows)
        if not rows.count:
            return
        step = DeviceRows(self.device, len(x), rows.tasks, self._layer.width, 1)
        step.set([(0, rows)])
        slots = torch.tensor([self.entry], dtype=torch.int64, device=self.device)
        add_deltas(y, x, step, slots, self._layer)


class Slots:
    """Which operand acts in which layer for the adapter in a slot: on the device, at one address for good.

    Args:
        layers: names.
        slots: adapters at most.
    """

    def __init__(self, layers: Sequence[str], slots: int, device: torch.device):
        self._number = {name: i for i, name in enumerate(layers)}
        self._table = torch.zeros(len(layers), slots, triton_ops.SLOT, dtype=torch.int64, device=device)
        self._used: dict[str, int] = {}
        self._held: dict[str, Mapping[str, Operand]] = {}  # whose memory the table speaks of

    def of(self, layer: str) -> torch.Tensor:
        """(slots, SLOT) int64: what the launches of a layer are given."""
        return self._table[self._number[layer]]

    def holds(self, adapter: str) -> bool:
        return adapter in self._used

    def slot(self, adapter: str) -> int:
        return self._used[adapter]

    def free(self) -> int:
        """Slots that no adapter has."""
        return self._table.shape[1] - len(self._used)

    def put(self, adapter: str, operands: Mapping[str, Operand]) -> None:
        """Raises ValueError if no slot is free."""
        if not self.free():
            raise ValueError(f"{len(self._used)} adapters are all that there is room for")
        slot = next(i for i in range(self._table.shape[1]) if i not in self._used.values())
        entries = torch.zeros(self._table.shape[0], triton_ops.SLOT, dtype=torch.int64)
        for name, operand in operands.items():
            entries[self._number[name]] = torch.tensor(operand.entry)
        self._table[:, slot] = entries.to(self._table.device)
        self._used[adapter], self._held[adapter] = slot, operands

    def remove(self, adapter: str) -> None:
        """To be called when no step that it acts in is under way."""
        self._table[:, self._used.pop(adapter)] = 0
        del self._held[adapter]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the latter: interpreted


@dataclass(frozen=True)
class Launch:
    """How a layer is cut into programs.

    Attributes:
        shrink_rows, ranks, columns, splits: of a program of `shrink`: rows of x, rows of A, columns of A at a time; and
            into how many its sums are cut.
        gather: the splits are added by a launch of their own, and not by every program of `expand`.
        expand_rows, groups: of a program of `expand`: rows of y; and programs that share all rows.
        terms: see triton_ops.
        registers: of a thread of `expand` at most; None: no limit.
        early: `expand` begins while `shrink` runs (programmatic dependent launch, from Hopper on).
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


def launch_for(n: int, d_in: int, layer: Layer, step: DeviceRows, dtype: torch.dtype) -> Launch:
    """The launch for x (n, d_in) of a dtype, by what was measured on an H200 (benchmarks/gpu.py)."""
    few = n <= 64
    shrink_rows = 16 if n <= 16 else 32 if n < 1024 else 64
    ranks = min(16 if few else 32 if n < 1024 else 64, triton.next_power_of_2(layer.width))
    columns = 64 if dtype is torch.float32 or n >= 1024 else 128
    # A few rows leave most of the GPU idle unless the sum is split.
    programs = triton.cdiv(n, shrink_rows) * triton.cdiv(layer.width, ranks)
    room = len(step.z) // (n * layer.width)
    splits = max(1, min(MOST_SPLITS, room, (128 if few else 400) // programs, d_in // (2 * columns)))
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
    step: DeviceRows,
    slots: torch.Tensor,
    layer: Layer,
    launch: Launch | None = None,
) -> None:
    """y += the delta of every adapter that acts in the step; two or three launches, whatever acts.

    Args:
        y: (n, columns), x: (n, d_in): of one dtype, last dimension contiguous; n at most the rows of `step`.
        slots: of this layer (`Slots.of`).
        layer: its width is at most that of `step`.
    """
    launch = launch or launch_for(*x.shape, layer, step, x.dtype)
    shrink(x, step, slots, layer, launch)
    expand(y, step, slots, layer, launch)


def shrink(x: torch.Tensor, step: DeviceRows, slots: torch.Tensor, layer: Layer, launch: Launch) -> None:
    """The first part of `add_deltas`: z."""
    n, d_in = x.shape
    if launch.splits * n * layer.width > len(step.z):
        raise ValueError(f"z of {n} rows in {launch.splits} splits of {layer.width} is more than there is room for")
    span = triton.cdiv(triton.cdiv(d_in, launch.splits), launch.columns) * launch.columns
    triton_ops.shrink[(triton.cdiv(n, launch.shrink_rows), triton.cdiv(layer.width, launch.ranks), launch.splits)](
        x,
        x.stride(0),
        d_in,
        step.z,
        n * layer.width,
        layer.width,
        step.step,
        slots,
        span,
        ROWS=launch.shrink_rows,
        RANKS=launch.ranks,
        COLUMNS=launch.columns,
        EARLY=launch.early,
        num_warps=launch.shrink_warps,
        num_stages=launch.shrink_stages,
    )


def expand(y: torch.Tensor, step: DeviceRows, slots: torch.Tensor, layer: Layer, launch: Launch) -> None:
    """The second: y."""
    early = {"launch_pdl": True} if launch.early else {}
    splits = launch.splits
    if launch.gather:
        size, numbers = len(y) * layer.width, 1024
        triton_ops.gather[(triton.cdiv(size, numbers),)](step.z, size, splits, numbers, launch.early, **early)
        splits = 1
    ranks = min(_RANKS, triton.next_power_of_2(layer.rank))
    pieces = triton.cdiv(layer.rank, ranks)
    triton_ops.expand[(len(layer.tiles), launch.groups)](
        y,
        y.stride(0),
        step.z,
        len(y) * layer.width,
        layer.width,
        step.step,
        step.numbers,
        slots,
        layer.tiles,
        layer.rows,
        ROWS=launch.expand_rows,
        OUTPUTS=_OUTPUTS,
        RANKS=ranks,
        PIECES=pieces,
        ONCE=pieces == 1 and layer.tasks <= triton_ops.TASKS,
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
    return -(-rank // _STEP) * _STEP


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
