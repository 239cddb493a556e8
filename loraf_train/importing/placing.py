"""Places a foreign adapter on free positions of a checkpoint: copies B where A is the same, fits it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

import torch

from loraf.checkpoint import Checkpoint
from loraf.delta import task_scale
from loraf.errors import ConfigError, Problem
from loraf.manifest import positions_per_matrix
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.masks import PlannedTask, feasible, shortage
from loraf_train.importing import fitting
from loraf_train.importing.fitting import Geometry, Lengths
from loraf_train.importing.sources import ExactB, ForeignAdapter

DEFAULT_SPARSITY, DEFAULT_DTYPE = 0.9, "bfloat16"
_DECIMALS = 4  # of a sparsity that is computed here


@dataclass(frozen=True)
class Plan:
    """How a foreign adapter becomes a task.

    Attributes:
        dtype: of the stored values.
        exact: module → B to copy unchanged; the adapter's other modules are fitted.
    """

    alpha: float
    sparsity: float
    dtype: str
    exact: dict[str, ExactB]


@dataclass(frozen=True)
class Placed:
    """The task's values by module, and the norms by module of the adapter."""

    values: dict[str, SparseB]
    lengths: dict[str, Lengths]


def plan(
    source: ForeignAdapter, checkpoint: Checkpoint, name: str, sparsity: float | None, dtype: str | None, may_fit: bool
) -> Plan:
    """Decides what is copied, and checks that there is room.

    Args:
        sparsity, dtype: from the user; None: the adapter's own or those of the checkpoint's last task, lowered or
            widened where an exact copy needs it.
        may_fit: fit B to free positions in modules where other tasks own some of its positions.

    Raises:
        ConfigError: other tasks own positions of the adapter, or too few positions are free; all such problems.
    """
    rank = checkpoint.manifest.rank
    alpha = source.alpha(rank)
    scale = task_scale(alpha, rank)
    by_module = {module: source.exact_b(module, checkpoint, scale) for module in source.shapes}
    exact = {module: b for module, b in by_module.items() if b is not None}
    taken = _taken(exact, checkpoint)
    problems = []
    if may_fit:
        exact = {module: b for module, b in exact.items() if not any(module in counts for counts in taken.values())}
    else:
        problems += [_conflict(task, counts, checkpoint) for task, counts in taken.items()]
    if sparsity is None:
        sparsity = _sparsity(source, checkpoint, exact)
    shapes = {module: (spec.d_out, spec.d_in) for module, spec in checkpoint.manifest.modules.items()}
    planned = PlannedTask(name, sparsity, "--sparsity", str(checkpoint.path))
    problems += shortage(shapes, rank, [planned], checkpoint.manifest)
    if problems:
        raise ConfigError(problems)
    exact = {m: b for m, b in exact.items() if len(b.positions) <= positions_per_matrix(sparsity, shapes[m][0], rank)}
    return Plan(alpha, sparsity, dtype or _dtype(source, checkpoint, exact), exact)


