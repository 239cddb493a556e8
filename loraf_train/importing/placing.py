"""A foreign adapter's values on free positions of a checkpoint: taken over where A is the same, fitted elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import task_scale
from loraf.errors import ConfigError, Problem
from loraf.manifest import positions
from loraf.sparse import SparseB
from loraf_train.adapter import masks
from loraf_train.importing import fitting
from loraf_train.importing.fitting import Geometry, Lengths
from loraf_train.importing.sources import Foreign, Own

USUAL_SPARSITY, USUAL_DTYPE = 0.9, "bfloat16"
_DECIMALS = 4  # of a sparsity that is found here


@dataclass(frozen=True)
class Plan:
    """How a foreign adapter becomes a task.

    Attributes:
        own: module → B that is taken over as it is; the adapter's other modules are fitted.
        dtype: of the stored values.
    """

    alpha: float
    sparsity: float
    dtype: str
    own: dict[str, Own]


@dataclass(frozen=True)
class Placed:
    """The task's values, and what of each module was kept (modules that the adapter does not have are left out)."""

    values: dict[str, SparseB]
    lengths: dict[str, Lengths]


def plan(
    source: Foreign, checkpoint: Checkpoint, name: str, sparsity: float | None, dtype: str | None, may_fit: bool
) -> Plan:
    """Decides what is taken over, and checks that there is room.

    Args:
        sparsity, dtype: as the user says; None: the adapter's own, or the ones of the checkpoint's last task, but
            never so sparse or so short that what can be exact is not.
        may_fit: B whose positions are taken may be fitted to free ones instead.

    Raises:
        ConfigError: positions are another task's, or too few are free; all of it.
    """
    rank = checkpoint.manifest.rank
    alpha = source.alpha(rank)
    scale = task_scale(alpha, rank)
    found = {module: source.own(module, checkpoint, scale) for module in source.shapes}
    own = {module: b for module, b in found.items() if b is not None}
    taken = _taken(own, checkpoint)
    problems = []
    if may_fit:
        own = {module: b for module, b in own.items() if not any(module in counts for counts in taken.values())}
    else:
        problems += [_conflict(task, counts, checkpoint) for task, counts in taken.items()]
    chosen = _sparsity(source, checkpoint, own) if sparsity is None else sparsity
    shapes = {module: (spec.d_out, spec.d_in) for module, spec in checkpoint.manifest.modules.items()}
    wish = masks.Wish(name, chosen, "--sparsity", str(checkpoint.path))
    problems += masks.shortage(shapes, rank, [wish], checkpoint.manifest)
    if problems:
        raise ConfigError(problems)
    fits = {m: b for m, b in own.items() if len(b.flat) <= positions(chosen, shapes[m][0], rank)}
    return Plan(alpha, chosen, dtype or _dtype(source, checkpoint, fits), fits)


def place(
    source: Foreign, checkpoint: Checkpoint, plan: Plan, on_progress: Callable[[int, int], None] = lambda *_: None
) -> Placed:
    """The task's B in every module of the checkpoint.

    A module that the adapter does not have, or where it has fewer values than K, gets zeros on the lowest free
    positions: a task owns K positions of each.

    Args:
        on_progress: told how many modules of how many are done.

    Raises:
        ConfigError: a value is too large for the dtype.
    """
    manifest = checkpoint.manifest
    scale = task_scale(plan.alpha, manifest.rank)
    values, lengths = {}, {}
    for done, (module, spec) in enumerate(manifest.modules.items(), 1):
        shape = (spec.d_out, manifest.rank)
        k = positions(plan.sparsity, *shape)
        free = masks.feasible(shape, [b[module] for b in checkpoint.tasks.values()])
        kept = plan.own.get(module)
        geometry = factors = None
        if module in source.shapes:
            factors = source.factors(module)
            geometry = Geometry.of(checkpoint.projection_of(module), factors.a)
        if kept is not None:
            flat, exact = kept.flat, kept.values
        elif factors is not None:
            flat, exact = fitting.fit(geometry, factors, scale, free, k)
        else:
            flat, exact = free[:0], torch.empty(0, dtype=torch.float64)
        flat, exact = _filled(flat, exact, free, k)
        rounded = exact.to(getattr(torch, plan.dtype))
        if not bool(torch.isfinite(rounded).all()):
            message = f"{module} has a value of {float(exact.abs().max()):.3g}, too large for {plan.dtype}"
            raise ConfigError(Problem(message, "--dtype", remedy="use bfloat16 or float32"))
        values[module] = SparseB.from_flat(flat, rounded, shape)
        if factors is not None:
            found = fitting.lengths(geometry, factors, values[module].dense(torch.float64), scale)
            whole = kept is not None and torch.equal(rounded.double(), exact) and factors.a.dtype == torch.float32
            lengths[module] = Lengths(found.delta) if whole else found
        on_progress(done, len(manifest.modules))
    return Placed(values, lengths)


