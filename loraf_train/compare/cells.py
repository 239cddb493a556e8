"""What tables are made of: cells with a number, its interval and counts, and columns in which the best is marked."""

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
    """Text, and whether it is the best of its column."""

    text: str
    best: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Sheet:
    """A table. The first `left` columns are text. `notes` stand below it."""

    title: str
    columns: list[str]
    rows: list[list[Cell | str]]
    notes: list[str]
    left: int = 1


class Rows:
    """A table's rows, one a method (None: the bare model), to be filled column by column."""

    def __init__(self, found: Statistics, methods: Sequence[str | None]):
        self.methods = methods
        self._seeds = {method: runs(found, method) for method in methods}

    def column(
        self,
        estimate: Callable[[str | None], Estimate | None],
        metric: str,
        count: int,
        higher_is_better: bool = True,
        sign: str = "",
    ) -> list[Cell]:
        """Numbers, the best of two or more marked, and all that are equal to it in the digits shown.

        Args:
            estimate: method → number.
            metric, count, sign: see `number`.
        """
        found = {method: estimate(method) for method in self.methods}
        means = {m: round(e.mean, _digits(metric)) for m, e in found.items() if e and math.isfinite(e.mean)}
        best = (max if higher_is_better else min)(means.values()) if len(means) > 1 else None
        return [
            Cell(tables.NONE)
            if e is None
            else Cell(number(e, metric, self._seeds[m], count, sign), m in means and means[m] == best)
            for m, e in found.items()
        ]

    def joined(self, *columns: Sequence[Cell | str]) -> list[list[Cell | str]]:
        """The rows: method, seeds, then the columns."""
        seeds = [tables.NONE if m is None else str(self._seeds[m]) for m in self.methods]
        return [list(row) for row in zip([m or BASE_ROW for m in self.methods], seeds, *columns, strict=True)]


def number(estimate: Estimate, metric: str, seeds: int, count: int, sign: str = "") -> str:
    """Mean and interval; seeds and examples too where they are not those that row and column give.

    Args:
        metric: decides the digits, as in `report.score_text`; "%": a share in per cent.
        seeds, count: what row and column say.
        sign: "+": a sign before positive numbers too.
    """
    percent = metric == "%"

    def text(value: float) -> str:
        digits = _digits(metric)
        shown = round(value, digits) + 0.0  # no minus before a zero
        return f"{100 * shown:{sign}.{digits - 2}f}" if percent else f"{shown:{sign}.{digits}f}"

    mean = text(estimate.mean) + (" %" if percent else "")
    interval = f" [{', '.join(map(text, estimate.interval))}]" if estimate.interval else ""
    unlike = [counted(estimate.seeds, "seed")] if estimate.seeds != seeds else []
    unlike += [counted(estimate.count, "example")] if estimate.count != count else []
    return mean + interval + (f" ({', '.join(unlike)})" if unlike else "")


def model_name(results: Results) -> str:
    """The model as readers know it: of a local folder its last part."""
    name = results.model.replace("\\", "/").rstrip("/")
    return name.rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else results.model


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def head(task: ScoredTask, evaluation: str = "") -> str:
    """Names a column of scores of one evaluation set, or of a whole task, with what they rest on."""
    name = task.name if evaluation in ("", task.name) else f"{task.name}: {evaluation}"
    return f"{name} ({task.metric}, {counted(examples(task, evaluation), 'example')})"


def examples(task: ScoredTask, evaluation: str = "") -> int:
    return task.evaluations[evaluation] if evaluation else sum(task.evaluations.values())


def task_set(found: Statistics, after: str) -> str:
    """All tasks up to one, in the words of every other table of scores."""
    names = [task.name for task in found.results.tasks]
    return "base" if after == BASE else "+".join(names[: names.index(after) + 1])


def runs(found: Statistics, method: str | None) -> int:
    """Seeds of a method; the bare model is the same for all."""
    return 1 if method is None else sum(run.method == method for run in found.results.runs)


def trainable(found: Statistics, method: str | None, task: str | None = None) -> list[str]:
    """Count, and share of the bare model's parameters; from the least to the most where tasks differ."""
    spent = None if method is None else found.spent(method, task)
    if spent is None:
        return [tables.NONE] * 2
    counts = dict.fromkeys(spent.trainable)
    total = found.results.parameters
    shares = dict.fromkeys(f"{100 * count / total:.3g} %" if total else tables.NONE for count in counts)
    return ["–".join(f"{count:,}" for count in counts), "–".join(shares)]


def _digits(metric: str) -> int:
    return 4 if metric in LOWER_IS_BETTER else 3
