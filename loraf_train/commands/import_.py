"""`loraf-train import`: adds an adapter that was trained elsewhere to a checkpoint, as a new task.

An adapter on the checkpoint's own A (a LoRAF checkpoint with the same seed, or a PEFT export of one) is copied
value by value. Any other is fitted: B becomes the closest matrix with values at K free positions only
(importing.fitting). The error of the fit is measured and printed, and refused if it is above LARGEST_ERROR.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loraf import manifest as manifests
from loraf.errors import ConfigError, LorafError, Problem
from loraf.files.folder_lock import locked
from loraf.tasksets import name_problem
from loraf.units import size_text
from loraf_train.commands.inspect import capacity_text
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from rich.console import Console

    from loraf.checkpoint import Checkpoint
    from loraf.peft_import import Shapes
    from loraf_train.importing.fitting import Lengths
    from loraf_train.importing.placing import Plan
    from loraf_train.importing.sources import ForeignAdapter

LARGEST_ERROR = 0.01  # ‖ΔW − ΔŴ‖/‖ΔW‖ over a kind of projection; rounding to bfloat16 costs about 0.002

Result = TypeVar("Result")


def import_task(
    folder: Path,
    into: Path,
    name: str,
    tasks: str | None = None,
    sparsity: float | None = None,
    dtype: str | None = None,
    allow_lossy: bool = False,
    allow_other_base: bool = False,
) -> int:
    """Adds the adapter in `folder` to the checkpoint in `into`, as a whole or not at all.

    Args:
        tasks: which tasks of a LoRAF checkpoint; they become one task.
        sparsity, dtype: of the new task; None: see `placing.plan`.
        allow_lossy: whether to store the closest approximation, however far it is from the adapter.

    Raises:
        LorafError: everything that prevents the import; nothing is written then.
    """
    arguments = (folder, into, name, tasks, sparsity, dtype, allow_lossy, allow_other_base)
    if not (into / manifests.FILE_NAME).is_file():
        return _import(*arguments)  # raises
    with locked(into, "loraf-train import"):
        return _import(*arguments)


def _import(
    folder: Path,
    into: Path,
    name: str,
    tasks: str | None,
    sparsity: float | None,
    dtype: str | None,
    allow_lossy: bool,
    allow_other_base: bool,
) -> int:
    from loraf_train.importing import placing
    from loraf_train.importing.fitting import Lengths
    from loraf_train.terminal.progress import Progress

    source, checkpoint, plan = _plan(folder, into, name, tasks, sparsity, dtype, allow_lossy, allow_other_base)
    out = tables.console()
    for remark in source.remarks(checkpoint.manifest):
        print(f"loraf-train: warning: {remark}", file=sys.stderr)
    with Progress(out) as progress:
        report = [progress.part("modules")] if out.is_terminal else []
        placed = placing.place(source, checkpoint, plan, *report)
    kinds = placing.by_projection(placed.lengths)
    total = sum(placed.lengths.values(), Lengths())
    _print_errors(out, kinds, total, f"{folder}: {source.description}")
    worst = max(kinds, key=lambda kind: kinds[kind].error)
    if kinds[worst].error > LARGEST_ERROR and not allow_lossy:
        raise ConfigError(_too_far(folder, worst, kinds[worst], total, plan.sparsity))
    origin = {
        **source.origin,
        "taken_over": len(plan.exact) == len(source.shapes),
        "error": total.error,
        "errors": {kind: of_kind.error for kind, of_kind in kinds.items()},
    }
    task = checkpoint.add_task(
        name,
        placed.values,
        alpha=plan.alpha,
        sparsity=plan.sparsity,
        trained_with=source.trained_with(checkpoint.manifest),
        templates=source.templates,
        training={**source.training, "imported": origin},
    )
    fit = "copied value by value" if origin["taken_over"] else f"fitted, relative error {total.error:.3g}"
    out.print(
        f"{into}: task {name} is added ({fit}): {task.parameters:,} positions, alpha {task.alpha:g}, "
        f"sparsity {task.sparsity:g}, {task.dtype}, {size_text(task.file.bytes)}"
    )
    absent = list(dict.fromkeys(m.rsplit(".", 1)[-1] for m in checkpoint.manifest.modules if m not in source.shapes))
    if absent:
        out.print(f"the adapter does not change {', '.join(absent)}: the task's values there are 0")
    out.print(capacity_text(checkpoint.manifest))
    return 0


def _plan(
    folder: Path,
    into: Path,
    name: str,
    tasks: str | None,
    sparsity: float | None,
    dtype: str | None,
    allow_lossy: bool,
    allow_other_base: bool,
) -> tuple[ForeignAdapter, Checkpoint, Plan]:
    """Opens both sides and plans the new task; see `import_task`.

    Raises:
        ConfigError: everything that prevents the import.
    """
    from loraf.checkpoint import Checkpoint
    from loraf_train.importing import placing
    from loraf_train.importing.sources import open_foreign

    problems: list[Problem] = []
    opened: list[Problem] = []
    checkpoint = _try(lambda: Checkpoint.open(into), opened)
    source = _try(lambda: open_foreign(folder, tasks, lambda shapes: _misfits(shapes, checkpoint, folder)), problems)
    problems += opened
    problems += _option_problems(name, sparsity, checkpoint)
    plan = None
    if source is not None and checkpoint is not None:
        problems += source.misfits
        if not allow_other_base:
            problems += source.base_problems(checkpoint)
        if not source.misfits and (sparsity is None or 0 <= sparsity < 1):
            plan = _try(lambda: placing.plan(source, checkpoint, name, sparsity, dtype, may_fit=allow_lossy), problems)
    if problems or source is None or checkpoint is None or plan is None:
        raise ConfigError(problems)
    return source, checkpoint, plan


def _try(step: Callable[[], Result], problems: list[Problem]) -> Result | None:
    """Returns what `step` returns; if it fails, adds its problems to `problems` and returns None."""
    try:
        return step()
    except LorafError as error:
        problems += error.problems
        return None


def _option_problems(name: str, sparsity: float | None, checkpoint: Checkpoint | None) -> list[Problem]:
    """What is wrong with the values on the command line."""
    problems = []
    bad_name = name_problem(name, field="--name")
    if bad_name:
        problems.append(bad_name)
    elif checkpoint is not None and name in checkpoint.manifest.task_names:
        remedy = f"choose another name, or remove it first: `loraf-train remove {checkpoint.path} {name}`"
        problems.append(Problem(f"task {name!r} exists already", "--name", str(checkpoint.path), remedy))
    if sparsity is not None and not 0 <= sparsity < 1:
        problems.append(Problem(f"{sparsity} is not in [0, 1)", "--sparsity", remedy="use, for example, 0.9"))
    return problems


def _misfits(adapter: Shapes, checkpoint: Checkpoint | None, folder: Path) -> list[Problem]:
    """Modules that the checkpoint does not have, or has in another shape.

    Args:
        adapter: the shapes of the adapter to import.
        checkpoint: None if it cannot be opened.
    """
    from loraf.peft_import import shown

    if checkpoint is None:
        return [Problem("cannot be compared with the checkpoint", "modules", str(folder), "see the other problem")]
    shapes = {name: (module.d_out, module.d_in) for name, module in checkpoint.manifest.modules.items()}
    problems = []
    absent = [name for name in adapter if name not in shapes]
    if absent:
        message = f"the adapter changes modules that the checkpoint does not have: {shown(absent)}"
        remedy = "import into a checkpoint of the same base model whose target_modules include these"
        problems.append(Problem(message, "modules", str(folder), remedy))
    reshaped = [name for name, shape in adapter.items() if shape != shapes.get(name, shape)]
    if reshaped:
        adapter_shape, module_shape = adapter[reshaped[0]], shapes[reshaped[0]]
        adapter_text, module_text = (f"{d_out}×{d_in}" for d_out, d_in in (adapter_shape, module_shape))
        message = f"{shown(reshaped)}: {adapter_text}, but {module_text} in the checkpoint"
        remedy = f"import an adapter of {checkpoint.manifest.base_model.name}"
        problems.append(Problem(message, "modules", str(folder), remedy))
    return problems


def _print_errors(out: Console, kinds: dict[str, Lengths], total: Lengths, title: str) -> None:
    rows = [
        [kind, f"{norms.delta**0.5:.4g}", f"{norms.error:.3g}", f"{norms.least_error:.3g}"]
        for kind, norms in [*kinds.items(), ("all", total)]
    ]
    columns = ["projection", "‖ΔW‖", "relative error", "with a dense B"]
    out.print(tables.table(columns, rows, f"{title}; error ‖ΔW − ΔŴ‖/‖ΔW‖ of the stored values"))


def _too_far(folder: Path, kind: str, of_kind: Lengths, total: Lengths, sparsity: float) -> Problem:
    message = (
        f"the closest approximation that fits is off by {of_kind.error:.3g} of ‖ΔW‖ in {kind} and {total.error:.3g} "
        f"overall (at most {LARGEST_ERROR:g} counts as the same adapter), so nothing was written. "
    )
    remedy = "train the task on its data with `loraf-train run`, or store the approximation with --allow-lossy"
    if of_kind.least_error > LARGEST_ERROR:
        message += (
            "The adapter was trained on a different A, and any B on this checkpoint's A reaches only the part of ΔW in "
            "the row space of that A (for an unrelated A, about rank/d_in of ‖ΔW‖²)"
        )
    else:
        message += f"This checkpoint's A could represent it, but not with the values left by a sparsity of {sparsity:g}"
        remedy = f"use a lower --sparsity, or {remedy}"
    return Problem(message, "DIR", str(folder), remedy)
