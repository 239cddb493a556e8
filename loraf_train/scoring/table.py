"""The score table of a sequence: R[i, j], the score on task j while tasks 1 … i are active, for every j up to i.

Task sets are explicit, so any score can be measured from the checkpoint at any time. What a killed run did not measure,
the next run does. Scores are stored with task j in the manifest, each with its set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraf.errors import CorruptCheckpoint, Problem
from loraf.manifest import FILE_NAME, Manifest
from loraf.manifest import read as read_manifest
from loraf.tasksets import TaskSet
from loraf_train.data.task_data import TaskData
from loraf_train.grading.builtin import MEAN
from loraf_train.scoring import continual
from loraf_train.scoring.continual import Continual
from loraf_train.scoring.identity import evaluation_digest
from loraf_train.set_options import as_trained_or_none
from loraf_train.settings.config import TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraf.checkpoint import Checkpoint
    from loraf_train.scoring.evaluate import Score


@dataclass(frozen=True)
class ScoreKey:
    """What a score belongs to: a task, and the task set that is active."""

    task_set: TaskSet
    task: str


def rows(manifest: Manifest) -> list[tuple[str, TaskSet]]:
    """Returns (task just trained, set of all tasks so far), in the order of training."""
    names = manifest.task_names
    return [(name, TaskSet.of(dict.fromkeys(names[: i + 1], 1.0), names)) for i, name in enumerate(names)]


def score_keys(manifest: Manifest, data: Mapping[str, TaskData]) -> list[ScoreKey]:
    """Returns the keys of the whole table, then those of as-trained sets that are not rows of it.

    Tasks without evaluation data have no scores.
    """
    scored = [name for name in manifest.task_names if name in data and data[name].evaluation]
    keys = [ScoreKey(task_set, name) for _, task_set in rows(manifest) for name in scored if name in task_set.names]
    as_trained = {name: as_trained_or_none(manifest, name) for name in scored}
    return list(dict.fromkeys(keys + [ScoreKey(task_set, name) for name, task_set in as_trained.items() if task_set]))


def missing(manifest: Manifest, tasks: Sequence[TaskConfig], data: Mapping[str, TaskData]) -> list[ScoreKey]:
    """Returns the keys without a current score: none is stored, or the evaluation or its scoring has changed since."""
    stored = _stored_digests(manifest)
    current = _current_digests(tasks, data)
    return [
        key
        for key in score_keys(manifest, data)
        if any(stored.get((key, name)) != digest for name, digest in current[key.task].items())
    ]


def outdated(manifest: Manifest, tasks: Sequence[TaskConfig], data: Mapping[str, TaskData]) -> list[str]:
    """Returns the tasks with a stored score of another evaluation, or of the same scored in another way."""
    stored = _stored_digests(manifest)
    current = _current_digests(tasks, data)
    keys = score_keys(manifest, data)
    return [
        name
        for name, digests in current.items()
        if any(stored.get((k, e), d) != d for k in keys if k.task == name for e, d in digests.items())
    ]


def _stored_digests(manifest: Manifest) -> dict[tuple[ScoreKey, str], str]:
    """(key, evaluation) → what the stored score was measured on; scores of earlier releases do not say: empty."""
    labels = {str(task_set): task_set for _, task_set in rows(manifest)}
    labels |= {str(s): s for s in (as_trained_or_none(manifest, name) for name in manifest.task_names) if s}
    return {
        (ScoreKey(labels[entry["set"]], task.name), entry["evaluation"]): entry.get("digest", "")
        for task in manifest.tasks
        for entry in task.scores
        if entry["set"] in labels
    }


def _current_digests(tasks: Sequence[TaskConfig], data: Mapping[str, TaskData]) -> dict[str, dict[str, str]]:
    """Task → evaluation → its digest."""
    return {
        task.name: {
            n: evaluation_digest(task, data[task.name].metric, e) for n, e in data[task.name].evaluation.items()
        }
        for task in tasks
        if task.name in data
    }


def complete(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskConfig],
    data: Mapping[str, TaskData],
    on_progress: Callable[[ScoreKey, int, int], None] = lambda key, done, total: None,
) -> list[Score]:
    """Measures and stores the missing scores. The model holds the base's own weights before and after.

    If the model is sharded over processes, all of them must call this; they measure the same, and the first stores it.

    Returns:
        The new scores.
    """
    from loraf_train.adapter import sharding
    from loraf_train.adapter.merging import merger_of
    from loraf_train.processes import group
    from loraf_train.scoring.evaluate import score

    sharded = sharding.is_sharded(model)
    if sharded:
        group.wait()  # the first process may still be storing scores
    keys = missing(read_manifest(checkpoint.path) if sharded else checkpoint.manifest, tasks, data)
    if not keys:
        return []
    settings = {task.name: task for task in tasks}
    merger = sharding.ShardedMerger(model, checkpoint) if sharded else merger_of(model, checkpoint)
    scores: list[Score] = []
    try:
        for task_set in dict.fromkeys(key.task_set for key in keys):
            merger.merge(task_set)
            for key in keys:
                if key.task_set == task_set:

                    def advance(done: int, total: int, key: ScoreKey = key) -> None:
                        on_progress(key, done, total)

                    scores += score(model, tokenizer, settings[key.task], data[key.task], task_set, advance)
    finally:
        merger.merge(TaskSet())
    if not group.is_first():
        return scores
    for name in dict.fromkeys(s.task for s in scores):
        new = [s.entry() for s in scores if s.task == name]
        entries = merged(checkpoint.manifest.task(name).scores, new, list(data[name].evaluation))
        checkpoint.set_scores(name, entries)
    return scores


def merged(
    old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]], evaluations: Sequence[str]
) -> list[dict[str, Any]]:
    """Merges entries; a new one replaces an old one of the same set and evaluation.

    The order does not depend on when each was measured, so a run that was killed and started again stores the same.
    """
    entries = {(entry["set"], entry["evaluation"]): dict(entry) for entry in (*old, *new)}
    order = {name: i for i, name in enumerate((*evaluations, MEAN))}

    def sort_key(entry: dict[str, Any]) -> tuple[int, str, int, str]:
        place = order.get(entry["evaluation"], len(order))
        return entry["set"].count("+"), entry["set"], place, entry["evaluation"]

    return sorted(entries.values(), key=sort_key)


def stored(manifest: Manifest) -> list[Score]:
    """Returns the manifest's scores.

    Raises:
        CorruptCheckpoint: an entry does not have the form that `Score.entry` writes.
    """
    from loraf_train.scoring.evaluate import Score

    scores = []
    for task in manifest.tasks:
        for entry in task.scores:
            try:
                parts = {name: entry[name] for name in ("set", "evaluation", "metric", "score", "count")}
                interval = entry.get("interval")
                interval = None if interval is None else (float(interval[0]), float(interval[1]))
                score = Score(task=task.name, **parts, digest=entry.get("digest", ""), interval=interval)
                float(score.score), int(score.count)
            except (TypeError, ValueError, LookupError) as error:
                where = f"tasks.{task.name}.scores"
                remedy = "score it again with `loraf-train run`"
                raise CorruptCheckpoint(Problem(f"is malformed ({error})", where, FILE_NAME, remedy)) from None
            scores.append(score)
    return scores


def headlines(scores: Iterable[Score]) -> dict[tuple[str, str], Score]:
    """Returns (set, task) → the score that stands for it: the mean over its evaluation sets, or the only one."""
    by_key: dict[tuple[str, str], Score] = {}
    for score in scores:
        if score.evaluation == MEAN or (score.set, score.task) not in by_key:
            by_key[score.set, score.task] = score
    return by_key


def summary(manifest: Manifest, scores: Iterable[Score]) -> Continual | None:
    """Returns the table in a few numbers; row 0 is not stored, so there is no forward transfer.

    None: there are fewer than two tasks, a score is missing, or lower is better for a metric.
    """
    from loraf_train.scoring.evaluate import higher_is_better

    by_key = headlines(scores)
    names = manifest.task_names
    labels = [str(task_set) for _, task_set in rows(manifest)]
    places = {(i + 1, j + 1): (labels[i], names[j]) for i in range(len(names)) for j in range(i + 1)}
    if len(names) < 2 or any(p not in by_key or not higher_is_better(by_key[p].metric) for p in places.values()):
        return None
    r = {cell: by_key[place].score for cell, place in places.items()}
    return continual.numbers(r, range(1, len(names) + 1), len(names))
