"""Continual learning in four numbers: what a sequence of T tasks forgets and transfers.

R[i, j] is the score on task j after tasks 1 … i have been trained; row 0 is the base model.

    average             mean over j of R[T, j]
    backward transfer   mean over j < T of R[T, j] − R[j, j]
    forgetting          mean over j < T of max over j ≤ i < T of R[i, j], less R[T, j]
    forward transfer    mean over j > 1 of R[j−1, j] − R[0, j]

The last three are sums over T − 1 tasks divided by T − 1. For metrics that are better when lower, signs are reversed
and the best is the minimum, so that with any metric a gain is a positive transfer and a loss is positive forgetting.
Sources: Lopez-Paz and Ranzato, 2017 (average, both transfers); Chaudhry et al., 2018 (forgetting), whose maximum also
covers the rows before task j was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Continual:
    """The four numbers; None: there are fewer than two tasks, or a score that the number needs is missing.

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
    """Returns the four numbers of one matrix.

    Args:
        r: (i, j) → score.
        tasks: every j that has scores, from 1; usually all.
        last: T, the number of trained tasks.
        higher_is_better: whether it is for the metrics of all scores.
    """
    if last < 2:
        return Continual(None, None, None, None)
    sign = 1 if higher_is_better else -1

    def gain(cell: tuple[int, int], over: tuple[int, int]) -> float | None:
        return sign * (r[cell] - r[over]) if cell in r and over in r else None

    def forgotten(j: int) -> float | None:
        earlier = _without_gaps(gain((i, j), (last, j)) for i in range(j, last))
        return None if earlier is None else max(earlier)

    return Continual(
        average=mean(r.get((last, j)) for j in tasks),
        backward_transfer=mean(gain((last, j), (j, j)) for j in tasks if j < last),
        forgetting=mean(forgotten(j) for j in tasks if j < last),
        forward_transfer=mean(gain((j - 1, j), (0, j)) for j in tasks if j > 1),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean; None: there are no values, or one is missing."""
    present = _without_gaps(values)
    return sum(present) / len(present) if present else None


def _without_gaps(values: Iterable[float | None]) -> list[float] | None:
    """Returns the values; None: one is missing."""
    present = []
    for value in values:
        if value is None:
            return None
        present.append(value)
    return present
