"""`loraf-train import`: a foreign adapter becomes a task of a checkpoint.

An adapter on the checkpoint's own A (a LoRAF checkpoint with the same seed, or a PEFT export of one) is taken over
value by value. Any other is fitted: B is the nearest that has values at K free positions only (importing.fitting), and
what that loses is measured, shown, and refused where it is more than LARGEST_ERROR.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loraf.errors import ConfigError, LorafError, Problem
from loraf.tasksets import name_problem
from loraf_train.commands.inspect import capacity_text
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from loraf.checkpoint import Checkpoint
    from loraf_train.importing.fitting import Lengths
    from loraf_train.importing.sources import Foreign

LARGEST_ERROR = 0.01  # ‖ΔW − ΔŴ‖/‖ΔW‖ of a projection; rounding to bfloat16 costs about 0.002

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
    """Adds the adapter in `folder` to the checkpoint in `into`, whole or not at all.

    Args:
        tasks: which tasks of a LoRAF checkpoint; they become one task.
        sparsity, dtype: of the new task; None: see `placing.plan`.
        allow_lossy: store the nearest that fits, however far it is.

    Raises:
        LorafError: all that speaks against it; nothing is written then.
    """
    from loraf.checkpoint import Checkpoint
    from loraf_train.importing import placing
    from loraf_train.importing.fitting import Lengths
    from loraf_train.importing.sources import open_foreign
    from loraf_train.terminal.progress import Progress

    problems: list[Problem] = []
    source = _tried(lambda: open_foreign(folder, tasks), problems)
    checkpoint = _tried(lambda: Checkpoint.open(into), problems)
    problems += _refusals(name, sparsity, checkpoint)
    if source is not None and checkpoint is not None:
        misfits = _misfits(source, checkpoint, folder)
        problems += misfits
        if not allow_other_base:
            problems += source.base_problems(checkpoint)
        if not misfits and (sparsity is None or 0 <= sparsity < 1):
            planned = _tried(
                lambda: placing.plan(source, checkpoint, name, sparsity, dtype, may_fit=allow_lossy), problems
            )
    if problems:
        raise ConfigError(problems)

    out = tables.console()
    for remark in source.remarks(checkpoint.manifest):
        print(f"loraf-train: warning: {remark}", file=sys.stderr)
    with Progress(out) as progress:
        step = [progress.part("modules")] if out.is_terminal else []
        placed = placing.place(source, checkpoint, planned, *step)
    kinds = placing.by_projection(placed.lengths)
    whole = sum(placed.lengths.values(), Lengths())
    _print_errors(out, kinds, whole, f"{folder}: {source.described}")
    worst = max(kinds, key=lambda kind: kinds[kind].error)
    if kinds[worst].error > LARGEST_ERROR and not allow_lossy:
        raise ConfigError(_too_far(folder, worst, kinds[worst], whole, planned.sparsity))
    origin = {
        **source.origin,
        "taken_over": len(planned.own) == len(source.shapes),
        "error": whole.error,
        "errors": {kind: of_kind.error for kind, of_kind in kinds.items()},
    }
    task = checkpoint.add_task(
        name,
        placed.values,
        alpha=planned.alpha,
        sparsity=planned.sparsity,
        trained_with=source.trained_with(checkpoint.manifest),
        templates=source.templates,
        training={**source.training, "imported": origin},
    )
    how = "taken over value by value" if origin["taken_over"] else f"fitted, relative error {whole.error:.3g}"
    out.print(
        f"{into}: task {name} is added ({how}): {task.parameters:,} positions, alpha {task.alpha:g}, "
        f"sparsity {task.sparsity:g}, {task.dtype}, {tables.size_text(task.file.bytes)}"
    )
    absent = list(dict.fromkeys(m.rsplit(".", 1)[-1] for m in checkpoint.manifest.modules if m not in source.shapes))
    if absent:
        out.print(f"the adapter leaves modules as they are ({', '.join(absent)}): the task's positions hold 0 there")
    out.print(capacity_text(checkpoint.manifest))
    return 0


def _tried(step: Callable[[], Result], problems: list[Problem]) -> Result | None:
    """What `step` gives; or None, and its mistakes go into `problems`."""
    try:
        return step()
    except LorafError as error:
        problems += error.problems
        return None


def _refusals(name: str, sparsity: float | None, checkpoint: Checkpoint | None) -> list[Problem]:
    """What is wrong with the command line's own values."""
    problems = []
    wrong = name_problem(name, field="--name")
    if wrong:
        problems.append(wrong)
    elif checkpoint is not None and name in checkpoint.manifest.task_names:
        remedy = f"choose another name, or take it out first: `loraf-train remove {checkpoint.path} {name}`"
        problems.append(Problem(f"task {name!r} is already there", "--name", str(checkpoint.path), remedy))
    if sparsity is not None and not 0 <= sparsity < 1:
        problems.append(Problem(f"{sparsity} is not in [0, 1)", "--sparsity", remedy="use, for example, 0.9"))
    return problems


def _misfits(source: Foreign, checkpoint: Checkpoint, folder: Path) -> list[Problem]:
    """Modules that the checkpoint does not have, or has in another shape."""
    from loraf.peft_import import shown

    there = {name: (module.d_out, module.d_in) for name, module in checkpoint.manifest.modules.items()}
    problems = []
    absent = [name for name in source.shapes if name not in there]
    if absent:
        message = f"the adapter changes what the checkpoint does not: {shown(absent)}"
        remedy = "import into a checkpoint of the same base with these among its target_modules"
        problems.append(Problem(message, "modules", str(folder), remedy))
    other = [name for name, shape in source.shapes.items() if shape != there.get(name, shape)]
    if other:
        one, other_shape = source.shapes[other[0]], there[other[0]]
        message = f"{shown(other)}: {one[0]}×{one[1]}, in the checkpoint {other_shape[0]}×{other_shape[1]}"
        remedy = f"import an adapter of {checkpoint.manifest.base_model.name}"
        problems.append(Problem(message, "modules", str(folder), remedy))
    return problems


def _print_errors(out: Any, kinds: dict[str, Lengths], whole: Lengths, title: str) -> None:
    rows = [
        [kind, f"{of.delta**0.5:.4g}", f"{of.error:.3g}", f"{of.least_error:.3g}"]
        for kind, of in [*kinds.items(), ("all", whole)]
    ]
    columns = ["projection", "‖ΔW‖", "relative error", "with a dense B"]
    out.print(tables.table(columns, rows, f"{title}; ‖ΔW − ΔŴ‖/‖ΔW‖ of what is stored"))


def _too_far(folder: Path, kind: str, of_kind: Lengths, whole: Lengths, sparsity: float) -> Problem:
    message = (
        f"what can be stored of it is off by {of_kind.error:.3g} of ‖ΔW‖ in {kind} and {whole.error:.3g} in all (up to "
        f"{LARGEST_ERROR:g} counts as the same adapter), so nothing was written. "
    )
    remedy = "train the task on its data with `loraf-train run`; --allow-lossy stores the approximation all the same"
    if of_kind.least_error > LARGEST_ERROR:
        message += (
            "The adapter was trained on an A of its own, and B on this checkpoint's A reaches only what lies in the "
            "rows of that (for an unrelated A, about rank/d_in of ‖ΔW‖²)"
        )
    else:
        message += f"This checkpoint's A could hold it, but not the values that a sparsity of {sparsity:g} leaves"
        remedy = f"use a lower --sparsity; or {remedy}"
    return Problem(message, "DIR", str(folder), remedy)
