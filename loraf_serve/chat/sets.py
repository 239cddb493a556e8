"""A task set as it is typed in the chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraf import set_text
from loraf.errors import Problem, UnknownTask
from loraf.set_text import SetText
from loraf_serve.client.results import set_text as text_of_tasks
from loraf_serve.client.set_arguments import set_arguments
from loraf_serve.v1.adapter_pb2 import Adapter


@dataclass(frozen=True)
class ChosenSet:
    """A set to answer with.

    Attributes:
        text: as it is shown.
        arguments: of `request_of`.
    """

    text: str
    arguments: Mapping[str, Any]


def choose(text: str, adapter: Adapter | None) -> ChosenSet:
    """Reads a set.

    Args:
        adapter: the one that answers; None if none is loaded.

    Raises:
        SelectionError: the text is not a set.
        UnknownTask: the adapter does not have a task of that name.
    """
    written = set_text.parse(text)
    chosen = ChosenSet(str(written), set_arguments(written, adapter))
    names = _task_names(written) if "named" not in chosen.arguments else ()
    known = [task.name for task in adapter.tasks] if adapter else []
    choices = ", ".join(known + ([named.name for named in adapter.sets] if adapter else []) + ["all", "base"])
    problems = [
        Problem(f"there is no task {name!r}", remedy=f"choose from: {choices}") for name in names if name not in known
    ]
    if problems:
        raise UnknownTask(problems)
    return chosen


def described(adapter: Adapter | None) -> list[str]:
    """What there is to choose from, line by line."""
    if adapter is None:
        return ["no adapter is loaded: only the base model answers"]
    lines = [f"tasks of {adapter.name}: {', '.join(task.name for task in adapter.tasks)}"]
    lines += [f"named set {named.name} = {text_of_tasks(named.tasks)}" for named in adapter.sets]
    return lines


def _task_names(written: SetText) -> tuple[str, ...]:
    if written.kind == set_text.AS_TRAINED:
        return (written.name,)
    return tuple(name for name, _ in written.pairs)
