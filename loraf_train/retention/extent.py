"""How much is gathered and stored of a task, without torch, so that `check` can say it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

DIRECTIONS = 16  # of G that are stored
EXAMPLES = 128  # of a task's training that statistics are gathered from, at most
ROUNDS = 2  # probes of each completion token


def stored_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Returns the size of a file of statistics without its header.

    Args:
        shapes: module → (d_out, rank).
    """
    total = 0
    for d_out, rank in shapes.values():
        k = min(DIRECTIONS, d_out)
        total += d_out * (k + 2) + 4 * k + rank * (rank + 1)
    return total
