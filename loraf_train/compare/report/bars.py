"""Grouped bars with whiskers: the scores of tasks trained alone, and what the first task of a sequence keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraf_train.compare.by_place import ByPlace
from loraf_train.compare.report import canvas
from loraf_train.compare.report.cells import BASE_ROW, examples, model_name, runs, task_set
from loraf_train.compare.results import BASE, ScoredTask
from loraf_train.compare.statistics import Estimate, Statistics
from loraf_train.grading.builtin import LOWER_IS_BETTER
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, 2008: distinguishable with any kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#999999"
LABELLED = 24  # maximum number of bars in a panel that leaves room for their numbers


@dataclass(frozen=True)
class Series:
    """Bars of one colour, one for each group; an estimate of None has no bar."""

    name: str
    colour: str
    ids: list[str]
    estimates: list[Estimate | None]


def scores(statistics: Statistics) -> Figure | None:
    """Protocol single: for each evaluation set a bar of the base and of each method; shares and losses apart."""
    methods = [None, *statistics.results.methods]
    units = [[t for t in statistics.scored if _is_loss(t) is loss] for loss in (False, True)]
    panels = [tasks for tasks in units if tasks]
    if not panels or not statistics.results.runs:
        return None
    figure = canvas.figure(0.8 + 4.2 * len(panels))
    for axes, tasks in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        places = [(task, name) for task in tasks for name in task.evaluations]
        groups = [f"{name}\n{examples(task, name):,}" for task, name in places]
        with_mean = len(places) > 1 and not statistics.mixed
        if with_mean:
            groups.append(f"mean of\nthe {len(places)} sets")
        series = []
        for i, method in enumerate(methods):
            label = method or BASE_ROW
            estimates = [statistics.of_set(method, t, name, t.name if method else BASE) for t, name in places]
            ids = [canvas.name("bar", label, name) for _, name in places]
            if with_mean:
                estimates.append(statistics.overall(method))
                ids.append(canvas.name("bar", label, "mean"))
            series.append(Series(label, COLOURS[(i - 1) % len(COLOURS)] if method else GREY, ids, estimates))
        _bars(axes, groups, series, tasks[0])
        axes.set_xlabel("evaluation set and its number of examples")
    title = f"{model_name(statistics.results)}: each task trained alone ({_whiskers(statistics)})"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def kept(statistics: Statistics) -> Figure | None:
    """Protocol sequence: the first task's score when it had just been trained, and after the last task."""
    if not statistics.scored or len(statistics.results.tasks) < 2 or not statistics.results.runs:
        return None
    if statistics.varied:
        return _kept_by_place(statistics)
    first, last, methods = statistics.scored[0], statistics.tasks[-1], statistics.results.methods
    states = (("just trained", first.name, COLOURS[4]), ("after the last task", last.name, COLOURS[0]))
    series = [
        Series(
            f"{state} ({task_set(statistics, after)} on)",
            colour,
            [canvas.name("bar", method, state) for method in methods],
            [statistics.of_task(method, first, after) for method in methods],
        )
        for state, after, colour in states
    ]
    figure = canvas.figure(5.0)
    axes = figure.subplots()
    shares = [statistics.retained(method, first) for method in methods]
    groups = [
        f"{method}\n{100 * share.mean:.1f} %" if share else method
        for method, share in zip(methods, shares, strict=True)
    ]
    base = statistics.of_task(None, first)
    if base is not None and math.isfinite(base.mean):
        label = f"{BASE_ROW}: {tables.score_text(base.mean, first.metric)}"
        axes.axhline(base.mean, color=canvas.INK, linestyle="--", linewidth=1, zorder=0.5, label=label, gid="base")
    _bars(axes, groups, series, first)
    axes.set_xlabel("method, and the share of its just-trained score that the task keeps at the end")
    title = f"{model_name(statistics.results)}: what the first task, {first.name}, keeps ({_whiskers(statistics)})"
    figure.suptitle(f"{title}\n{tables.counted(examples(first), 'example')}", x=0.01, ha="left")
    return figure


def _kept_by_place(statistics: Statistics) -> Figure | None:
    """The same of whichever task a seed trained first."""
    if statistics.mixed:
        return None
    by_place, methods, task = ByPlace(statistics), statistics.results.methods, statistics.scored[0]
    states = (("just trained", 1, COLOURS[4]), ("after the last task", by_place.places[-1], COLOURS[0]))
    series = [
        Series(
            f"{state} (all tasks so far on)",
            colour,
            [canvas.name("bar", method, state) for method in methods],
            [by_place.score(method, 1, after) for method in methods],
        )
        for state, after, colour in states
    ]
    figure = canvas.figure(5.0)
    axes = figure.subplots()
    shares = [by_place.retained(method, 1) for method in methods]
    groups = [
        f"{method}\n{100 * share.mean:.1f} %" if share else method
        for method, share in zip(methods, shares, strict=True)
    ]
    _bars(axes, groups, series, task)
    axes.set_xlabel("method, and the share of its just-trained score that the task keeps at the end")
    title = f"{model_name(statistics.results)}: what the task trained first keeps ({_whiskers(statistics)})"
    count = tables.counted(by_place.count, "example")
    figure.suptitle(f"{title}\n{count} for each seed, whichever task it trained first", x=0.01, ha="left")
    return figure


def _bars(axes: Axes, groups: Sequence[str], series: Sequence[Series], task: ScoredTask) -> None:
    """Draws the bars. `task`: one of those on this axis, which share one unit."""
    width = 0.8 / len(series)
    labelled = len(groups) * len(series) <= LABELLED
    top = 0.0
    for s, bars in enumerate(series):
        in_legend = False
        for group, (name, estimate) in enumerate(zip(bars.ids, bars.estimates, strict=True)):
            if estimate is None or not math.isfinite(estimate.mean):
                continue
            x = group + (s - (len(series) - 1) / 2) * width
            label = "_nolegend_" if in_legend else bars.name
            (bar,) = axes.bar(x, estimate.mean, width * 0.92, color=bars.colour, label=label)
            bar.set_gid(name)
            in_legend = True
            low, high = estimate.interval or (estimate.mean, estimate.mean)
            if estimate.interval:
                reach = [[estimate.mean - low], [high - estimate.mean]]
                whisker = axes.errorbar(x, estimate.mean, reach, color=canvas.INK, capsize=3, linewidth=1)
                whisker.lines[2][0].set_gid(f"whisker-{name}")
            if labelled:
                text = f"{estimate.mean:.{3 if _is_loss(task) else 2}f}"
                background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axes.annotate(
                    text, (x, high), (0, 4), textcoords="offset points", ha="center", fontsize=9, bbox=background
                )
            top = max(top, high)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    margin = max(0.0, (3 - len(groups)) / 2)  # keeps few bars from becoming wide
    axes.set_xlim(-0.6 - margin, len(groups) - 0.4 + margin)
    axes.set_ylim(0, 1.12 * top if _is_loss(task) else 1.08)
    if not _is_loss(task):
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_ylabel("loss, nats per token (lower is better)" if _is_loss(task) else "share of correct answers")
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        ncols=max(1, len(labels)),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        columnspacing=1.2,
    )


def _is_loss(task: ScoredTask) -> bool:
    return task.metric in LOWER_IS_BETTER


def _whiskers(statistics: Statistics) -> str:
    seeds = max(runs(statistics, method) for method in statistics.results.methods)
    if seeds < 2:
        return "1 seed; whiskers: 95 % interval over the examples"
    return f"mean of {seeds} seeds; whiskers: 95 % t interval"
