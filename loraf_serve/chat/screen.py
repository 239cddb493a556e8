"""What the chat prints. Answers go to standard output, everything else to standard error.

On a terminal, control characters of an answer are shown as pictures: they could steer the terminal.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

NARROWEST = 28  # columns of text beside each other, in characters
_PICTURES = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t\r"}
_PICTURES |= {0x0D: "", 0x7F: "␡"} | dict.fromkeys(range(0x80, 0xA0), "�")


class Screen:
    """Standard output and standard error."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._out = Console(highlight=False, markup=False)
        self._notes = Console(stderr=True, highlight=False, markup=False)

    def piece(self, text: str) -> None:
        """Prints a piece of an answer."""
        print(self.shown(text), end="", flush=True)

    def end(self) -> None:
        """Ends an answer."""
        print(flush=True)

    def note(self, text: str) -> None:
        """Prints something that is not an answer."""
        self._notes.print(Text(text.translate(_PICTURES), style="dim"), soft_wrap=True)

    def error(self, text: str) -> None:
        """Prints a mistake or a failure, on one line."""
        self._notes.print(Text(" ".join(text.translate(_PICTURES).split()), style="red"), soft_wrap=True)

    def shown(self, text: str) -> str:
        """A text as it may be printed."""
        return text.translate(_PICTURES) if self.is_terminal else text

    async def side_by_side(self, answers: Mapping[str, Answering], work: Coroutine[Any, Any, None]) -> None:
        """Shows several answers while `work` writes them: in columns, or below each other where columns are narrow."""
        if not self.is_terminal:
            await work
            for title, answer in answers.items():
                print(f"== {title}\n{answer.text}", flush=True)
            return
        with Live(console=self._out, auto_refresh=False, vertical_overflow="ellipsis") as live:
            task = asyncio.ensure_future(work)
            try:
                while not task.done():
                    live.update(self._layout(answers), refresh=True)
                    await asyncio.wait([task], timeout=0.1)
                await task
            finally:
                task.cancel()
                live.update(self._layout(answers), refresh=True)

    def _layout(self, answers: Mapping[str, Answering]) -> Table | Group:
        texts = [Text(answer.text.translate(_PICTURES) + ("" if answer.ended else " …")) for answer in answers.values()]
        if self._out.width // len(answers) < NARROWEST:
            return Group(*_below_each_other(list(answers), texts))
        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        for title in answers:
            table.add_column(Text(title), ratio=1, overflow="fold")
        table.add_row(*texts)
        return table


class Answering:
    """An answer that is being written.

    Attributes:
        ended: nothing more comes.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def add(self, text: str) -> None:
        """Adds a piece."""
        self.text += text


def _below_each_other(titles: Sequence[str], texts: Sequence[Text]) -> list[Rule | Text]:
    lines: list[Rule | Text] = []
    for title, text in zip(titles, texts, strict=True):
        lines += [Rule(Text(title), align="left"), text]
    return lines
