"""What the tables of a comparison say, before they are drawn for a terminal or as Markdown.

    single      Table 1 of the paper: a score per evaluation set for each method, every task trained alone
    sequence    loraf_train.compare.sheets_sequence
    both        drift of the base, cost, settings

Every number stands with the task set that acted, the number of seeds, and the examples that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loraf_train.compare import sheets_sequence
from loraf_train.compare.cells import (
    BASE_ROW,
    Cell,
    Rows,
    Sheet,
    counted,
    examples,
    head,
    model_name,
    task_set,
    trainable,
)
from loraf_train.compare.results import BASE, Results
from loraf_train.compare.statistics import Statistics
from loraf_train.terminal import tables


def sheets(results: Results) -> list[Sheet]:
    """All tables of a comparison, in order."""
    found = Statistics(results)
    parts = [_single] if results.protocol == "single" else sheets_sequence.PARTS
    return [sheet for part in (*parts, _drift, _cost, _settings) for sheet in part(found)]


def preface(results: Results) -> list[str]:
    """What holds for all tables."""
    seeds = counted(len({run.seed for run in results.runs}), "seed")
    return [
        f"{', '.join(results.methods)} on {model_name(results)} ({results.parameters:,} parameters), "
        f"protocol {results.protocol}, {seeds}",
        "a number is the mean over the seeds; in brackets, of two or more seeds, Student's t interval of 95 % over the "
        "seeds; of a single seed, Wilson's interval of 95 % over the examples, where there is a count of right answers",
        "bold: the best mean of its column, to the digits shown; intervals may overlap",
        *(f"{key}: {_plain(value)}" for key, value in results.surroundings.items()),
    ]


def _plain(value: object) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


def _single(found: Statistics) -> Iterator[Sheet]:
    rows = Rows(found, [None, *found.results.methods])
    places = [(task, name) for task in found.scored for name in task.evaluations]
    columns = [
        rows.column(
            lambda m, task=task, name=name: found.of_set(m, task, name, BASE if m is None else task.name),
            task.metric,
            examples(task, name),
            task.higher_is_better,
        )
        for task, name in places
    ]
    heads = [head(task, name) for task, name in places]
    notes = [f"task set: the one task that the column names; {BASE_ROW}: none"]
    if found.mixed:
        notes.append("no mean over the sets: shares and losses have none in common")
    elif len(places) > 1:
        task, count = places[0][0], sum(examples(task, name) for task, name in places)
        columns.append(rows.column(found.overall, task.metric, count, task.higher_is_better))
        heads.append(f"mean of the {len(places)} sets ({counted(count, 'example')})")
    parameters = zip(*(trainable(found, method) for method in rows.methods), strict=True)
    yield Sheet(
        f"Table 1: each task trained alone, from {model_name(found.results)}",
        ["method", "seeds", "trainable parameters", "of the model's", *heads],
        rows.joined(*parameters, *columns),
        notes,
        left=2,
    )


def _drift(found: Statistics) -> Iterator[Sheet]:
    base, rows = found.base_loss(), Rows(found, found.results.methods)
    names = [t.name for t in found.results.tasks if any(found.drift(m, t.name) for m in rows.methods)]
    if base is None or not names:
        return
    columns = [
        rows.column(lambda m, after=after: found.drift(m, after), "loss", base.count, False, "+") for after in names
    ]
    single = found.results.protocol == "single"
    yield Sheet(
        "Drift of the base: by how much the loss on held-out general text is higher, nats a token",
        ["method", "seeds", BASE_ROW, *(f"{name if single else task_set(found, name)} on" for name in names)],
        rows.joined([tables.score_text(base.mean, "loss")] * len(rows.methods), *columns),
        [f"{base.count:,} tokens; the column of the {BASE_ROW} is its loss, the others are differences to it"],
        left=2,
    )


def _cost(found: Statistics) -> Iterator[Sheet]:
    rows: list[list[Cell | str]] = []
    names = [task.name for task in found.results.tasks]
    for method in found.results.methods:
        for task in [*names, None] if len(names) > 1 else names:
            spent = found.spent(method, task)
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
                    *([tables.NONE] * 2 if task is None else trainable(found, method, task)),
                    f"{spent.steps:,}",
                    time,
                    tables.NONE if spent.peak_bytes is None else tables.size_text(spent.peak_bytes),
                    tables.size_text(spent.file_bytes),
                ]
            )
    if rows:
        columns = ["trainable parameters", "of the model's", "steps", "time", "peak memory", "to be kept on disk"]
        notes = [
            "steps and time include calibration; what is to be kept is beside the base model, so that the task can be "
            "served; peak memory: the most of any seed"
        ]
        yield Sheet("Cost of training", ["method", "task", "seeds", *columns], rows, notes, left=3)


def _settings(found: Statistics) -> Iterator[Sheet]:
    rows: list[list[Cell | str]] = []
    for method, tasks in found.results.settings.items():
        for task, settings in tasks.items():
            rows.append([method, task, ", ".join(_said(settings))])
    if rows:
        yield Sheet("Settings", ["method", "task", "trained with"], rows, [], left=3)


def _said(value: Any, name: str = "") -> Iterator[str]:
    """`training.learning_rate 0.001` and so on; what is not set is left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _said(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield f"{name} {text}".strip()
