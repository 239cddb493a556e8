"""Figures of one width and style, and their files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, DPI = 10.0, 100  # inches, pixels per inch
INK = "#222222"
_STYLE = {
    "svg.hashsalt": "loraf",  # or ids would be random
    "svg.fonttype": "none",  # keeps text as text
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """A context to draw and save in: sets our style, and restores the user's settings afterwards.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError:
        message = "matplotlib is not installed, so no pictures can be drawn"
        raise ConfigError(Problem(message, remedy="pip install 'loraf[compare]'")) from None
    with style.context(["default", _STYLE]):
        yield


def figure(height: float) -> Figure:
    """A figure of this height in inches, outside pyplot: no window, and not in its list of open figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def name(*parts: object) -> str:
    """An id for SVG, without spaces and quotes."""
    return re.sub(r"[^\w.-]+", "-", "-".join(map(str, parts)))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as PNG and SVG, without dates; returns the paths.

    Raises:
        ConfigError: the folder cannot be written.
    """
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, key in zip(paths, ("Software", "Date"), strict=True):
            figure.savefig(path, metadata={key: None})
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise ConfigError(Problem(message, file=str(folder), remedy="name a folder that you may write to")) from None
    return paths