def place(
    source: ForeignAdapter,
    checkpoint: Checkpoint,
    plan: Plan,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Placed:
    """Computes the task's B in every module of the checkpoint.

    A task owns K positions of each module. Where the adapter has fewer values, or lacks the module, zeros fill the
    lowest free positions.

    Args:
        on_progress: called with the number of modules done and their total.

    Raises:
        ConfigError: a value is too large for the dtype.
    """
    manifest = checkpoint.manifest
    scale = task_scale(plan.alpha, manifest.rank)
    values, lengths = {}, {}
    for done, (module, spec) in enumerate(manifest.modules.items(), 1):
        shape = (spec.d_out, manifest.rank)
        k = positions_per_matrix(plan.sparsity, *shape)
        free = feasible(shape, [b[module] for b in checkpoint.tasks.values()])
        exact = plan.exact.get(module)
        if module in source.shapes:
            factors = source.factors(module)
            geometry = Geometry.of(checkpoint.projection_of(module), factors.a)
            if exact is not None:
                positions, unrounded = exact.positions, exact.values
            else:
                positions, unrounded = fitting.fit(geometry, factors, scale, free, k)
        else:
            positions, unrounded = free[:0], torch.empty(0, dtype=torch.float64)
        positions, unrounded = _filled(positions, unrounded, free, k)
        rounded = unrounded.to(getattr(torch, plan.dtype))
        if not bool(torch.isfinite(rounded).all()):
            message = f"{module} has a value of {float(unrounded.abs().max()):.3g}, too large for {plan.dtype}"
            raise ConfigError(Problem(message, "--dtype", remedy="use bfloat16 or float32"))
        values[module] = SparseB.from_positions(positions, rounded, shape)
        if module in source.shapes:
            measured = fitting.lengths(geometry, factors, values[module].dense(torch.float64), scale)
            copied = exact is not None and torch.equal(rounded.double(), unrounded)
            lossless = copied and factors.a.dtype == torch.float32
            lengths[module] = Lengths(measured.delta) if lossless else measured
        on_progress(done, len(manifest.modules))
    return Placed(values, lengths)


def by_projection(lengths: Mapping[str, Lengths]) -> dict[str, Lengths]:
    """Sums over the modules of each kind (q_proj, …)."""
    sums: dict[str, Lengths] = {}
    for module, of_module in lengths.items():
        kind = module.rsplit(".", 1)[-1]
        sums[kind] = sums.get(kind, Lengths()) + of_module
    return sums


def _filled(
    positions: torch.Tensor, values: torch.Tensor, free: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds zeros on the lowest other free positions, up to k in all."""
    others = free[~torch.isin(free, positions)][: k - len(positions)]
    return torch.cat([positions, others]), torch.cat([values, values.new_zeros(len(others))])


def _taken(exact: Mapping[str, ExactB], checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Task → module → number of positions to be copied that it owns; only where there are any."""
    taken: dict[str, dict[str, int]] = {}
    for module, b in exact.items():
        for task, of_task in checkpoint.tasks.items():
            shared = int(torch.isin(of_task[module].positions, b.positions).sum())
            if shared:
                taken.setdefault(task, {})[module] = shared
    return taken


def _conflict(task: str, counts: Mapping[str, int], checkpoint: Checkpoint) -> Problem:
    module, count = next(iter(counts.items()))
    more = f", and positions in {len(counts) - 1} more modules" if len(counts) > 1 else ""
    message = f"task {task!r} owns {count} of the positions where the adapter has values{more}"
    remedy = (
        f"remove it (`loraf-train remove {checkpoint.path} {task}`), import into another checkpoint, or add "
        "--allow-lossy to fit the values to free positions"
    )
    return Problem(message, module, str(checkpoint.path), remedy)


def _sparsity(source: ForeignAdapter, checkpoint: Checkpoint, exact: Mapping[str, ExactB]) -> float:
    """The source's or the last task's sparsity, lowered if it leaves fewer positions than are copied."""
    manifest = checkpoint.manifest
    default = manifest.tasks[-1].sparsity if manifest.tasks else DEFAULT_SPARSITY
    if source.sparsity is not None and len(exact) == len(source.shapes):
        default = source.sparsity
    sizes = {module: manifest.modules[module].d_out * manifest.rank for module in exact}
    # ⌊(1 − s)·size⌋ ≥ n exactly where s ≤ 1 − n/size
    highest = min((1 - Decimal(len(b.positions)) / sizes[module] for module, b in exact.items()), default=Decimal(1))
    return min(default, float(highest.quantize(Decimal(1).scaleb(-_DECIMALS), ROUND_FLOOR)))


def _dtype(source: ForeignAdapter, checkpoint: Checkpoint, exact: Mapping[str, ExactB]) -> str:
    """The source's or the last task's dtype, or float32 if that would round what is copied."""
    tasks = checkpoint.manifest.tasks
    default = source.dtype or (tasks[-1].dtype if tasks else DEFAULT_DTYPE)
    dtype = getattr(torch, default)
    lossless = all(torch.equal(b.values.to(dtype).double(), b.values) for b in exact.values())
    return default if lossless else "float32"
