"""`loraf-train remove`: removes a task from a checkpoint and warns of the consequences for others.

Works on the manifest alone, so a task whose file is damaged or lost can be removed too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraf import manifest as manifests
from loraf.files.folder_lock import locked
from loraf.manifest import Manifest
from loraf_train.commands.inspect import capacity_text
from loraf_train.terminal import tables


def remove(folder: Path, name: str, dry_run: bool) -> int:
    """Removes a task with its statistics and named sets, with a warning on stderr if others were trained on top of it.

    Args:
        dry_run: whether to print only what would happen.

    Raises:
        UnknownTask: there is no such task.
        CheckpointError: there is no checkpoint, it cannot be written, or another process writes to it.
    """
    if dry_run:
        return _remove(folder, name, dry_run)
    manifests.read(folder)  # a folder without a checkpoint is not locked
    with locked(folder, "loraf-train remove"):
        return _remove(folder, name, dry_run)


def _remove(folder: Path, name: str, dry_run: bool) -> int:
    from loraf.checkpoint import Checkpoint

    out = tables.console()
    before = manifests.read(folder)
    if name not in before.task_names and not dry_run:
        Checkpoint.remove_task(folder, name)  # raises, unless an earlier removal was interrupted
        out.print(f"{folder}: removed what an interrupted removal of task {name} had left behind")
        return 0
    task = before.task(name)
    above = trained_on_top(before, name)
    if above:
        were, they, them = ("were", "they", "them") if len(above) > 1 else ("was", "it", "it")
        warning = (
            f"{', '.join(above)} {were} trained on top of {name}: {they} can still be selected by name, but no longer "
            f"as trained; to restore that, remove and train {them} again too"
        )
        protected = [above_it for above_it in above if before.task(above_it).statistics]
        if protected:
            warning += f". The statistics of {', '.join(protected)} stay, and protect what was answered with {name} on"
        print(f"loraf-train: warning: {warning}", file=sys.stderr)
    sets = [label for label, weights in before.sets.items() if name in weights]
    if dry_run:
        out.print(f"{folder}: task {name} would be removed, {task.parameters:,} positions would be free again")
        if sets:
            out.print(f"{_named_sets(sets)} with {name} would be removed too")
        return 0
    after = Checkpoint.remove_task(folder, name)
    files = " with its statistics" if task.statistics else ""
    out.print(f"{folder}: task {name} is removed{files}, {task.parameters:,} positions are free again")
    lost = sum(len(t.scores) for t in before.tasks if t.name != name) - sum(len(t.scores) for t in after.tasks)
    if lost:
        out.print(f"also removed {tables.counted(lost, 'score')} of other tasks, measured with {name} on")
    if sets:
        out.print(f"also removed {_named_sets(sets)} with {name}")
    out.print(capacity_text(after))
    return 0


def _named_sets(names: list[str]) -> str:
    return f"the named set{'' if len(names) == 1 else 's'} {', '.join(names)}"


def trained_on_top(manifest: Manifest, name: str) -> list[str]:
    """The tasks that were trained while `name` was active, in order.

    A task before `name` that lists it was trained on an earlier task of that name, which has been removed and trained
    again since.
    """
    names = manifest.task_names
    return [task.name for task in manifest.tasks[names.index(name) + 1 :] if name in task.trained_with]
