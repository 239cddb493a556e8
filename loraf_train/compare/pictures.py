"""The pictures of a comparison, each as PNG and as SVG.

    single      scores       each evaluation set, a bar a method
    sequence    kept         each method, what the first task scored when just trained and at the end
                matrix       R of each method as a heat map
                positions    where each task's positions lie, by layer and projection

The same results give the same bytes of SVG, with one version of matplotlib. There texts are texts, and bars and cells
are named (`bar-lora-boolq`, `cell-lora-2-1`), so that they can be found again.
"""

from __future__ import annotations

from pathlib import Path

from loraf_train.compare import bars, canvas, maps
from loraf_train.compare.results import Results
from loraf_train.compare.statistics import Statistics


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the pictures of the comparison's protocol into `folder`, and returns their paths.

    A picture of which nothing was measured is left out.

    Raises:
        ConfigError: matplotlib is not installed, or the folder cannot be written.
    """
    found, written = Statistics(results), []
    single = {"scores": bars.scores}
    sequence = {"kept": bars.kept, "matrix": maps.matrix, "positions": maps.positions}
    with canvas.style():
        for name, picture in (single if results.protocol == "single" else sequence).items():
            figure = picture(found)
            if figure is not None:
                written += canvas.save(figure, Path(folder), name)
    return written
