"""Grouped bars with whiskers: scores of tasks trained alone, and what the first task of a sequence keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraf_train.compare import canvas
from loraf_train.compare.cells import BASE_ROW, counted, examples, model_name, runs, task_set
from loraf_train.compare.results import BASE, ScoredTask
from loraf_train.compare.statistics import Estimate, Statistics
from loraf_train.grading.builtin import LOWER_IS_BETTER
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, 2008: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#999999"
LABELLED = 24  # bars of a panel that still have room for their numbers


@dataclass(frozen=True)
class Series:
    """Bars of one colour, one a group; None: no bar."""

    name: str
    colour: str
    ids: list[str]
    estimates: list[Estimate | None]


def scores(found: Statistics) -> Figure | None:
    """Protocol single: every evaluation set with a bar for the base and for each method; shares and losses apart."""
    methods = [None, *found.results.methods]
    units = [[t for t in found.scored if _is_loss(t) is loss] for loss in (False, True)]
    panels = [tasks for tasks in units if tasks]
    if not panels or not found.results.runs:
        return None
    figure = canvas.figure(0.8 + 4.2 * len(panels))
    for axes, tasks in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        places = [(task, name) for task in tasks for name in task.evaluations]
        groups = [f"{name}\n{examples(task, name):,}" for task, name in places]
        with_mean = len(places) > 1 and not found.mixed
        if with_mean:
            groups.append(f"mean of\nthe {len(places)} sets")
        series = []
        for i, method in enumerate(methods):
            label = method or BASE_ROW
            estimates = [found.of_set(method, t, name, t.name if method else BASE) for t, name in places]
            ids = [canvas.name("bar", label, name) for _, name in places]
            if with_mean:
                estimates.append(found.overall(method))
                ids.append(canvas.name("bar", label, "mean"))
            series.append(Series(label, COLOURS[(i - 1) % len(COLOURS)] if method else GREY, ids, estimates))
        _bars(axes, groups, series, tasks[0])
        axes.set_xlabel("evaluation set, its number of examples")
    figure.suptitle(f"{model_name(found.results)}: each task trained alone ({_means(found)})", x=0.01, ha="left")
    return figure


def kept(found: Statistics) -> Figure | None:
    """Protocol sequence: the first task's score when it has just been trained, and after the last task."""
    if not found.scored or len(found.results.tasks) < 2 or not found.results.runs:
        return None
    first, last, methods = found.scored[0], found.results.tasks[-1], found.results.methods
    states = (("just trained", first.name, COLOURS[4]), ("after the last task", last.name, COLOURS[0]))
    series = [
        Series(
            f"{state} ({task_set(found, after)} on)",
            colour,
            [canvas.name("bar", method, state) for method in methods],
            [found.of_task(method, first, after) for method in methods],
        )
        for state, after, colour in states
    ]
    figure = canvas.figure(5.0)
    axes = figure.subplots()
    shares = [found.retained(method, first) for method in methods]
    groups = [
        f"{method}\nkeeps {100 * share.mean:.1f} %" if share else method
        for method, share in zip(methods, shares, strict=True)
    ]
    base = found.of_task(None, first)
    if base is not None and math.isfinite(base.mean):
        label = f"{BASE_ROW}: {tables.score_text(base.mean, first.metric)}"
        axes.axhline(base.mean, color=canvas.INK, linestyle="--", linewidth=1, zorder=0.5, label=label, gid="base")
    _bars(axes, groups, series, first)
    axes.set_xlabel("method, and what share of its score just trained the task keeps at the end")
    title = f"{model_name(found.results)}: what the first task, {first.name}, keeps ({_means(found)})"
    figure.suptitle(f"{title}\n{counted(examples(first), 'example')}", x=0.01, ha="left")
    return figure


def _bars(axes: Axes, groups: Sequence[str], series: Sequence[Series], task: ScoredTask) -> None:
    """Args: task: any whose metric the axis is of."""
    width = 0.8 / len(series)
    labelled = len(groups) * len(series) <= LABELLED
    top = 0.0
    for s, one in enumerate(series):
        named = False
        for group, (name, estimate) in enumerate(zip(one.ids, one.estimates, strict=True)):
            if estimate is None or not math.isfinite(estimate.mean):
                continue
            x = group + (s - (len(series) - 1) / 2) * width
            label = "_nolegend_" if named else one.name
            (bar,) = axes.bar(x, estimate.mean, width * 0.92, color=one.colour, label=label)
            bar.set_gid(name)
            named = True
            low, high = estimate.interval or (estimate.mean, estimate.mean)
            if estimate.interval:
                reach = [[estimate.mean - low], [high - estimate.mean]]
                whisker = axes.errorbar(x, estimate.mean, reach, color=canvas.INK, capsize=3, linewidth=1)
                whisker.lines[2][0].set_gid(f"whisker-{name}")
            if labelled:
                text = f"{estimate.mean:.{3 if _is_loss(task) else 2}f}"
                ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axes.annotate(text, (x, high), (0, 4), textcoords="offset points", ha="center", fontsize=9, bbox=ground)
            top = max(top, high)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    margin = max(0.0, (3 - len(groups)) / 2)  # so that few bars do not become broad
    axes.set_xlim(-0.6 - margin, len(groups) - 0.4 + margin)
    axes.set_ylim(0, 1.12 * top if _is_loss(task) else 1.08)
    if not _is_loss(task):
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_ylabel("loss, nats a token (lower is better)" if _is_loss(task) else "share of right answers")
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "columnspacing": 1.2}
    axes.legend(handles, labels, ncols=max(1, len(labels)), **place)


def _is_loss(task: ScoredTask) -> bool:
    return task.metric in LOWER_IS_BETTER


def _means(found: Statistics) -> str:
    most = max(runs(found, method) for method in found.results.methods)
    if most < 2:
        return "1 seed; whiskers: Wilson's interval of 95 % over the examples"
    return f"mean of {most} seeds; whiskers: t interval of 95 %"
