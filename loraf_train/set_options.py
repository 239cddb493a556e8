"""Task sets as the command line names them (`--tasks a,b`, `--as-trained a`, `--base`), and as-trained sets."""

from __future__ import annotations

from collections.abc import Sequence

from loraf.errors import UnknownTask
from loraf.manifest import Manifest
from loraf.set_text import task_set
from loraf.tasksets import TaskSet


def task_sets(
    manifest: Manifest, tasks: Sequence[str] = (), as_trained: Sequence[str] = (), base: bool = False
) -> list[TaskSet]:
    """The task sets that a command line names, without repetitions; the set of all tasks if it names none.

    Args:
        tasks: sets as text, see `loraf.set_text`.
        as_trained: names of tasks, each for the set that it was trained in.
        base: whether the bare base model is one of them.

    Raises:
        SelectionError, UnknownTask: see `loraf.set_text.task_set` and `Manifest.as_trained`.
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
