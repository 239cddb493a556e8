"""The tables of tasks trained one after the other: what each keeps (Figure 2 of the paper), the matrix R, as-trained
scores, and the four numbers of `loraf_train.scoring.continual`."""

from __future__ import annotations

from collections.abc import Iterator

from loraf_train.compare.cells import BASE_ROW, Cell, Rows, Sheet, counted, examples, head, number, runs, task_set
from loraf_train.compare.results import BASE
from loraf_train.compare.statistics import ON_ITS_DAY, Statistics
from loraf_train.terminal import tables


def _kept(found: Statistics) -> Iterator[Sheet]:
    if not found.scored:
        return
    last, rows = found.results.tasks[-1], Rows(found, found.results.methods)
    lines: list[list[Cell | str]] = []
    for task in found.scored:
        of = (task.metric, examples(task))
        columns = [
            rows.column(lambda m, t=task: found.of_task(m, t, t.name), *of, task.higher_is_better),
            rows.column(lambda m, t=task: found.of_task(m, t, last.name), *of, task.higher_is_better),
            rows.column(lambda m, t=task: found.change(m, t), *of, sign="+"),
            rows.column(lambda m, t=task: found.retained(m, t), "%", examples(task)),
        ]
        if task is last:  # it has just been trained: there is nothing to compare
            columns[1:] = [[Cell(tables.NONE)] * len(rows.methods)] * 3
        lines += [[head(task), *line] for line in rows.joined(*columns)]
    at_the_end = task_set(found, last.name)
    yield Sheet(
        f"What the first task keeps ({found.scored[0].name}), and the later ones (Figure 2), all tasks so far on",
        ["task", "method", "seeds", "just trained", f"at the end ({at_the_end} on)", "change", "share kept"],
        lines,
        [
            "task set: just trained: all tasks up to the row's own; change: a plus is better, whatever the metric; "
            "share kept: at the end by just trained; bold: among the methods of one task"
        ],
        left=3,
    )


def _matrices(found: Statistics) -> Iterator[Sheet]:
    for method in found.results.methods:
        lines: list[list[Cell | str]] = []
        for after in (BASE, *(task.name for task in found.results.tasks)):
            seeds = 1 if after == BASE else runs(found, method)
            estimates = [(task, found.of_task(method, task, after)) for task in found.scored]
            cells = [tables.NONE if e is None else number(e, t.metric, seeds, examples(t)) for t, e in estimates]
            lines.append([f"after {after}" if after else BASE_ROW, task_set(found, after), *cells])
        yield Sheet(
            f"R of {method}: score on each task (column) after each task (row), all tasks so far on",
            ["", "task set", *map(head, found.scored)],
            lines,
            [f"{counted(runs(found, method), 'seed')}; a task's score is the plain mean of its sets"],
            left=2,
        )


def _as_trained(found: Statistics) -> Iterator[Sheet]:
    measured = [
        method
        for method in found.results.methods
        if any(found.of_task(method, task, ON_ITS_DAY) for task in found.scored)
    ]
    if not measured:
        return
    rows = Rows(found, measured)
    columns = [
        rows.column(
            lambda m, t=task: found.of_task(m, t, ON_ITS_DAY), task.metric, examples(task), task.higher_is_better
        )
        for task in found.scored
    ]
    copies = [method for method in measured if found.keeps_copies(method)]
    without = [method for method in measured if method not in copies]
    notes = ["task set: what acted on the day when the column's task had just ended, not the sets of R"]
    if copies:
        notes.append(f"{', '.join(copies)}: only with a copy of what was trained, kept after every task")
    if without:
        notes.append(f"{', '.join(without)}: from the one checkpoint at the end, nothing kept beside it")
    yield Sheet(
        "As-trained scores: each task as it was on the day that it ended, measured at the end",
        ["method", "seeds", "kept copies", *map(head, found.scored)],
        rows.joined(["one a task" if method in copies else "none" for method in measured], *columns),
        notes,
        left=3,
    )


def _continual(found: Statistics) -> Iterator[Sheet]:
    last, title = len(found.results.tasks), "The sequence in four numbers, all tasks so far on"
    if last < 2 or not found.scored:
        return
    if found.mixed:
        yield Sheet(title, ["method"], [], ["not computed: shares and losses have no mean in common"])
        return
    metric, better = found.scored[0].metric, found.scored[0].higher_is_better
    count = sum(map(examples, found.scored))
    rows = Rows(found, found.results.methods)
    numbers = {method: found.continual(method) for method in rows.methods}
    columns = [
        rows.column(lambda m, name=name: numbers[m][name], metric, count, higher, sign)
        for name, higher, sign in (
            ("average", better, ""),
            ("backward_transfer", True, "+"),
            ("forgetting", False, "+"),
            ("forward_transfer", True, "+"),
        )
    ]
    turned = "" if better else " (signs turned: a loss is better when lower)"
    average = "average accuracy" if better else "average loss"
    yield Sheet(
        title,
        ["method", "seeds", "examples", average, "backward transfer", "forgetting", "forward transfer"],
        rows.joined([f"{count:,}"] * len(rows.methods), *columns),
        [
            f"R[i, j]: score on task j with the tasks up to i on; T = {last} tasks; each number is computed for every "
            "seed, then averaged",
            f"{average}: mean of the last row; the others{turned} are sums divided by T − 1 = {last - 1}: backward "
            "transfer R[T, j] − R[j, j]; forgetting max over j ≤ i < T of R[i, j], less R[T, j], a plus is forgotten; "
            "forward transfer R[j − 1, j] − R[0, j]",
        ],
        left=3,
    )


PARTS = (_kept, _matrices, _as_trained, _continual)
