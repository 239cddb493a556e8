"""The tables of a comparison, for a terminal and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraf_train.compare.report.cells import Cell, model_name
from loraf_train.compare.report.sheets import preface, sheets
from loraf_train.compare.results import Results
from loraf_train.terminal import tables

if TYPE_CHECKING:
    from rich.console import Console


def show(results: Results, console: Console) -> None:
    """Prints all tables, the best of each column in bold."""
    from rich.text import Text

    def styled(cell: Cell | str) -> Text:
        return Text(str(cell), style="bold" if isinstance(cell, Cell) and cell.best else "")

    for line in preface(results):
        console.print(line)
    for sheet in sheets(results):
        rows = [[styled(cell) for cell in row] for row in sheet.rows]
        console.print(tables.table(sheet.columns, rows, sheet.title, sheet.left))
        for note in sheet.notes:
            console.print(note)


def markdown(results: Results) -> str:
    """Returns the same as Markdown, the best of each column in **…**."""

    def marked(cell: Cell | str) -> str:
        return f"**{cell}**" if isinstance(cell, Cell) and cell.best else str(cell)

    parts = [f"# Comparison on {model_name(results)}", _bullets(preface(results))]
    for sheet in sheets(results):
        table = tables.markdown_table(sheet.columns, [[marked(cell) for cell in row] for row in sheet.rows])
        parts += [f"## {sheet.title}", table, _bullets(sheet.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
