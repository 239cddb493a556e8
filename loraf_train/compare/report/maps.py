"""Heat maps: R of each method, and where each task's positions are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loraf_train.compare.by_place import ByPlace
from loraf_train.compare.report import canvas
from loraf_train.compare.report.cells import BASE_ROW, examples, model_name, place_name, runs
from loraf_train.compare.results import BASE, Run
from loraf_train.compare.statistics import Statistics
from loraf_train.grading.builtin import LOWER_IS_BETTER
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLOURS = "cividis"  # perceptually uniform, and the same for any kind of colour vision
NUMBERED = 16  # maximum number of columns in a map of positions that leaves room for numbers


def matrix(statistics: Statistics) -> Figure | None:
    """Protocol sequence: R of every method. All shares have one colour scale, losses one for each task."""
    tasks, methods = statistics.scored, statistics.results.methods
    if statistics.varied and statistics.mixed:
        return None
    afters = [BASE, *(task.name for task in statistics.tasks)]
    by_place, means = ByPlace(statistics), {}
    for method in methods:
        for i, after in enumerate(afters):
            for j, task in enumerate(tasks):
                if statistics.varied:
                    estimate = by_place.score(method, j + 1, i)
                else:
                    estimate = statistics.of_task(method, task, after)
                if estimate is not None:
                    means[method, i, j] = estimate.mean
    if not means:
        return None
    panel_columns = min(len(methods), 3 if len(tasks) <= 3 else 2 if len(tasks) <= 6 else 1)
    panel_rows = math.ceil(len(methods) / panel_columns)
    figure = canvas.figure(1.2 + panel_rows * (1.1 + 0.55 * len(afters)))
    panels = list(figure.subplots(panel_rows, panel_columns, squeeze=False).flat)
    shades = [_shades(statistics, [v for (_, _, k), v in means.items() if k == j], j) for j in range(len(tasks))]
    names = [f"{task.name}\n({examples(task):,})" for task in tasks]
    rows = [f"after {after}" if after else BASE_ROW for after in afters]
    if statistics.varied:
        names = [f"{place_name(place)} task\n({by_place.count:,})" for place in by_place.places]
        rows = [BASE_ROW, *(f"after the {place_name(place)}" for place in by_place.places)]
    for axes, method in zip(panels, methods, strict=False):
        cells = {(i, j): v for (m, i, j), v in means.items() if m == method}
        texts = {(i, j): f"{v:.{3 if tasks[j].metric in LOWER_IS_BETTER else 2}f}" for (i, j), v in cells.items()}
        colours = {(i, j): shades[j](v) for (i, j), v in cells.items()}
        _grid(axes, names, rows, texts, colours, method, 12)
        axes.set_title(f"{method} ({tables.counted(runs(statistics, method), 'seed')})")
        axes.set_xlabel("scored task (examples)")
    for axes in panels[len(methods) :]:
        axes.remove()
    losses = any(task.metric in LOWER_IS_BETTER for task in tasks)
    legend = "light: good; shares from 0 to 1" + (", losses over the range of their column" if losses else "")
    title = f"{model_name(statistics.results)}: R, scores after each task, all tasks so far on ({legend})"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _shades(statistics: Statistics, values: Sequence[float], j: int) -> Callable[[float], float]:
    """Returns a function from a score on task j to a shade from 0 (worst) to 1 (best).

    A share is its own shade; a loss is placed within the range of `values`.
    """
    finite = [value for value in values if math.isfinite(value)]
    if statistics.scored[j].metric not in LOWER_IS_BETTER or not finite:
        return lambda value: value
    low, high = min(finite), max(finite)
    return lambda value: (high - value) / (high - low) if high > low else 1.0


def positions(statistics: Statistics) -> Figure | None:
    """Protocol sequence: a map for each task of a run that has masks, and one of the free positions."""
    run = _with_masks(statistics.results.runs)
    if run is None:
        return None
    sizes = {mask.module: mask.size for mask in run.masks}
    owned: dict[str, dict[str, int]] = {}
    for mask in run.masks:
        owned.setdefault(mask.task, {})[mask.module] = mask.positions
    free = {module: size - sum(counts.get(module, 0) for counts in owned.values()) for module, size in sizes.items()}
    places = {module: _place(module) for module in sizes}
    layers = sorted({layer for layer, _ in places.values()}, key=lambda layer: (layer is None, layer))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    top_share = max(counts[module] / sizes[module] for counts in owned.values() for module in counts) or 1.0
    panel_columns = 2 if len(layers) <= NUMBERED // 2 else 1
    panels: list[tuple[str | None, dict[str, int]]] = [*owned.items(), (None, free)]
    panel_rows = math.ceil(len(panels) / panel_columns)
    figure = canvas.figure(1.0 + panel_rows * (1.1 + 0.36 * len(kinds)))
    grid = figure.subplots(panel_rows, panel_columns, squeeze=False)
    for axes, (name, counts) in zip(grid.flat, panels, strict=False):
        shares: dict[tuple[int, int], float] = {}
        texts: dict[tuple[int, int], str] = {}
        for module, count in counts.items():
            layer, kind = places[module]
            cell = (kinds.index(kind), layers.index(layer))
            shares[cell] = count / sizes[module]
            texts[cell] = _short(count) if len(layers) <= NUMBERED else ""
        scale = 1.0 if name is None else top_share
        colours = {cell: share / scale for cell, share in shares.items()}
        labels = ["–" if layer is None else str(layer) for layer in layers]
        _grid(axes, labels, kinds, texts, colours, "free" if name is None else f"task-{name}", 9)
        total = sum(counts.values())
        share = f"{100 * total / sum(sizes.values()):.3g} %"
        axes.set_title(f"{name or 'still free'}: {total:,} positions, {share} of all")
        axes.set_xlabel("layer")
        _bar(figure, axes, scale, "share of the module")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    title = f"{model_name(statistics.results)}: where each task's positions lie ({run.method}, seed {run.seed})"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _with_masks(runs: Sequence[Run]) -> Run | None:
    """The first run of loraf with masks, or else the first run with masks."""
    with_masks = [run for run in runs if run.masks]
    return next((run for run in with_masks if run.method == "loraf"), with_masks[0] if with_masks else None)


def _place(module: str) -> tuple[int | None, str]:
    """(layer, projection) of a name such as `model.layers.3.mlp.up_proj`; None: it is outside the layers."""
    *path, kind = module.split(".")
    return next((int(part) for part in path if part.isdecimal()), None), kind


def _short(count: int) -> str:
    """A count in about three digits: `26.2k`."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _grid(
    axes: Axes,
    columns: Sequence[str],
    rows: Sequence[str],
    texts: dict[tuple[int, int], str],
    shades: dict[tuple[int, int], float],
    owner: str,
    size: float,
) -> None:
    """Draws a rectangle with a text for each cell (row, column); a missing cell stays white.

    Args:
        shades: cell → 0 to 1.
        owner: part of the cells' ids.
        size: of the texts, in points.
    """
    from matplotlib.patches import Rectangle

    colours = _colours()
    for (i, j), shade in shades.items():
        known = math.isfinite(shade)
        colour: Any = colours(min(max(shade, 0.0), 1.0)) if known else "white"
        cell = Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5)
        cell.set_gid(canvas.name("cell", owner, i, j))
        axes.add_patch(cell)
        if texts.get((i, j)):
            ink = "white" if known and shade < 0.5 else "black"
            axes.text(j, i, texts[i, j], ha="center", va="center", color=ink, fontsize=size)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    every = math.ceil(len(columns) / 32)
    axes.set_xticks(range(0, len(columns), every), columns[::every])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _bar(figure: Figure, axes: Axes, top: float, label: str) -> None:
    """Adds the colour scale of a map, from 0 to `top`, in per cent."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import PercentFormatter

    scale = ScalarMappable(Normalize(0, top), _colours())
    bar = figure.colorbar(scale, ax=axes, label=label, format=PercentFormatter(1.0, symbol=" %"), aspect=12, pad=0.01)
    bar.outline.set_visible(False)


def _colours() -> Colormap:
    import matplotlib

    return matplotlib.colormaps[COLOURS]
