"""The rows of a step on a GPU, at one address for good: written before a step, read by every layer of it.

    memory    number of entries | entries | row numbers | groups of tasks and their weights, entry by entry

All are int32, but the weights float32 in the same memory.

Rows of one adapter that have the same weights become an entry of their own where they are many, or all that there are:
`triton_ops.expand` treats them as one. The others of an adapter are one entry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from loraf_serve.kernels.operand import Rows
from loraf_serve.kernels.triton_ops import ENTRY, TASKS

OWN_ENTRY = 64  # rows with the same weights
MOST_SPLITS = 8  # of the sum of a `shrink`
_MANY = 8192  # rows that need no splits
_WAITING = 4  # copies to the device that may be under way at once


class DeviceRows:
    """
    Args:
        device: of the steps.
        rows: at most in a step.
        tasks: at most of an adapter.
        width: at most, of the A of a layer: rank × parts.
        adapters: at most at once.

    Attributes:
        step, numbers: the memory, as int32 and as float32.
        z: float32 scratch of a layer between its two kernels.
    """

    def __init__(self, device: torch.device, rows: int, tasks: int, width: int, adapters: int):
        self.device, self.rows = device, rows
        self._entries = rows // OWN_ENTRY + adapters
        self._order_at = 1 + ENTRY * self._entries
        self._free_at = self._order_at + rows
        # A group has two numbers and a weight in each row, and there are no more groups than tasks.
        size = self._free_at + rows * tasks + 3 * tasks * self._entries
        self.step = torch.zeros(size, dtype=torch.int32, device=device)
        self.numbers = self.step.view(torch.float32)
        z_rows = min(MOST_SPLITS * rows, rows + _MANY)
        self.z = torch.empty(z_rows * width, dtype=torch.float32, device=device)
        self._sent: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def set(self, acting: Sequence[tuple[int, Rows]]) -> None:
        """Writes which rows an adapter acts on, in the order of the device's other work.

        Args:
            acting: the slot of each adapter that acts, and its rows.

        Raises:
            ValueError: more rows or adapters than there is room for.
        """
        host = self._host()
        step = host.numpy()
        numbers = step.view(np.float32)
        count, order, free = 0, self._order_at, self._free_at
        for slot, rows in acting:
            indices, weights = rows.indices.numpy(), rows.weights.numpy()
            for chosen, equal in _entries(weights):
                listed, of_row = _groups(weights[chosen[:1]] if equal else weights[chosen])
                size, at_weight = len(chosen), free + 2 * len(listed)
                end = at_weight + of_row.size
                if count >= self._entries or order + size > self._free_at or end > len(step) or rows.stop > self.rows:
                    raise ValueError(f"a step of more than {self.rows} rows, or of more adapters than was said")
                stride = 0 if equal else len(listed)
                at = 1 + ENTRY * count
                step[at : at + ENTRY] = (
                    *(slot, size, order, order - self._order_at),
                    *(free, len(listed), at_weight, stride),
                )
                step[order : order + size] = indices[chosen]
                step[free:at_weight] = listed.reshape(-1)
                numbers[at_weight:end] = of_row.reshape(-1)
                count, order, free = count + 1, order + size, end
        step[0] = count
        self._send(host, free if count else 1)

    def _host(self) -> torch.Tensor:
        """Memory of the host that no copy reads any more."""
        if self.device.type == "cpu":
            return self.step
        if len(self._sent) < _WAITING:
            return torch.zeros(len(self.step), dtype=torch.int32, pin_memory=True)
        host, sent = self._sent.popleft()
        sent.synchronize()
        return host

    def _send(self, host: torch.Tensor, used: int) -> None:
        if host is self.step:
            return
        self.step[:used].copy_(host[:used], non_blocking=True)
        sent = torch.cuda.Event()
        sent.record()
        self._sent.append((host, sent))


def _entries(weights: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """The numbers of the rows of each entry, and whether these have the same weights. Args: weights (m, T)."""
    if not len(weights):
        return []
    # A request's tokens stand together, so only where the weights change is there something to compare.
    changes = np.flatnonzero((weights[1:] != weights[:-1]).any(1)) + 1
    heads = weights[np.concatenate([[0], changes])]
    _, which = np.unique(heads, axis=0, return_inverse=True)
    of_row = np.repeat(which.reshape(-1), np.diff(np.concatenate([[0], changes, [len(weights)]])))
    sizes = np.bincount(of_row)
    if len(sizes) == 1:
        return [(np.arange(len(weights)), True)]
    alone = [kind for kind, size in enumerate(sizes) if size >= OWN_ENTRY]
    found = [(np.flatnonzero(of_row == kind), True) for kind in alone]
    rest = np.flatnonzero(~np.isin(of_row, alone))
    return found + ([(rest, False)] if len(rest) else [])


def _groups(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tasks of the same weights, a plane of them at a time; those of weight zero are left out.

    Args:
        weights: (rows, T).

    Returns:
        (groups, 2) int32: the plane, and the bits of the tasks in it; (rows, groups) float32: the weights.
    """
    columns, which = np.unique(weights, axis=1, return_inverse=True)
    of_task, tasks = which.reshape(-1), np.arange(weights.shape[1])
    found = []
    for kind in np.flatnonzero(columns.any(0)):
        mine = tasks[of_task == kind]
        for plane in np.unique(mine // TASKS):
            bits = np.bitwise_or.reduce(1 << (mine[mine // TASKS == plane] % TASKS))
            found.append((plane, bits, kind))
    listed = np.array([entry[:2] for entry in found], dtype=np.int32).reshape(-1, 2)
    return listed, np.ascontiguousarray(columns[:, [kind for *_, kind in found]], dtype=np.float32)
