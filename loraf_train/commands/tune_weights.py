"""`loraf-train tune-weights`: chooses a weight for each of some tasks without training, and stores a named set.

Every evaluation set is split in two by the run's seed. One half chooses the weights. The other is held out and only
scored, so that its scores say what the choice is worth.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraf import manifest as manifests
from loraf import set_text
from loraf.errors import ConfigError, LorafError, Problem
from loraf.files.folder_lock import locked
from loraf.manifest import Manifest
from loraf.tasksets import TaskSet, name_problem
from loraf_train.processes import launcher
from loraf_train.sequence.preflight import PreparedRun, prepare
from loraf_train.terminal import tables
from loraf_train.terminal.progress import Progress

if TYPE_CHECKING:
    from loraf_train.data.examples import EvaluationSet
    from loraf_train.data.task_data import TaskData

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
Weights = tuple[float, ...]
Advance = Callable[[int, int, str], None]


def tune_weights(
    folder: Path, path: Path, overrides: Sequence[str], tasks: str, name: str, replace: bool, limit: int | None
) -> int:
    """Stores the named set, and prints its weights and the scores on both halves.

    Args:
        folder: the checkpoint, in place of the file's `output`.
        path: the tasks.yaml, which says what the tasks are scored on.
        tasks: the tasks, `a,b` or `all`.
        name: of the set.
        replace: whether the checkpoint may already have a set of that name.
        limit: maximum number of examples of each evaluation set; None: all.

    Raises:
        LorafError: an invalid name, an unknown task, a mistake in the file, tasks without evaluation records or with
            metrics that cannot be averaged; or another process writes to the checkpoint.
    """
    if launcher.processes() > 1:
        raise ConfigError(Problem("tune-weights runs in a single process", remedy="run it without a launcher"))
    manifest = manifests.read(folder)
    problems = _name_problems(manifest, name, replace)
    try:
        names = _tasks(tasks, manifest)
    except LorafError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    with locked(folder, "loraf-train tune-weights"):
        output = f"output={json.dumps(str(folder.absolute()), ensure_ascii=False)}"
        prepared = prepare(path, [*overrides, output], limit)
        problems = _data_problems(prepared, names, name, limit)
        if problems:
            raise ConfigError(problems)
        return _tune(prepared, names, name)


def _name_problems(manifest: Manifest, name: str, replace: bool) -> list[Problem]:
    problem = name_problem(name, "set", field="--name")
    if name in manifest.task_names:
        problem = Problem(f"{name!r} is the name of a task", "--name", remedy="choose another name")
    elif name in manifest.sets and not replace:
        message = f"the checkpoint has a named set {name!r} already ({manifest.named_set(name)})"
        problem = Problem(message, "--name", remedy="choose another name, or say --replace")
    return [problem] if problem else []


def _tasks(text: str, manifest: Manifest) -> list[str]:
    """The tasks that `text` names, in the order of the checkpoint.

    Raises:
        SelectionError, UnknownTask: see `loraf.set_text.task_set`.
        ConfigError: it gives weights, or names no task.
    """
    task_set = set_text.task_set(text, manifest)
    if ":" in text or text.strip() in manifest.sets or task_set.is_base:
        remedy = "name tasks without weights, such as a,b"
        raise ConfigError(Problem(f"{text!r} does not say which weights to choose", "--tasks", remedy=remedy))
    return list(task_set.names)


def _data_problems(prepared: PreparedRun, names: Sequence[str], label: str, limit: int | None) -> list[Problem]:
    """What keeps the tasks from being scored and averaged, and a later task of the file with the set's name."""
    from loraf_train.scoring.evaluate import higher_is_better

    file = str(prepared.config.file)
    index = {task.name: i for i, task in enumerate(prepared.config.tasks)}
    problems = []
    if label in index:
        message = f"{label!r} is the name of a task of this file"
        problems.append(Problem(message, "--name", file, "choose another name"))
    for name in names:
        if name not in index:
            remedy = "add it with its data, or leave it out of --tasks"
            problems.append(Problem(f"the file has no task {name!r}", "tasks", file, remedy))
            continue
        where, evaluation = f"tasks[{index[name]}].data.eval", prepared.data[name].evaluation
        if not evaluation:
            message = f"task {name!r} has no evaluation records, by which its weight could be chosen"
            problems.append(Problem(message, where, file, "name a file with evaluation records"))
        for part in evaluation.values():
            if len(part.examples) < 2:
                message = f"evaluation set {part.name!r} has one example, which cannot be split in two"
                remedy = "set --limit to 2 or more" if limit == 1 else "use more records"
                problems.append(Problem(message, where, file, remedy))
    metrics = {name: prepared.data[name].metric for name in names if name in index}
    if len({higher_is_better(metric) for metric in metrics.values()}) > 1:
        shown = ", ".join(f"{name}: {metric}" for name, metric in metrics.items())
        message = f"the tasks' scores have no common mean: lower is better for some of the metrics ({shown})"
        problems.append(Problem(message, "tasks", file, "tune tasks whose metrics agree"))
    return problems


