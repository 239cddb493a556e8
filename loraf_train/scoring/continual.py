"""What a sequence of T tasks forgets and passes on, in four numbers.

R[i, j] is the score on task j when tasks 1 … i have been trained; row 0 is the bare model.

    average             mean over j of R[T, j]
    backward transfer   mean over j < T of R[T, j] − R[j, j]
    forgetting          mean over j < T of max over j ≤ i < T of R[i, j], less R[T, j]
    forward transfer    mean over j > 1 of R[j−1, j] − R[0, j]

The last three are sums over T − 1 tasks divided by T − 1. Of a metric that is better when lower the sign is turned and
the best is the least, so that a gain is positive as a transfer and a loss is positive as forgetting, whatever the
metric. Sources: Lopez-Paz and Ranzato, 2017 (average, both transfers); Chaudhry et al., 2018 (forgetting), whose
maximum also looks at the rows before task j was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Continual:
    """None: there are fewer than two tasks, or a cell that the number needs was not measured.

    Attributes:
        average: as measured; the others have the sign that the module describes.
    """

    average: float | None
    backward_transfer: float | None
    forgetting: float | None
    forward_transfer: float | None


def numbers(
    r: Mapping[tuple[int, int], float], tasks: Sequence[int], last: int, higher_is_better: bool = True
) -> Continual:
    """The four numbers of one matrix.

    Args:
        r: (i, j) → score.
        tasks: the j that are scored, from 1 on; usually all.
        last: T, the number of tasks trained.
        higher_is_better: of the one metric, or the like metrics, of all scores.
    """
    if last < 2:
        return Continual(None, None, None, None)
    sign = 1 if higher_is_better else -1

    def better(cell: tuple[int, int], than: tuple[int, int]) -> float | None:
        return sign * (r[cell] - r[than]) if cell in r and than in r else None

    def forgotten(j: int) -> float | None:
        earlier = [better((i, j), (last, j)) for i in range(j, last)]
        return None if None in earlier else max(earlier)

    return Continual(
        average=mean(r.get((last, j)) for j in tasks),
        backward_transfer=mean(better((last, j), (j, j)) for j in tasks if j < last),
        forgetting=mean(forgotten(j) for j in tasks if j < last),
        forward_transfer=mean(better((j - 1, j), (0, j)) for j in tasks if j > 1),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """None: there are no values, or one is missing."""
    found = list(values)
    return None if not found or None in found else sum(found) / len(found)
