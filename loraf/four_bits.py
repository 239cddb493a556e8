"""Which tasks of a checkpoint were trained on a quantised base: said wherever another base may be under them."""

from __future__ import annotations

from collections.abc import Iterable

from loraf.manifest import Task

QUANTIZATION = "quantization"  # among a task's recorded settings; where a record has none, the base was not quantised


def quantization_of(task: Task) -> str | None:
    """Returns how the base was quantised when a task was trained; None: it was not, or the manifest does not say."""
    settings = task.training.get("settings")
    quantization = settings.get(QUANTIZATION) if isinstance(settings, dict) else None
    return quantization if isinstance(quantization, str) else None


def four_bit_note(tasks: Iterable[Task]) -> str:
    """Returns a sentence on the tasks that were trained on a quantised base; empty if none was."""
    methods = {task.name: quantization_of(task) for task in tasks}
    names = [name for name, method in methods.items() if method]
    if not names:
        return ""
    return (
        f"trained on the base in four bits ({methods[names[0]]}): {', '.join(names)}; "
        "on other weights of it, plain ones included, answers differ a little"
    )
