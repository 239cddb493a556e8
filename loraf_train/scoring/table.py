"""The table of scores of a sequence: R[i, j], the score on task j when tasks 1 … i act, for every j up to i.

Sets are literal, so any cell can be measured at any time from the checkpoint; what a killed run did not measure, the
next one does. Cells are stored with task j in the manifest, each with its set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraf.errors import CorruptCheckpoint, Problem, UnknownTask
from loraf.manifest import FILE_NAME, Manifest
from loraf.manifest import read as read_manifest
from loraf.tasksets import TaskSet
from loraf_train.data.examples import TaskData
from loraf_train.grading.builtin import MEAN
from loraf_train.scoring import continual
from loraf_train.scoring.continual import Continual
from loraf_train.settings.config import TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraf.checkpoint import Checkpoint
    from loraf_train.scoring.evaluate import Score


@dataclass(frozen=True)
class Cell:
    """A task to be scored under a set."""

    task_set: TaskSet
    task: str


def rows(manifest: Manifest) -> list[tuple[str, TaskSet]]:
    """(task just finished, all tasks so far), in the order of training."""
    names = manifest.task_names
    return [(name, TaskSet.of(dict.fromkeys(names[: i + 1], 1.0), names)) for i, name in enumerate(names)]


def wanted(manifest: Manifest, data: Mapping[str, TaskData]) -> list[Cell]:
    """Every cell of the table, then as-trained sets that are no row of it; tasks without evaluation data have none."""
    scored = [name for name in manifest.task_names if name in data and data[name].evaluation]
    cells = [Cell(task_set, name) for _, task_set in rows(manifest) for name in scored if name in task_set.names]
    as_trained = {name: as_trained_or_none(manifest, name) for name in scored}
    return list(dict.fromkeys(cells + [Cell(task_set, name) for name, task_set in as_trained.items() if task_set]))


def as_trained_or_none(manifest: Manifest, name: str) -> TaskSet | None:
    """`Manifest.as_trained`; None where a task that it stands on has been taken out."""
    try:
        return manifest.as_trained(name)
    except UnknownTask:
        return None


def missing(manifest: Manifest, data: Mapping[str, TaskData], tasks: Iterable[TaskConfig]) -> list[Cell]:
    """Cells that are not stored, or that rest on other examples or another metric than now."""
    metrics = {task.name: task.metric for task in tasks}
    stored = {
        (entry.get("set"), task.name, entry.get("evaluation"), entry.get("metric"), entry.get("count"))
        for task in manifest.tasks
        for entry in task.scores
    }

    def is_stored(cell: Cell) -> bool:
        return all(
            (str(cell.task_set), cell.task, name, metrics.get(cell.task), len(evaluation.examples)) in stored
            for name, evaluation in data[cell.task].evaluation.items()
        )

    return [cell for cell in wanted(manifest, data) if not is_stored(cell)]


def complete(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskConfig],
    data: Mapping[str, TaskData],
    on_progress: Callable[[Cell, int, int], None] = lambda cell, done, total: None,
) -> list[Score]:
    """Measures what is missing and stores it. The model holds the base's own weights before and after.

    Where the model is divided over processes, all of them call this, measure the same, and the first stores it.

    Returns:
        the new scores.
    """
    from loraf.delta import Merger
    from loraf_train.adapter import sharding
    from loraf_train.processes import group
    from loraf_train.scoring.evaluate import score

    divided = sharding.is_sharded(model)
    if divided:
        group.wait()  # the first may be storing scores still
    cells = missing(read_manifest(checkpoint.path) if divided else checkpoint.manifest, data, tasks)
    if not cells:
        return []
    settings = {task.name: task for task in tasks}
    merger = sharding.Beside(model, checkpoint) if divided else Merger(model, checkpoint)
    found: list[Score] = []
    try:
        for task_set in dict.fromkeys(cell.task_set for cell in cells):
            merger.merge(task_set)
            for cell in cells:
                if cell.task_set == task_set:

                    def advance(done: int, total: int, cell: Cell = cell) -> None:
                        on_progress(cell, done, total)

                    evaluation = data[cell.task].evaluation
                    found += score(model, tokenizer, settings[cell.task], evaluation, task_set, advance)
    finally:
        merger.merge(TaskSet())
    if not group.is_first():
        return found
    for name in dict.fromkeys(s.task for s in found):
        new = [s.entry() for s in found if s.task == name]
        entries = merged(checkpoint.manifest.task(name).scores, new, list(data[name].evaluation))
        checkpoint.set_scores(name, entries)
    return found


def merged(
    old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]], evaluations: Sequence[str]
) -> list[dict[str, Any]]:
    """Old and new entries, a new one in place of an old one of its set and evaluation.

    The order does not depend on when each was measured: a run that was killed and started again stores the same.
    """
    by_place = {(entry["set"], entry["evaluation"]): dict(entry) for entry in (*old, *new)}
    order = {name: i for i, name in enumerate((*evaluations, MEAN))}

    def place(entry: dict[str, Any]) -> tuple[int, str, int, str]:
        known = order.get(entry["evaluation"], len(order))
        return entry["set"].count("+"), entry["set"], known, entry["evaluation"]

    return sorted(by_place.values(), key=place)


def stored(manifest: Manifest) -> list[Score]:
    """The manifest's scores.

    Raises:
        CorruptCheckpoint: an entry is not of the form that `Score.entry` writes.
    """
    from loraf_train.scoring.evaluate import Score

    found = []
    for task in manifest.tasks:
        for entry in task.scores:
            try:
                score = Score(task=task.name, **entry)
                float(score.score), int(score.count)
            except (TypeError, ValueError) as error:
                where = f"tasks.{task.name}.scores"
                remedy = "score it again with `loraf-train run`"
                raise CorruptCheckpoint(Problem(f"is malformed ({error})", where, FILE_NAME, remedy)) from None
            found.append(score)
    return found


def headlines(scores: Iterable[Score]) -> dict[tuple[str, str], Score]:
    """(set, task) → its one number: the mean of its evaluation sets, or the only one."""
    found: dict[tuple[str, str], Score] = {}
    for score in scores:
        if score.evaluation == MEAN or (score.set, score.task) not in found:
            found[score.set, score.task] = score
    return found


def summary(manifest: Manifest, scores: Iterable[Score]) -> Continual | None:
    """The table in a few numbers; row 0 is not stored, so there is no forward transfer.

    None: fewer than two tasks, a cell that was not measured, or a metric that is better when lower.
    """
    from loraf_train.scoring.evaluate import higher_is_better

    found = headlines(scores)
    names = manifest.task_names
    labels = [str(task_set) for _, task_set in rows(manifest)]
    places = {(i + 1, j + 1): (labels[i], names[j]) for i in range(len(names)) for j in range(i + 1)}
    if len(names) < 2 or any(p not in found or not higher_is_better(found[p].metric) for p in places.values()):
        return None
    r = {cell: found[place].score for cell, place in places.items()}
    return continual.numbers(r, range(1, len(names) + 1), len(names))
