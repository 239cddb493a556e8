"""The parts of tables: cells with a number, its interval and counts, and columns with the best number marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraf_train.compare.results import BASE, Results, ScoredTask
from loraf_train.compare.statistics import Estimate, Statistics
from loraf_train.grading.builtin import LOWER_IS_BETTER
from loraf_train.terminal import tables

BASE_ROW = "base model"


@dataclass(frozen=True)
class Cell:
    """A cell's text, and whether it is the best of its column."""

    text: str
    best: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Sheet:
    """A table, with notes below it. The first `left` columns are text."""

    title: str
    columns: list[str]
    rows: list[list[Cell | str]]
    notes: list[str]
    left: int = 1


class MethodRows:
    """The rows of a table, one for each method (None: the base model), filled column by column."""

    def __init__(self, statistics: Statistics, methods: Sequence[str | None]):
        self.methods = methods
        self._seeds = {method: runs(statistics, method) for method in methods}

    def column(
        self,
        estimate: Callable[[str | None], Estimate | None],
        metric: str,
        count: int,
        higher_is_better: bool = True,
        sign: str = "",
    ) -> list[Cell]:
        """Formats a number of each method; if there are two or more, the best in the digits shown are marked.

        Args:
            estimate: returns the number of a method.
            metric, count, sign: see `number`.
        """
        estimates = {method: estimate(method) for method in self.methods}
        means = {m: round(e.mean, _digits(metric)) for m, e in estimates.items() if e and math.isfinite(e.mean)}
        best = (max if higher_is_better else min)(means.values()) if len(means) > 1 else None
        return [
            Cell(tables.NONE)
            if e is None
            else Cell(number(e, metric, self._seeds[m], count, sign), m in means and means[m] == best)
            for m, e in estimates.items()
        ]

    def joined(self, *columns: Sequence[Cell | str]) -> list[list[Cell | str]]:
        """Returns the rows: method, number of seeds, then the columns."""
        seeds = [tables.NONE if m is None else str(self._seeds[m]) for m in self.methods]
        return [list(row) for row in zip([m or BASE_ROW for m in self.methods], seeds, *columns, strict=True)]


def number(estimate: Estimate, metric: str, seeds: int, count: int, sign: str = "") -> str:
    """Formats mean and interval; adds seeds and examples if they differ from those of row and column.

    Args:
        metric: determines the digits, as in `tables.score_text`; "%": a share in per cent.
        seeds, count: the seeds of the row, and the examples of the column.
        sign: "+": positive numbers get a sign too.
    """
    percent = metric == "%"

    def text(value: float) -> str:
        digits = _digits(metric)
        shown = round(value, digits) + 0.0  # turns −0 into 0
        return f"{100 * shown:{sign}.{digits - 2}f}" if percent else f"{shown:{sign}.{digits}f}"

    mean = text(estimate.mean) + (" %" if percent else "")
    interval = f" [{', '.join(map(text, estimate.interval))}]" if estimate.interval else ""
    deviations = [tables.counted(estimate.seeds, "seed")] if estimate.seeds != seeds else []
    deviations += [tables.counted(estimate.count, "example")] if estimate.count != count else []
    return mean + interval + (f" ({', '.join(deviations)})" if deviations else "")


def model_name(results: Results) -> str:
    """The model's name as readers know it; of a local folder only the last part."""
    name = results.model.replace("\\", "/").rstrip("/")
    return name.rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else results.model


def head(task: ScoredTask, evaluation: str = "") -> str:
    """The heading of a column of scores, on one evaluation set or a whole task, with metric and examples."""
    name = task.name if evaluation in ("", task.name) else f"{task.name}: {evaluation}"
    return f"{name} ({task.metric}, {tables.counted(examples(task, evaluation), 'example')})"


def examples(task: ScoredTask, evaluation: str = "") -> int:
    """The number of examples of one evaluation set, or of all sets of the task."""
    return task.evaluations[evaluation] if evaluation else sum(task.evaluations.values())


def task_set(statistics: Statistics, after: str) -> str:
    """The set of all tasks up to one, where their order does not vary, written as in every other table of scores."""
    names = [task.name for task in statistics.tasks]
    return "base" if after == BASE else "+".join(names[: names.index(after) + 1])


def place_name(place: int) -> str:
    """A place in the sequence as tables show it: 1st, 2nd, …"""
    ending = "th" if 11 <= place % 100 <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def runs(statistics: Statistics, method: str | None) -> int:
    """The number of a method's seeds; the base model is the same for all of them."""
    return 1 if method is None else sum(run.method == method for run in statistics.results.runs)


def trainable(statistics: Statistics, method: str | None, task: str | None = None) -> list[str]:
    """The number of trained parameters, and their share of the base model's; a range if tasks differ."""
    spent = None if method is None else statistics.spent(method, task)
    if spent is None:
        return [tables.NONE] * 2
    counts = dict.fromkeys(spent.trainable)
    total = statistics.results.parameters
    shares = dict.fromkeys(f"{100 * count / total:.3g} %" if total else tables.NONE for count in counts)
    return ["–".join(f"{count:,}" for count in counts), "–".join(shares)]


def _digits(metric: str) -> int:
    return 4 if metric in LOWER_IS_BETTER else 3