def by_projection(lengths: Mapping[str, Lengths]) -> dict[str, Lengths]:
    """Summed over the modules of each kind (q_proj, …)."""
    found: dict[str, Lengths] = {}
    for module, of_module in lengths.items():
        kind = module.rsplit(".", 1)[-1]
        found[kind] = found.get(kind, Lengths()) + of_module
    return found


def _filled(flat: torch.Tensor, values: torch.Tensor, free: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With zeros on the lowest other free positions, k in all."""
    others = free[~torch.isin(free, flat)][: k - len(flat)]
    return torch.cat([flat, others]), torch.cat([values, values.new_zeros(len(others))])


def _taken(own: Mapping[str, Own], checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Task → module → how many of the positions that are to be taken over it owns; only where there are any."""
    found: dict[str, dict[str, int]] = {}
    for module, b in own.items():
        for task, of_task in checkpoint.tasks.items():
            shared = int(torch.isin(of_task[module].flat, b.flat).sum())
            if shared:
                found.setdefault(task, {})[module] = shared
    return found


def _conflict(task: str, counts: Mapping[str, int], checkpoint: Checkpoint) -> Problem:
    module, count = next(iter(counts.items()))
    more = f", and positions in {len(counts) - 1} more modules" if len(counts) > 1 else ""
    message = f"task {task!r} owns {count} of the positions that the adapter has values at{more}"
    remedy = (
        f"take it out (`loraf-train remove {checkpoint.path} {task}`), import into another checkpoint, or say "
        "--allow-lossy to have the values fitted to free positions"
    )
    return Problem(message, module, str(checkpoint.path), remedy)


def _sparsity(source: Foreign, checkpoint: Checkpoint, own: Mapping[str, Own]) -> float:
    """The usual one, or lower where it leaves fewer positions than are to be taken over."""
    manifest = checkpoint.manifest
    usual = manifest.tasks[-1].sparsity if manifest.tasks else USUAL_SPARSITY
    if source.sparsity is not None and len(own) == len(source.shapes):
        usual = source.sparsity
    sizes = {module: manifest.modules[module].d_out * manifest.rank for module in own}
    # ⌊(1 − s)·size⌋ ≥ n exactly where s ≤ 1 − n/size
    highest = min((1 - Decimal(len(b.flat)) / sizes[module] for module, b in own.items()), default=Decimal(1))
    return min(usual, float(highest.quantize(Decimal(1).scaleb(-_DECIMALS), ROUND_FLOOR)))


def _dtype(source: Foreign, checkpoint: Checkpoint, own: Mapping[str, Own]) -> str:
    """The usual one, or float32 where it would round what is taken over."""
    tasks = checkpoint.manifest.tasks
    usual = source.dtype or (tasks[-1].dtype if tasks else USUAL_DTYPE)
    kind = getattr(torch, usual)
    exact = all(torch.equal(b.values.to(kind).double(), b.values) for b in own.values())
    return usual if exact else "float32"
