"""Which positions of B a task may own, and which of them it takes.

    feasible     positions that no other task owns
    top_k        the K feasible positions where calibration moved B most; ties go to the lower position
    shortage     planned tasks for which too few positions are left, found before anything is trained

A position is a flat index into B: row · rank + column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

import torch

from loraf.errors import Problem
from loraf.manifest import Manifest, positions_per_matrix
from loraf.matrices.sparse import SparseB

_FINEST = 6  # decimals of a sparsity that a message may propose


def feasible(shape: tuple[int, int], taken: Iterable[SparseB]) -> torch.Tensor:
    """Returns the positions of a (d_out, rank) matrix that no task of `taken` owns: int64, ascending."""
    free = torch.ones(shape[0] * shape[1], dtype=torch.bool)
    for b in taken:
        free[b.positions] = False
    return free.nonzero().view(-1)


def top_k(change: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the indices of the k largest |change|, ascending; of equal ones the lower indices.

    Args:
        change: (n,), n ≥ k; finite.

    Raises:
        ValueError: k is negative or above n, or an entry is not finite.
    """
    size = change.abs()
    if not 0 <= k <= len(size):
        raise ValueError(f"cannot take {k} of {len(size)} positions")
    if not bool(torch.isfinite(size).all()):
        raise ValueError("an entry is not finite")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=change.device)
    smallest = torch.topk(size, k, sorted=False).values.min()
    among_largest = size > smallest
    ties = (size == smallest).nonzero().view(-1)
    among_largest[ties[: k - int(among_largest.sum())]] = True
    return among_largest.nonzero().view(-1)


@dataclass(frozen=True)
class PlannedTask:
    """A task still to be trained.

    Attributes:
        field, file: where its sparsity was set, for messages.
    """

    name: str
    sparsity: float
    field: str
    file: str = ""


def shortage(
    shapes: Mapping[str, tuple[int, int]], rank: int, tasks: Iterable[PlannedTask], manifest: Manifest | None = None
) -> list[Problem]:
    """Finds the tasks that do not fit if they are trained in this order.

    Args:
        shapes: module → (d_out, d_in).
        manifest: the existing checkpoint to which they are added; None: a new one.

    Returns:
        A problem for each task that does not fit, with the tightest module, the positions left there, and the lowest
        sparsity that fits all modules.
    """
    left = {
        module: manifest.free_positions(module) if manifest else d_out * rank for module, (d_out, _) in shapes.items()
    }
    problems = []
    for task in tasks:
        k = {module: positions_per_matrix(task.sparsity, d_out, rank) for module, (d_out, _) in shapes.items()}
        empty = [module for module, count in k.items() if count == 0]
        if empty:
            message = f"task {task.name!r}: sparsity {task.sparsity:g} leaves no position in {_and_more(empty)}"
            highest = _highest_sparsity(shapes, rank)
            remedy = f"use a sparsity of {highest:f} or less" if highest else "use a larger rank"
            problems.append(Problem(message, task.field, task.file, remedy))
            continue
        short = sorted((m for m in k if k[m] > left[m]), key=lambda m: Decimal(left[m]) / (shapes[m][0] * rank))
        if short:
            tightest = short[0]
            message = (
                f"task {task.name!r} needs {k[tightest]} positions in {_and_more(short)}, "
                f"but only {left[tightest]} of {shapes[tightest][0] * rank} are left there"
            )
            problems.append(Problem(message, task.field, task.file, _remedy(shapes, rank, left, manifest)))
            continue
        for module, count in k.items():
            left[module] -= count
    return problems


def _remedy(
    shapes: Mapping[str, tuple[int, int]], rank: int, left: Mapping[str, int], manifest: Manifest | None
) -> str:
    fits = fitting_sparsity(shapes, rank, left)
    alternative = "train into a new checkpoint, with a larger rank or sparser tasks"
    if manifest is not None and manifest.tasks:
        alternative = f"take a task out of the checkpoint (`loraf-train remove`), or {alternative}"
    return alternative if fits is None else f"a sparsity of {fits:f} would fit; or {alternative}"


def fitting_sparsity(shapes: Mapping[str, tuple[int, int]], rank: int, left: Mapping[str, int]) -> Decimal | None:
    """Returns the lowest sparsity with 1 ≤ K ≤ left in every module, in hundredths or, if those are too coarse, finer.

    None: no sparsity of up to six decimals fits.
    """
    # ⌊(1 − s)·size⌋ ≤ left exactly where s > 1 − (left + 1) / size
    above = max(1 - Decimal(left[module] + 1) / (d_out * rank) for module, (d_out, _) in shapes.items())
    for decimals in range(2, _FINEST + 1):
        step = Decimal(1).scaleb(-decimals)
        candidate = max(above, Decimal(0)).quantize(step, ROUND_FLOOR) + step
        if candidate >= 1:
            continue
        needed = {module: positions_per_matrix(float(candidate), d_out, rank) for module, (d_out, _) in shapes.items()}
        if all(1 <= needed[module] <= left[module] for module in shapes):
            return candidate.normalize()
    return None


def _highest_sparsity(shapes: Mapping[str, tuple[int, int]], rank: int) -> Decimal:
    """The highest that leaves a position in every module: ⌊(1 − s)·size⌋ ≥ 1 exactly where s ≤ 1 − 1/size."""
    smallest = min(d_out for d_out, _ in shapes.values()) * rank
    return (1 - Decimal(1) / smallest).quantize(Decimal(1).scaleb(-_FINEST), ROUND_FLOOR).normalize()


def _and_more(modules: list[str]) -> str:
    more = len(modules) - 1
    return modules[0] + (f" (and {more} more module{'s' * (more > 1)})" if more else "")
