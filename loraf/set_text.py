"""A task set as people write it: `math`, `math+nlu:0.5`, `all`, `base`, `as_trained=nlu`, or the name of a named set.

    text ──parse──▶ SetText ──of(manifest, named sets)──▶ TaskSet

Commas may be written for `+`. The command lines of the trainer, the server and the client read sets here, so that all
of them understand the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraf.errors import Problem, SelectionError, UnknownTask
from loraf.manifest import Manifest
from loraf.tasksets import RESERVED_NAMES, TaskSet, name_problem, read_pairs

AS_TRAINED = "as_trained"


@dataclass(frozen=True)
class SetText:
    """A set of which it is not known yet which checkpoint it selects from.

    Attributes:
        kind: "all", "base", "as_trained" or "tasks".
        pairs: of "tasks": names and weights, in the order in which they were written.
        name: of "as_trained": the task. Of "tasks": the name if it is one without a weight, which may also be the name
            of a named set; else "".
    """

    kind: str
    pairs: tuple[tuple[str, float], ...] = ()
    name: str = ""

    def of(self, manifest: Manifest, sets: Mapping[str, TaskSet] | None = None) -> TaskSet:
        """Returns the set in a checkpoint.

        Args:
            sets: the named sets; None for the checkpoint's own.

        Raises:
            UnknownTask: the checkpoint has no such task or named set, or lacks a task for `as_trained`.
        """
        return _select(self, [], manifest, sets)

    def __str__(self) -> str:
        """A text from which `parse` returns the same set."""
        if self.kind == AS_TRAINED:
            return f"{AS_TRAINED}={self.name}"
        return str(TaskSet(self.pairs)) if self.pairs else self.kind


def parse(text: str) -> SetText:
    """Reads a set without knowing the checkpoint.

    Raises:
        SelectionError: the text is not a set of any checkpoint. Lists all mistakes.
    """
    written, problems = _read(text)
    if written.kind == AS_TRAINED:
        names = [name_problem(written.name, field="tasks")]
    else:
        names = [_impossible(name, i) for i, (name, _) in enumerate(written.pairs)]
    problems += [problem for problem in names if problem]
    if problems:
        raise SelectionError(problems)
    return written


def task_set(text: str, manifest: Manifest, sets: Mapping[str, TaskSet] | None = None) -> TaskSet:
    """Returns the set that a text selects in a checkpoint.

    Args:
        sets: the named sets; None for the checkpoint's own.

    Raises:
        SelectionError: the text is not a set. Lists all mistakes.
        UnknownTask: see `SetText.of`.
    """
    return _select(*_read(text), manifest, sets)


def _read(text: str) -> tuple[SetText, list[Problem]]:
    """Returns the set, and the mistakes that are not in names."""
    text = text.strip()
    if text in RESERVED_NAMES:
        return SetText(text), []
    head, equals, task = (part.strip() for part in text.partition("="))
    if equals and head == AS_TRAINED:
        return SetText(AS_TRAINED, name=task), []
    if equals:
        remedy = f"write {AS_TRAINED}=TASK, or tasks such as math+nlu:0.5"
        return SetText("tasks"), [Problem(f"{text!r} is not a task set", "tasks", remedy=remedy)]
    pairs, problems = read_pairs(text.replace(",", "+"))
    try:
        TaskSet.of(pairs, [name for name, _ in pairs])
    except SelectionError as error:  # a name twice, a weight out of range
        problems += error.problems
    return SetText("tasks", tuple(pairs), pairs[0][0] if len(pairs) == 1 and ":" not in text else ""), problems


def _select(
    written: SetText, problems: list[Problem], manifest: Manifest, sets: Mapping[str, TaskSet] | None
) -> TaskSet:
    """Returns the set. Raises `problems` together with those of names."""
    if sets is None:
        sets = {name: manifest.named_set(name) for name in manifest.sets}
    if written.kind == AS_TRAINED:
        return manifest.as_trained(written.name)
    if written.kind == "all":
        return manifest.all_tasks()
    if written.kind == "base":
        return TaskSet()
    if written.name in sets:
        return sets[written.name]
    unknown = _unknown(written, manifest, sets)
    if problems:
        raise SelectionError([*problems, *unknown])
    if unknown:
        raise UnknownTask(unknown)
    return TaskSet.of(written.pairs, manifest.task_names)


def _impossible(name: str, place: int) -> Problem | None:
    """What is wrong with a name in any checkpoint, or None."""
    field = f"tasks[{place}].name"
    if name in RESERVED_NAMES:
        message = f"{name!r} takes no weight and no other task beside it"
        return Problem(message, field, remedy=f"write {name} alone")
    if not name:
        return Problem("no task is named", field, remedy="write tasks such as math+nlu:0.5, all, or base")
    return name_problem(name, field=field)


def _unknown(written: SetText, manifest: Manifest, sets: Mapping[str, TaskSet]) -> list[Problem]:
    """The problems of names that the checkpoint does not have."""
    may_be_set = bool(written.name and sets)
    kind = "task or named set" if may_be_set else "task"
    choices = ", ".join((*manifest.task_names, *sets) if may_be_set else manifest.task_names) or "none"
    problems = []
    for i, (name, _) in enumerate(written.pairs):
        if name in manifest.task_names:
            continue
        field = f"tasks[{i}].name"
        problem = _impossible(name, i) if name in RESERVED_NAMES else None
        if name in sets:
            remedy = f"write {name} alone, or the tasks in it"
            problem = Problem(f"{name!r} is a named set, which cannot be combined", field, remedy=remedy)
        problems.append(problem or Problem(f"there is no {kind} {name!r}", field, remedy=f"choose from: {choices}"))
    return problems
