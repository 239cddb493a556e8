"""What a manifest may say of its named sets. Standard library only.

A named set is a task set with a name of its own: task → weight. A task of weight 0 may be in it; it has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from loraf.limits import MAX_SETS
from loraf.tasksets import MAX_WEIGHT, name_problem

_SHOWN = 100  # characters of a name that is none


def check_sets(
    sets: Mapping[str, Mapping[str, float]], tasks: Collection[str], report: Callable[[str, str], None]
) -> None:
    """Reports named sets that cannot be used.

    Args:
        sets: name → task → weight.
        tasks: names of the checkpoint's tasks.
        report: called with (field, message) for every mistake.
    """
    if len(sets) > MAX_SETS:
        report("sets", f"has more than {MAX_SETS:,} entries")
    for name, weights in sets.items():
        problem = name_problem(name[:_SHOWN], "set")
        if problem:
            report("sets", problem.message)
            continue
        where = f"sets.{name}"
        if name in tasks:
            report(where, f"{name!r} is the name of a task")
        if not weights:
            report(where, "names no task")
        for task, weight in weights.items():
            if task not in tasks:
                report(where, f"there is no task {task[:_SHOWN]!r}")
            elif not abs(weight) <= MAX_WEIGHT:  # false for NaN too
                report(f"{where}.{task}", f"{weight} is not a weight from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
