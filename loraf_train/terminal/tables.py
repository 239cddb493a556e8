"""Tables and number formats of results. In a table of scores every number says which task set it belongs to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from loraf_train.grading.builtin import MEAN

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from loraf_train.scoring.evaluate import Score

PLAIN_WIDTH = 400  # characters of a line that goes into a file or a pipe
NONE = "–"  # a cell without a number


def console(file: IO[str] | None = None, quiet: bool = False) -> Console:
    """The console that commands print to. Markup is off, so that brackets in records and paths print as they are."""
    from rich.console import Console

    file = file or sys.stdout
    width = None if file.isatty() else PLAIN_WIDTH
    return Console(
        file=file, markup=False, highlight=False, emoji=False, width=width, soft_wrap=width is not None, quiet=quiet
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", left: int = 1) -> Table:
    """Builds a table for a console.

    Args:
        rows: the cells; one that is rich's `Text` keeps its style.
        left: how many of the first columns hold text; the others hold numbers and are aligned right.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        # Fold, never cut: a narrow terminal must not lose digits.
        result.add_column(Text(column), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return result


def markdown_table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a table as Markdown; white space in a cell becomes single spaces."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: Any) -> str:
    return " ".join(str(cell).replace("\\", "\\\\").replace("|", "\\|").split())


def score_text(score: float, metric: str) -> str:
    """Formats a share with three decimals, a loss with four."""
    return f"{score:.4f}" if metric == "loss" else f"{score:.3f}"


def interval_text(score: Score) -> str:
    """Formats the 95 % interval of a score: Wilson's of a share, bootstrapped of graded answers; others have none."""
    from loraf_train.grading.builtin import wilson_interval

    if score.metric == "loss" or score.evaluation == MEAN:
        return NONE
    low, high = score.interval or wilson_interval(score.score * score.count, score.count)
    return f"{low:.3f}–{high:.3f}"


def score_table(scores: Sequence[Score], title: str = "") -> Table:
    """A table with one row for each score, which names its task set."""
    rows = [
        [s.set, s.task, s.evaluation, s.metric, score_text(s.score, s.metric), interval_text(s), s.count]
        for s in scores
    ]
    return table(["task set", "task", "evaluation", "metric", "score", "95 % interval", "examples"], rows, title, 4)


def counted(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`, `1,000 examples`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def seconds_text(seconds: float) -> str:
    """`5.0 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def quiet_libraries() -> None:
    """Turns off the progress bars and hints of transformers, which would mix with ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # likewise
