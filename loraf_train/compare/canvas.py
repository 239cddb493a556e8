"""Figures of one size and look, and their files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, DPI = 10.0, 100  # inches, pixels an inch
INK = "#222222"
_STYLE = {
    "svg.hashsalt": "loraf",  # else ids are drawn at random
    "svg.fonttype": "none",  # texts stay texts
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
    """Settings to draw and to save within; what was set before comes back.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError:
        message = "matplotlib is not installed, so there are no pictures"
        raise ConfigError(Problem(message, remedy="pip install 'loraf[compare]'")) from None
    with style.context(["default", _STYLE]):
        yield


def figure(height: float) -> Figure:
    """Height in inches. It belongs to no window and to no list of open figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def name(*parts: object) -> str:
    """An id for SVG: without blanks and quotes."""
    return re.sub(r"[^\w.-]+", "-", "-".join(map(str, parts)))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """As PNG and SVG, without dates.

    Raises:
        ConfigError: the operating system refused.
    """
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, key in zip(paths, ("Software", "Date"), strict=True):
            figure.savefig(path, metadata={key: None})
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise ConfigError(Problem(message, file=str(folder), remedy="name a folder that may be written")) from None
    return paths
