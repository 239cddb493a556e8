"""Settings that contradict each other within a task: each alone is fine, together they could not be kept to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loraf_train.grading.builtin import PREFERENCE
from loraf_train.settings.config import RunFile, TaskConfig, TaskEntry
from loraf_train.settings.declare import SettingsModel

Key = tuple[str | int, ...]
Objection = tuple[Key, str, str]  # where, message, remedy
Resolved = Sequence[tuple[int, TaskEntry, TaskConfig]]  # index in the file's list, the task as written, and resolved


def objections(run: RunFile, tasks: Resolved) -> Iterator[Objection]:
    """Yields every contradiction of the file's tasks, at the key that is to be changed."""
    for i, entry, task in tasks:
        for where, message, remedy in (*_early_stopping(task), *_streaming(task), *_objective(run, task)):
            yield _place(i, entry, where), message, remedy


def _place(index: int, entry: TaskEntry, key: Key) -> Key:
    """Returns where the file writes a task's setting: with the task, or for the whole run."""
    part: Any = entry
    for name in key:
        if isinstance(part, SettingsModel) and name not in part.model_fields_set:
            return key
        part = getattr(part, str(name), None)
    return ("tasks", index, *key)


def _objective(run: RunFile, task: TaskConfig) -> Iterator[Objection]:
    """Settings of the other objective, and those that DPO cannot keep to."""
    named = f"task {task.name!r} has objective: {task.objective}"
    if task.objective == "sft":
        for field in ("chosen", "rejected"):
            if getattr(task.data, field) is not None:
                yield ("data", field), f"{named}, which knows no {field} answer", "leave it out, or use objective: dpo"
        if task.training.beta is not None:
            remedy = "leave it out, or write it under the training: of a task with objective: dpo"
            yield ("training", "beta"), f"{named}, which has no beta", remedy
        if task.metric == PREFERENCE:
            yield ("metric",), f"{named}, whose records hold no preferences", "use another metric, or objective: dpo"
        return
    if task.metric not in (None, PREFERENCE):
        yield ("metric",), f"{named}, whose answers are scored by {PREFERENCE}", "leave it out"
    if task.max_new_tokens is not None:
        yield ("max_new_tokens",), f"{named}, and is scored without an answer being written", "leave it out"
    if task.data.completion is not None:
        yield ("data", "completion"), f"{named}, which has two answers", "write chosen: and rejected: in its place"
    if task.data.streaming:
        yield ("data", "streaming"), f"{named}, whose records are read whole", "use streaming: false"
    if task.training.packing:
        yield ("training", "packing"), f"{named}, whose answers stand in rows of their own", "use packing: false"
    if "lm_head" in run.adapter.target_modules:
        message = f"{named}, and TRL computes probabilities with the weight of lm_head itself"
        yield ("adapter", "target_modules"), message, "leave out lm_head"
    for name, source in task.data.eval.items():
        if source.choices:
            yield ("data", "eval", name, "choices"), f"{named}, which has no choices", "leave them out"
    if task.recipe == "lori" and task.data.chosen is None:
        yield ("data", "chosen"), f"{named}, for which the recipe lori has no templates", "give data.prompt, chosen"


def _streaming(task: TaskConfig) -> Iterator[Objection]:
    """What would need all records at once, or their number."""
    if not task.data.streaming:
        return
    training, because = task.training, f"task {task.name!r} streams its records, so their number is not known"
    if training.max_steps is None:
        yield ("training", "max_steps"), f"{because}, and epochs cannot be counted", "give training.max_steps"
    if task.data.limit is not None:
        yield ("data", "limit"), f"{because}, and no sample can be drawn from all of them", "leave it out"
    if training.early_stopping is not None and training.early_stopping.every is None:
        remedy = "say after how many steps to evaluate: {patience: …, every: …}"
        yield ("training", "early_stopping"), f"{because}, and epochs cannot be counted", remedy


def _early_stopping(task: TaskConfig) -> Iterator[Objection]:
    stopping = task.training.early_stopping
    key = ("training", "early_stopping")
    if stopping is None:
        return
    if not task.data.eval:
        remedy = "give the task evaluation sets (data.eval), or set its training.early_stopping: off"
        yield key, f"task {task.name!r} has no evaluation records that could say when to stop", remedy
    most = task.training.max_steps
    if most is not None and stopping.every is not None and stopping.every > most:
        message = f"task {task.name!r} is evaluated every {stopping.every} steps, and has {most}"
        yield (*key, "every"), message, "use a smaller number of steps"
