"""The contents of a comparison's tables, before they are formatted for a terminal or as Markdown.

    single      Table 1 of the paper: a score per evaluation set for each method, each task trained alone
    sequence    loraf_train.compare.report.sheets_sequence, sheets_place and sheets_sets
    both        drift of the base, cost, settings

Every number comes with its task set, its number of seeds, and its number of examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from loraf.units import size_text
from loraf_train.compare.report import sheets_place, sheets_sequence, sheets_sets
from loraf_train.compare.report.cells import (
    BASE_ROW,
    Cell,
    MethodRows,
    Sheet,
    examples,
    head,
    model_name,
    task_set,
    trainable,
)
from loraf_train.compare.results import BASE, Results, ScoredTask
from loraf_train.compare.statistics import Estimate, Statistics
from loraf_train.terminal import tables


def sheets(results: Results) -> list[Sheet]:
    """Returns all tables of a comparison, in order."""
    statistics = Statistics(results)
    parts = [_single] if results.protocol == "single" else [*sheets_sequence.PARTS, *sheets_sets.PARTS]
    return [sheet for part in (*parts, _drift, _cost, _settings) for sheet in part(statistics)]


def preface(results: Results) -> list[str]:
    """Returns the lines above all tables: the comparison, how to read a number, and the environment."""
    seeds = tables.counted(len({run.seed for run in results.runs}), "seed")
    return [
        f"{', '.join(results.methods)} on {model_name(results)} ({results.parameters:,} parameters), "
        f"protocol {results.protocol}, {seeds}",
        "a number is the mean over the seeds; in brackets, with two or more seeds, Student's 95 % t interval over the "
        "seeds; with a single seed, the 95 % interval over the examples: Wilson's for shares of correct answers, "
        "bootstrapped for grades",
        *(sheets_place.orders(results) if results.protocol == "sequence" else ()),
        "bold: the best mean of its column, to the digits shown; intervals may overlap",
        *(f"{key}: {_plain(value)}" for key, value in results.surroundings.items()),
    ]


def _plain(value: object) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


def _single(statistics: Statistics) -> Iterator[Sheet]:
    rows = MethodRows(statistics, [None, *statistics.results.methods])
    places = [(task, name) for task in statistics.scored for name in task.evaluations]
    columns = []
    for task, name in places:
        estimate = partial(_after_own_training, statistics, task, name)
        columns.append(rows.column(estimate, task.metric, examples(task, name), task.higher_is_better))
    heads = [head(task, name) for task, name in places]
    notes = [f"task set: the one task that the column names; {BASE_ROW}: none"]
    if statistics.mixed:
        notes.append("no mean over the sets: shares and losses cannot be averaged")
    elif len(places) > 1:
        task, count = places[0][0], sum(examples(task, name) for task, name in places)
        columns.append(rows.column(statistics.overall, task.metric, count, task.higher_is_better))
        heads.append(f"mean of the {len(places)} sets ({tables.counted(count, 'example')})")
    parameters = zip(*(trainable(statistics, method) for method in rows.methods), strict=True)
    yield Sheet(
        f"Table 1: each task trained alone, from {model_name(statistics.results)}",
        ["method", "seeds", "trainable parameters", "share of the model's", *heads],
        rows.joined(*parameters, *columns),
        notes,
        left=2,
    )


def _after_own_training(
    statistics: Statistics, task: ScoredTask, evaluation: str, method: str | None
) -> Estimate | None:
    return statistics.of_set(method, task, evaluation, BASE if method is None else task.name)


def _drift(statistics: Statistics) -> Iterator[Sheet]:
    if statistics.varied:
        yield from sheets_place.drift(statistics)
        return
    base, rows = statistics.base_loss(), MethodRows(statistics, statistics.results.methods)
    names = [t.name for t in statistics.tasks if any(statistics.drift(m, t.name) for m in rows.methods)]
    if base is None or not names:
        return
    columns = [rows.column(partial(statistics.drift, after=after), "loss", base.count, False, "+") for after in names]
    single = statistics.results.protocol == "single"
    yield Sheet(
        "Drift of the base: increase of the loss on held-out general text, in nats per token",
        ["method", "seeds", BASE_ROW, *(f"{name if single else task_set(statistics, name)} on" for name in names)],
        rows.joined([tables.score_text(base.mean, "loss")] * len(rows.methods), *columns),
        [f"{base.count:,} tokens; the column {BASE_ROW} is its loss, the others are the increase over it"],
        left=2,
    )


def _cost(statistics: Statistics) -> Iterator[Sheet]:
    rows: list[list[Cell | str]] = []
    names = [task.name for task in statistics.tasks]
    for method in statistics.results.methods:
        at_once = any(len(run.costs) < len(names) for run in statistics.runs_of(method))
        for task in [None] if at_once else [*names, None] if len(names) > 1 else names:
            spent = statistics.spent(method, task)
            if spent is None:
                continue
            time = tables.seconds_text(spent.seconds.mean)
            if spent.seconds.interval:
                time += f" [{', '.join(map(tables.seconds_text, spent.seconds.interval))}]"
            rows.append(
                [
                    method,
                    task or "all tasks",
                    str(spent.seconds.seeds),
                    *([tables.NONE] * 2 if task is None else trainable(statistics, method, task)),
                    f"{spent.steps:,}",
                    time,
                    tables.NONE if spent.peak_bytes is None else size_text(spent.peak_bytes),
                    size_text(spent.file_bytes),
                ]
            )
    if rows:
        columns = ["trainable parameters", "share of the model's", "steps", "time", "peak memory", "kept on disk"]
        notes = [
            "steps and time include calibration; peak memory: the highest of all seeds; kept on disk: what serving the "
            "task needs besides the base model"
        ]
        yield Sheet("Cost of training", ["method", "task", "seeds", *columns], rows, notes, left=3)


def _settings(statistics: Statistics) -> Iterator[Sheet]:
    rows: list[list[Cell | str]] = []
    for method, tasks in statistics.results.settings.items():
        for task, settings in tasks.items():
            rows.append([method, task, ", ".join(_entries(settings))])
    if rows:
        yield Sheet("Settings", ["method", "task", "trained with"], rows, [], left=3)


def _entries(value: Any, name: str = "") -> Iterator[str]:
    """Yields `training.learning_rate 0.001` and so on; settings without a value are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entries(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield f"{name} {text}".strip()
