"""The tables by place in the sequence: what the first task keeps, the second, …, beside LoRA trained on it alone.

Where all seeds train the tasks in one order, only the table beside LoRA alone is shown: the others would repeat those
by task.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loraf_train.compare.by_place import ALONE, ByPlace
from loraf_train.compare.report.cells import BASE_ROW, Cell, MethodRows, Sheet, number, place_name, runs
from loraf_train.compare.results import Results
from loraf_train.compare.statistics import Statistics
from loraf_train.terminal import tables


def orders(results: Results) -> Iterator[str]:
    """Yields the line of the preface that lists the orders of training, where they differ."""
    statistics = Statistics(results)
    if statistics.varied:
        seeds: dict[str, list[int]] = {}
        for run in results.runs:
            order = " → ".join(task.name for task in statistics.order_of(run))
            if run.seed not in seeds.setdefault(order, []):
                seeds[order].append(run.seed)
        listed = "; ".join(f"{order} (seeds {', '.join(map(str, numbers))})" for order, numbers in seeds.items())
        yield f"orders of training: {listed}"


def kept(statistics: Statistics) -> Iterator[Sheet]:
    if statistics.mixed or len(statistics.scored) < 2:
        return
    by_place, rows = ByPlace(statistics), MethodRows(statistics, statistics.results.methods)
    metric, higher, count = statistics.scored[0].metric, statistics.scored[0].higher_is_better, by_place.count
    last = by_place.places[-1]
    if statistics.varied:
        lines: list[list[Cell | str]] = []
        for place in by_place.places:
            columns = [
                rows.column(partial(by_place.score, place=place, after=place), metric, count, higher),
                rows.column(partial(by_place.score, place=place, after=last), metric, count, higher),
                rows.column(partial(by_place.change, place=place), metric, count, sign="+"),
                rows.column(partial(by_place.retained, place=place), "%", count),
            ]
            if place == last:  # just trained and at the end are the same
                columns[1:] = [[Cell(tables.NONE)] * len(rows.methods)] * 3
            lines += [[place_name(place), *line] for line in rows.joined(*columns)]
        yield Sheet(
            "What the first task keeps, and the later ones, whichever a seed trained there, all tasks so far on",
            ["place", "method", "seeds", "just trained", "at the end", "change", "share kept"],
            lines,
            [
                f"{tables.counted(count, 'example')} for each seed; change: positive is better, whatever the metric; "
                "share kept: the score at the end divided by that just trained; bold: the best method of each place"
            ],
            left=3,
        )
    if ALONE in statistics.results.methods:
        yield _beside_alone(statistics, by_place)


def _beside_alone(statistics: Statistics, by_place: ByPlace) -> Sheet:
    rows = MethodRows(statistics, [method for method in statistics.results.methods if method != ALONE])
    metric, count = statistics.scored[0].metric, by_place.count
    learned = [
        rows.column(partial(by_place.beside_alone, place=place), metric, count, sign="+") for place in by_place.places
    ]
    at_the_end = [rows.column(partial(by_place.share_of_alone, place=place), "%", count) for place in by_place.places]
    return Sheet(
        f"Beside LoRA trained on the task alone ({ALONE}): learned, and left at the end",
        [
            "method",
            "seeds",
            *(f"{place_name(place)} task just trained" for place in by_place.places),
            *(f"{place_name(place)} task at the end" for place in by_place.places),
        ],
        rows.joined(*learned, *at_the_end),
        [
            f"just trained, all tasks so far on, less {ALONE}'s score on the same task with the same seed: positive is "
            f"better; at the end, all tasks on: the share of {ALONE}'s score"
        ],
        left=2,
    )


def matrices(statistics: Statistics) -> Iterator[Sheet]:
    """R of each method, where the order of the tasks varies."""
    if statistics.mixed or not statistics.scored:
        return
    by_place, metric = ByPlace(statistics), statistics.scored[0].metric
    for method in statistics.results.methods:
        seeds = runs(statistics, method)
        lines: list[list[Cell | str]] = []
        for after in (0, *by_place.places):
            estimates = [by_place.score(method, place, after) for place in by_place.places]
            cells = [tables.NONE if e is None else number(e, metric, seeds, by_place.count) for e in estimates]
            lines.append([f"after the {place_name(after)}" if after else BASE_ROW, *cells])
        yield Sheet(
            f"R of {method}: score on the task of each place (column) after each place (row), all tasks so far on",
            ["", *(f"{place_name(place)} task ({metric})" for place in by_place.places)],
            lines,
            [f"{tables.counted(seeds, 'seed')}, {tables.counted(by_place.count, 'example')} for each"],
        )


def drift(statistics: Statistics) -> Iterator[Sheet]:
    """Drift of the base, where the order of the tasks varies."""
    base, by_place = statistics.base_loss(), ByPlace(statistics)
    rows = MethodRows(statistics, statistics.results.methods)
    if base is None or not any(by_place.drift(m, by_place.places[-1]) for m in statistics.results.methods):
        return
    columns = [
        rows.column(partial(by_place.drift, after=after), "loss", base.count, False, "+") for after in by_place.places
    ]
    yield Sheet(
        "Drift of the base: increase of the loss on held-out general text, in nats per token",
        ["method", "seeds", BASE_ROW, *(f"{tables.counted(after, 'task')} on" for after in by_place.places)],
        rows.joined([tables.score_text(base.mean, "loss")] * len(rows.methods), *columns),
        [f"{base.count:,} tokens; the column {BASE_ROW} is its loss, the others are the increase over it"],
        left=2,
    )
