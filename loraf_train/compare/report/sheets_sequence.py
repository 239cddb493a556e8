"""The tables of tasks trained one after the other.

What each task keeps (Figure 2 of the paper), the matrix R, as-trained scores, and the four numbers of
`loraf_train.scoring.continual`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from loraf_train.compare.report import sheets_place
from loraf_train.compare.report.cells import BASE_ROW, Cell, MethodRows, Sheet, examples, head, number, runs, task_set
from loraf_train.compare.results import BASE
from loraf_train.compare.statistics import AT_THE_END, JUST_TRAINED, Estimate, Statistics
from loraf_train.terminal import tables


def _kept(statistics: Statistics) -> Iterator[Sheet]:
    if not statistics.scored:
        return
    last, rows = statistics.tasks[-1], MethodRows(statistics, statistics.results.methods)
    lines: list[list[Cell | str]] = []
    for task in statistics.scored:
        metric, count, higher = task.metric, examples(task), task.higher_is_better
        columns = [
            rows.column(partial(statistics.of_task, task=task, after=task.name), metric, count, higher),
            rows.column(partial(statistics.of_task, task=task, after=AT_THE_END), metric, count, higher),
            rows.column(partial(statistics.change, task=task), metric, count, sign="+"),
            rows.column(partial(statistics.retained, task=task), "%", count),
        ]
        if task is last and not statistics.varied:  # just trained and at the end are the same
            columns[1:] = [[Cell(tables.NONE)] * len(rows.methods)] * 3
        lines += [[head(task), *line] for line in rows.joined(*columns)]
    if statistics.varied:
        title = "What each task keeps, all tasks so far on, over the seeds whatever its place"
        at_the_end = "at the end"
    else:
        first = statistics.scored[0].name
        title = f"What the first task keeps ({first}), and the later tasks (Figure 2), all tasks so far on"
        at_the_end = f"at the end ({task_set(statistics, last.name)} on)"
    notes = [
        "just trained: with all tasks up to the row's own on; change: positive is better, whatever the metric; share "
        "kept: the score at the end divided by the score just trained; bold: the best method of each task"
    ]
    if statistics.varied:
        notes.append("change and share kept: without the seeds that trained the task last")
    columns_of = ["task", "method", "seeds", "just trained", at_the_end, "change", "share kept"]
    yield Sheet(title, columns_of, lines, notes, left=3)


def _matrices(statistics: Statistics) -> Iterator[Sheet]:
    if statistics.varied:
        yield from sheets_place.matrices(statistics)
        return
    for method in statistics.results.methods:
        lines: list[list[Cell | str]] = []
        for after in (BASE, *(task.name for task in statistics.tasks)):
            seeds = 1 if after == BASE else runs(statistics, method)
            estimates = [(task, statistics.of_task(method, task, after)) for task in statistics.scored]
            cells = [tables.NONE if e is None else number(e, t.metric, seeds, examples(t)) for t, e in estimates]
            lines.append([f"after {after}" if after else BASE_ROW, task_set(statistics, after), *cells])
        yield Sheet(
            f"R of {method}: score on each task (column) after each task (row), all tasks so far on",
            ["", "task set", *map(head, statistics.scored)],
            lines,
            [
                f"{tables.counted(runs(statistics, method), 'seed')}; a task's score is the unweighted mean over its "
                "evaluation sets"
            ],
            left=2,
        )


def _as_trained(statistics: Statistics) -> Iterator[Sheet]:
    measured = [
        method
        for method in statistics.results.methods
        if any(statistics.of_task(method, task, JUST_TRAINED) for task in statistics.scored)
    ]
    if not measured:
        return
    rows = MethodRows(statistics, measured)
    columns = [
        rows.column(
            partial(statistics.of_task, task=task, after=JUST_TRAINED),
            task.metric,
            examples(task),
            task.higher_is_better,
        )
        for task in statistics.scored
    ]
    copies = [method for method in measured if statistics.keeps_copies(method)]
    without = [method for method in measured if method not in copies]
    notes = ["task set: the tasks that were on when the column's task had just been trained, not the sets of R"]
    if copies:
        notes.append(f"{', '.join(copies)}: only with a copy of the trained parameters, kept after every task")
    if without:
        notes.append(f"{', '.join(without)}: from the single checkpoint at the end, without copies")
    yield Sheet(
        "As-trained scores: each task as it was when it had just been trained, measured at the end",
        ["method", "seeds", "kept copies", *map(head, statistics.scored)],
        rows.joined(["one per task" if method in copies else "none" for method in measured], *columns),
        notes,
        left=3,
    )


def _continual(statistics: Statistics) -> Iterator[Sheet]:
    last, title = len(statistics.results.tasks), "The sequence in four numbers, all tasks so far on"
    if last < 2 or not statistics.scored:
        return
    if statistics.mixed:
        yield Sheet(title, ["method"], [], ["not computed: shares and losses cannot be averaged"])
        return
    metric, better = statistics.scored[0].metric, statistics.scored[0].higher_is_better
    count = sum(map(examples, statistics.scored))
    rows = MethodRows(statistics, statistics.results.methods)
    numbers = {method: statistics.continual(method) for method in rows.methods}
    columns = [
        rows.column(partial(_number_of, numbers, name), metric, count, higher, sign)
        for name, higher, sign in (
            ("average", better, ""),
            ("backward_transfer", True, "+"),
            ("forgetting", False, "+"),
            ("forward_transfer", True, "+"),
        )
    ]
    reversed_signs = "" if better else " (signs reversed: a lower loss is better)"
    average = "average accuracy" if better else "average loss"
    yield Sheet(
        title,
        ["method", "seeds", "examples", average, "backward transfer", "forgetting", "forward transfer"],
        rows.joined([f"{count:,}"] * len(rows.methods), *columns),
        [
            f"R[i, j]: score on task j with the tasks up to i on; T = {last} tasks; each number is computed for every "
            "seed, then averaged",
            f"{average}: mean of the last row; the others{reversed_signs} are sums divided by T − 1 = {last - 1}: "
            "backward transfer R[T, j] − R[j, j]; forgetting max over j ≤ i < T of R[i, j] minus R[T, j], positive: "
            "forgotten; forward transfer R[j − 1, j] − R[0, j]",
        ],
        left=3,
    )


def _number_of(
    numbers: Mapping[str | None, Mapping[str, Estimate | None]], name: str, method: str | None
) -> Estimate | None:
    return numbers[method][name]


PARTS = (sheets_place.kept, _kept, _matrices, _as_trained, _continual)
