"""Task sets as the command line names them: `--tasks a,b`, `--as-trained a`, `--base`."""

from __future__ import annotations

from collections.abc import Sequence

from loraf.manifest import Manifest
from loraf.tasksets import TaskSet


def task_set(text: str, manifest: Manifest) -> TaskSet:
    """`a,b`, `a+b`, `a:0.5+b`, `all` or `base`. Raises SelectionError, UnknownTask."""
    return TaskSet.parse(text.replace(",", "+"), manifest.task_names)


def task_sets(
    manifest: Manifest, tasks: Sequence[str] = (), as_trained: Sequence[str] = (), base: bool = False
) -> list[TaskSet]:
    """All sets asked for, each once; all tasks if none is asked for.

    Raises:
        SelectionError, UnknownTask: see `task_set` and `Manifest.as_trained`.
    """
    found = [task_set(text, manifest) for text in tasks]
    found += [manifest.as_trained(name) for name in as_trained]
    found += [TaskSet()] if base else []
    return list(dict.fromkeys(found)) or [manifest.all_tasks()]
