"""The pictures of a comparison, each as PNG and as SVG.

    single      scores       for each evaluation set a bar of each method
    sequence    kept         for each method the first task's score when just trained and at the end
                matrix       R of each method as a heat map
                positions    where each task's positions are, by layer and projection

With one version of matplotlib the same results give the same bytes of SVG. Text is stored as text, and bars and cells
have ids (`bar-lora-boolq`, `cell-lora-2-1`) by which tests find them.
"""

from __future__ import annotations

from pathlib import Path

from loraf_train.compare.report import bars, canvas, maps
from loraf_train.compare.results import Results
from loraf_train.compare.statistics import Statistics


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the pictures of the comparison's protocol into `folder`, and returns their paths.

    A picture for which nothing was measured is left out.

    Raises:
        ConfigError: matplotlib is not installed, or the folder cannot be written.
    """
    statistics = Statistics(results)
    written: list[Path] = []
    single = {"scores": bars.scores}
    sequence = {"kept": bars.kept, "matrix": maps.matrix, "positions": maps.positions}
    with canvas.style():
        for name, draw_figure in (single if results.protocol == "single" else sequence).items():
            figure = draw_figure(statistics)
            if figure is not None:
                written += canvas.save(figure, Path(folder), name)
    return written
