"""Task sets as the command line names them (`--tasks a,b`, `--as-trained a`, `--base`), and as-trained sets."""

from __future__ import annotations

from collections.abc import Sequence

from loraf.errors import Problem, UnknownTask
from loraf.manifest import Manifest
from loraf.tasksets import NAME_PATTERN, RESERVED_NAMES, TaskSet


def task_set(text: str, manifest: Manifest) -> TaskSet:
    """Parses `a,b`, `a+b`, `a:0.5+b`, `all`, `base`, or the name of one of the checkpoint's named sets.

    Raises:
        SelectionError: the text is not a task set.
        UnknownTask: the checkpoint has no such task or named set.
    """
    name = text.strip()
    if name in manifest.sets:
        return manifest.named_set(name)
    if manifest.sets and NAME_PATTERN.fullmatch(name) and name not in (*manifest.task_names, *RESERVED_NAMES):
        remedy = f"choose from: {', '.join((*manifest.task_names, *manifest.sets))}"
        raise UnknownTask(Problem(f"there is no task or named set {name!r}", "tasks", remedy=remedy))
    return TaskSet.parse(text.replace(",", "+"), manifest.task_names)


def task_sets(
    manifest: Manifest, tasks: Sequence[str] = (), as_trained: Sequence[str] = (), base: bool = False
) -> list[TaskSet]:
    """The task sets that a command line names, without repetitions; the set of all tasks if it names none.

    Args:
        tasks: sets as text, see `task_set`.
        as_trained: names of tasks, each for the set that it was trained in.
        base: whether the bare base model is one of them.

    Raises:
        SelectionError, UnknownTask: see `task_set` and `Manifest.as_trained`.
    """
    sets = [task_set(text, manifest) for text in tasks]
    sets += [manifest.as_trained(name) for name in as_trained]
    sets += [TaskSet()] if base else []
    return list(dict.fromkeys(sets)) or [manifest.all_tasks()]


def as_trained_or_none(manifest: Manifest, name: str) -> TaskSet | None:
    """`Manifest.as_trained`, or None if a task that `name` was trained on top of has been removed."""
    try:
        return manifest.as_trained(name)
    except UnknownTask:
        return None
