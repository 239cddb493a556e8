"""The tables of parts of a sequence: tasks with their own values alone, pairs of tasks, and how far logits moved."""

from __future__ import annotations

from collections.abc import Iterator

from loraf_train.compare.report.cells import Cell, Sheet, examples, head, number, runs
from loraf_train.compare.results import ALONE, PAIR, ScoredTask
from loraf_train.compare.statistics import AT_THE_END, Estimate, Statistics, over_seeds
from loraf_train.terminal import tables


def _selected(statistics: Statistics) -> Iterator[Sheet]:
    for method in statistics.results.methods:
        if not any(s.acting == ALONE for run in statistics.runs_of(method) for s in run.scores):
            continue
        pairs = any(s.acting == PAIR for run in statistics.runs_of(method) for s in run.scores)
        partners = [task.name for task in statistics.tasks] if pairs else []
        seeds = runs(statistics, method)
        lines: list[list[Cell | str]] = []
        for task in statistics.scored:
            estimates = [
                selected(statistics, method, task),
                *(selected(statistics, method, task, partner) for partner in partners),
                statistics.of_task(method, task, AT_THE_END),
            ]
            cells = [tables.NONE if e is None else number(e, task.metric, seeds, examples(task)) for e in estimates]
            lines.append([head(task), *cells])
        yield Sheet(
            f"Each task with part of the tasks on, at the end: {method}",
            ["task", "its own values alone", *(f"with {partner}" for partner in partners), "all tasks"],
            lines,
            [tables.counted(seeds, "seed")],
        )


def selected(statistics: Statistics, method: str, task: ScoredTask, partner: str = "") -> Estimate | None:
    """A task's score at the end with its own values alone, or with those of one other task too.

    The unweighted mean over its evaluation sets.
    """
    values = []
    for run in statistics.runs_of(method):
        scores = [
            s.score
            for s in run.scores
            if s.acting == (PAIR if partner else ALONE) and (s.task, s.partner) == (task.name, partner)
        ]
        values.append(sum(scores) / len(scores) if scores else None)
    return over_seeds(values, sum(task.evaluations.values()), 0.0)


def _changes(statistics: Statistics) -> Iterator[Sheet]:
    lines: list[list[Cell | str]] = []
    for method in statistics.results.methods:
        changes = [change for run in statistics.runs_of(method) for change in run.changes]
        for task, after in dict.fromkeys((change.task, change.after) for change in changes):
            of_place = [change for change in changes if (change.task, change.after) == (task, after)]
            predicted = over_seeds([change.predicted for change in of_place], 0, 0.0)
            measured = over_seeds([change.measured for change in of_place], 0, 0.0)
            assert predicted is not None and measured is not None
            cells = [number(estimate, "loss", len(of_place), 0) for estimate in (predicted, measured)]
            lines.append([method, task, after, str(len(of_place)), *cells])
    if lines:
        yield Sheet(
            "Change of earlier tasks' logits, predicted and measured: root mean square",
            ["method", "task", "after", "seeds", "predicted", "measured"],
            lines,
            ["by all tasks that were trained after the task, up to the one named"],
            left=4,
        )


PARTS = (_selected, _changes)
