"""The weights of a step on a GPU, at a fixed address: written before the step, read by each of its layers.

    memory    number of entries | entries | row indices | groups of tasks and their weights, entry by entry

All are int32 except for the weights, which are float32 in the same memory.

Rows of one adapter with equal weights form an entry if there are many of them, or no others: `triton_ops.expand` then
reads their weights once. The adapter's remaining rows form one more entry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from loraf_serve.kernels.operand import BatchWeights
from loraf_serve.kernels.triton_ops import ENTRY, TASKS

_ENTRY_ROWS = 64  # rows with equal weights that get an entry
MAX_SPLITS = 8  # of the sum in `shrink`
_UNSPLIT_ROWS = 8192  # rows that need no splits
_HOST_BUFFERS = 4  # copies to the device that may be in flight at once


class DeviceWeights:
    """The weights of a step on one device, and scratch memory for z.

    Args:
        device: where the steps run.
        rows: maximum number in a step.
        tasks: maximum number in an adapter.
        width: maximum number of rows of A in a layer, rank × parts.
        adapters: maximum number in a step.

    Attributes:
        step: the memory as int32.
        step_floats: the same memory as float32.
        z: float32 scratch of a layer between `shrink` and `expand`.
    """

    def __init__(self, device: torch.device, rows: int, tasks: int, width: int, adapters: int):
        self.device, self.rows = device, rows
        self._entries = rows // _ENTRY_ROWS + adapters
        self._rows_at = 1 + ENTRY * self._entries
        self._groups_at = self._rows_at + rows
        # A group has two numbers and a weight for each row, and there are no more groups than tasks.
        size = self._groups_at + rows * tasks + 3 * tasks * self._entries
        self.step = torch.zeros(size, dtype=torch.int32, device=device)
        self.step_floats = self.step.view(torch.float32)
        z_rows = min(MAX_SPLITS * rows, rows + _UNSPLIT_ROWS)
        self.z = torch.empty(z_rows * width, dtype=torch.float32, device=device)
        self._in_flight: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def set(self, acting: Sequence[tuple[int, BatchWeights]]) -> None:
        """Writes the rows and weights of each adapter, ordered with the device's other work.

        Args:
            acting: (index in the `AdapterTable`, its rows) of each adapter that acts in the step.

        Raises:
            ValueError: more rows or adapters than the memory holds.
        """
        host = self._host_buffer()
        step = host.numpy()
        floats = step.view(np.float32)
        count, rows_at, groups_at = 0, self._rows_at, self._groups_at
        for adapter, batch in acting:
            indices, weights = batch.indices.numpy(), batch.weights.numpy()
            for members, equal in _entries(weights):
                groups, group_weights = _groups(weights[members[:1]] if equal else weights[members])
                size, weights_at = len(members), groups_at + 2 * len(groups)
                end = weights_at + group_weights.size
                if (
                    count >= self._entries
                    or rows_at + size > self._groups_at
                    or end > len(step)
                    or batch.stop > self.rows
                ):
                    raise ValueError(f"the step has more than {self.rows} rows, or too many adapters")
                stride = 0 if equal else len(groups)
                at = 1 + ENTRY * count
                step[at : at + ENTRY] = (
                    *(adapter, size, rows_at, rows_at - self._rows_at),
                    *(groups_at, len(groups), weights_at, stride),
                )
                step[rows_at : rows_at + size] = indices[members]
                step[groups_at:weights_at] = groups.reshape(-1)
                floats[weights_at:end] = group_weights.reshape(-1)
                count, rows_at, groups_at = count + 1, rows_at + size, end
        step[0] = count
        self._send(host, groups_at if count else 1)

    def _host_buffer(self) -> torch.Tensor:
        """Returns host memory that no copy is reading."""
        if self.device.type == "cpu":
            return self.step
        if len(self._in_flight) < _HOST_BUFFERS:
            return torch.zeros(len(self.step), dtype=torch.int32, pin_memory=True)
        host, copied = self._in_flight.popleft()
        copied.synchronize()
        return host

    def _send(self, host: torch.Tensor, used: int) -> None:
        if host is self.step:
            return
        self.step[:used].copy_(host[:used], non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves its arguments untyped
        copied.record()
        self._in_flight.append((host, copied))


def _entries(weights: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """Groups an adapter's rows into entries.

    Args:
        weights: (m, T) float32.

    Returns:
        Of each entry: which of the m rows, (k,) int64, and whether they have equal weights.
    """
    if not len(weights):
        return []
    # A request's tokens are adjacent, so it is enough to compare rows where the weights change.
    changes = np.flatnonzero((weights[1:] != weights[:-1]).any(1)) + 1
    heads = weights[np.concatenate([[0], changes])]
    _, kinds = np.unique(heads, axis=0, return_inverse=True)
    kind_of_row = np.repeat(kinds.reshape(-1), np.diff(np.concatenate([[0], changes, [len(weights)]])))
    sizes = np.bincount(kind_of_row)
    if len(sizes) == 1:
        return [(np.arange(len(weights)), True)]
    large = [kind for kind, size in enumerate(sizes) if size >= _ENTRY_ROWS]
    entries = [(np.flatnonzero(kind_of_row == kind), True) for kind in large]
    remaining = np.flatnonzero(~np.isin(kind_of_row, large))
    return entries + ([(remaining, False)] if len(remaining) else [])


def _groups(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups tasks that have equal weights in every row, plane by plane. Omits tasks of weight zero.

    Args:
        weights: (rows, T) float32.

    Returns:
        (groups, 2) int32, the plane and the bits of its tasks; (rows, groups) float32, their weights.
    """
    columns, kinds = np.unique(weights, axis=1, return_inverse=True)
    kind_of_task, tasks = kinds.reshape(-1), np.arange(weights.shape[1])
    groups, group_kinds = [], []
    for kind in np.flatnonzero(columns.any(0)):
        members = tasks[kind_of_task == kind]
        for plane in np.unique(members // TASKS):
            groups.append((plane, np.bitwise_or.reduce(1 << (members[members // TASKS == plane] % TASKS))))
            group_kinds.append(kind)
    table = np.array(groups, dtype=np.int32).reshape(-1, 2)
    return table, np.ascontiguousarray(columns[:, group_kinds], dtype=np.float32)