def _tune(prepared: PreparedRun, names: list[str], label: str) -> int:
    from loraf.checkpoint import Checkpoint
    from loraf_train.adapter.merging import merger_of
    from loraf_train.scoring.evaluate import higher_is_better, score
    from loraf_train.sequence import runner

    config, out = prepared.config, tables.console()
    checkpoint = Checkpoint.open(config.output)
    settings = {task.name: task for task in config.tasks}
    halves = {name: split(prepared.data[name], config.seed) for name in names}
    choosing = {name: pair[0] for name, pair in halves.items()}
    held_out = {name: pair[1] for name, pair in halves.items()}
    sign = 1.0 if higher_is_better(prepared.data[names[0]].metric) else -1.0
    model, tokenizer, _ = runner.load_model(config)
    merger = merger_of(model, checkpoint)

    def scores(weights: Weights, data: Mapping[str, TaskData]) -> list[float]:
        task_set = TaskSet.of(zip(names, weights, strict=True), checkpoint.manifest.task_names)
        merger.merge(task_set)  # the last of a task's scores is its only one, or the mean over its evaluation sets
        return [score(model, tokenizer, settings[name], data[name], task_set)[-1].score for name in names]

    out.print(
        f"each evaluation set is split in two by seed {config.seed}: one half chooses the weights, the other is held "
        "out and scored"
    )
    with Progress(out) as progress:
        weights = search(len(names), lambda w: sign * mean(scores(w, choosing)), progress.part)
    ones = (1.0,) * len(names)
    columns = [scores(w, data) for data in (choosing, held_out) for w in (ones, weights)]
    if not math.isfinite(mean(columns[1])):
        message = "no weights were found with which every score is a finite number"
        raise ConfigError(Problem(message, remedy="use precision: float32, or tune fewer tasks"))
    checkpoint.set_named_set(label, dict(zip(names, weights, strict=True)))

    rows = []
    for i, name in enumerate(names):
        metric = prepared.data[name].metric
        counts = [sum(len(e.examples) for e in data[name].evaluation.values()) for data in (choosing, held_out)]
        cells = [tables.score_text(column[i], metric) for column in columns]
        rows.append([name, metric, f"{weights[i]:g}", *cells, " + ".join(map(str, counts))])
    if len(names) > 1:
        cells = [tables.score_text(mean(column), prepared.data[names[0]].metric) for column in columns]
        rows.append(["mean", "", "", *cells, ""])
    headings = ["chosen on: all at 1", "chosen on: tuned", "held out: all at 1", "held out: tuned"]
    out.print(tables.table(["task", "metric", "weight", *headings, "examples"], rows, left=2))
    before, after = (sign * mean(column) for column in columns[2:])
    if after < before:
        out.print("on the held-out half these weights are worse than a weight of 1 for every task")
    out.print(f"{config.output}: named set {label} = {checkpoint.manifest.named_set(label)}")
    return 0


def split(data: TaskData, seed: int) -> tuple[TaskData, TaskData]:
    """Splits every evaluation set in two; of an odd number of examples the first half has one more.

    Evaluation sets of the same size are split alike, so that two views of the same records do not mix the halves.
    """
    halves: tuple[dict[str, EvaluationSet], dict[str, EvaluationSet]] = ({}, {})
    for name, evaluation in data.evaluation.items():
        count = len(evaluation.examples)
        first = set(random.Random(seed).sample(range(count), (count + 1) // 2))
        for half, chosen in zip(halves, (True, False), strict=True):
            examples = [e for i, e in enumerate(evaluation.examples) if (i in first) is chosen]
            half[name] = dataclasses.replace(evaluation, examples=examples)
    return dataclasses.replace(data, evaluation=halves[0]), dataclasses.replace(data, evaluation=halves[1])


def search(
    count: int, objective: Callable[[Weights], float], part: Callable[[str], Advance] = lambda name: lambda *_: None
) -> Weights:
    """Searches for the weights from GRID with the largest objective, one coordinate after another, from 1 each.

    Ends when no change of a single weight is better. Of equally good weights those nearer to 1 are better, then the
    larger ones. An objective that is no number is worse than any other.

    Args:
        count: number of weights.
        part: returns the progress report of a round.
    """
    found: dict[Weights, float] = {}

    def value(weights: Weights) -> tuple[float, float, float]:
        if weights not in found:
            measured = objective(weights)
            found[weights] = -math.inf if math.isnan(measured) else measured
        return found[weights], -sum(abs(weight - 1.0) for weight in weights), sum(weights)

    best = (1.0,) * count
    before, number = None, 0
    while best != before:
        before, number = best, number + 1
        report, done = part(f"choosing weights, round {number}"), 0
        for i in range(count):
            for weight in GRID:
                best = max(best, (*best[:i], weight, *best[i + 1 :]), key=value)
                done += 1
                report(done, count * len(GRID), f"best so far {', '.join(f'{w:g}' for w in best)}")
    return best


def mean(values: Sequence[float]) -> float:
    """Returns the mean, exact to the last bit in any order, so that equally good weights are seen to be so."""
    return math.fsum(values) / len(values)
