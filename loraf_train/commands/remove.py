"""`loraf-train remove`: takes a task out of a checkpoint and says what that costs the others.

Works on the manifest alone, so a task whose file is damaged or lost can be taken out too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraf import manifest as manifests
from loraf.manifest import Manifest
from loraf_train.commands.inspect import capacity_text
from loraf_train.terminal import tables


def remove(folder: Path, name: str, dry_run: bool) -> int:
    """Removes a task, with a warning on stderr if others were trained on top of it.

    Args:
        dry_run: only say what would happen.

    Raises:
        UnknownTask: there is no such task.
        CheckpointError: there is no checkpoint, or it cannot be written.
    """
    from loraf.checkpoint import Checkpoint

    out = tables.console()
    before = manifests.read(folder)
    if name not in before.task_names and not dry_run:
        Checkpoint.remove_task(folder, name)  # raises, unless a removal was interrupted
        out.print(f"{folder}: removed the file that an interrupted removal of task {name} left")
        return 0
    task = before.task(name)
    above = trained_on_top(before, name)
    if above:
        verb = "were" if len(above) > 1 else "was"
        print(
            f"loraf-train: warning: {', '.join(above)} {verb} trained on top of {name}: what {verb} trained stays and "
            f"can be chosen by name, but no longer as trained; to have that again, remove and train "
            f"{'them' if len(above) > 1 else 'it'} too",
            file=sys.stderr,
        )
    if dry_run:
        out.print(f"{folder}: task {name} would be removed, {task.parameters:,} positions would be free again")
        return 0
    left = Checkpoint.remove_task(folder, name)
    out.print(f"{folder}: task {name} is removed, {task.parameters:,} positions are free again")
    lost = sum(len(t.scores) for t in before.tasks if t.name != name) - sum(len(t.scores) for t in left.tasks)
    if lost:
        out.print(f"{lost} scores of other tasks went with it: they were measured with {name} on")
    out.print(capacity_text(left))
    return 0


def trained_on_top(manifest: Manifest, name: str) -> list[str]:
    """Tasks that were trained while `name` was active, in their order.

    A task that stands before `name` and lists it knew another one, which was taken out and trained again since.
    """
    names = manifest.task_names
    return [task.name for task in manifest.tasks[names.index(name) + 1 :] if name in task.trained_with]
