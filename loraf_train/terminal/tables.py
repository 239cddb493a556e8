"""How results look in a terminal: tables of scores in which every number says which task set it belongs to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from loraf_train.grading.builtin import MEAN

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from loraf_train.scoring.evaluate import Score

PLAIN_WIDTH = 400  # columns of a table that goes into a file or a pipe
NONE = "–"


def console(file: IO[str] | None = None, quiet: bool = False) -> Console:
    """Where commands write; no markup, so that brackets in records and paths stay what they are."""
    from rich.console import Console

    file = file or sys.stdout
    width = None if file.isatty() else PLAIN_WIDTH
    return Console(
        file=file, markup=False, highlight=False, emoji=False, width=width, soft_wrap=width is not None, quiet=quiet
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", left: int = 1) -> Table:
    """A table; the first `left` columns are text, the others numbers. Cells may be rich's `Text`, for their style."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        # Folded, never cut: in a narrow terminal no digit is lost.
        made.add_column(Text(column), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def markdown_table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """The same in Markdown; a cell's white space becomes single blanks."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: Any) -> str:
    return " ".join(str(cell).replace("\\", "\\\\").replace("|", "\\|").split())


def score_text(score: float, metric: str) -> str:
    """Shares with three digits, losses with four."""
    return f"{score:.4f}" if metric == "loss" else f"{score:.3f}"


def interval_text(score: Score) -> str:
    """The 95 % interval of a share; a mean of sets and a loss have none here."""
    from loraf_train.grading.builtin import wilson_interval

    if score.metric == "loss" or score.evaluation == MEAN:
        return NONE
    low, high = wilson_interval(score.score * score.count, score.count)
    return f"{low:.3f}–{high:.3f}"


def score_table(scores: Sequence[Score], title: str = "") -> Table:
    """One row a score, with its set."""
    rows = [
        [s.set, s.task, s.evaluation, s.metric, score_text(s.score, s.metric), interval_text(s), s.count]
        for s in scores
    ]
    return table(["task set", "task", "evaluation", "metric", "score", "95 % interval", "examples"], rows, title, 4)


def size_text(size: float) -> str:
    """Bytes in the largest unit below them."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def seconds_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def quiet_libraries() -> None:
    """Our own progress and messages are enough: no bars while weights load, no hints of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
