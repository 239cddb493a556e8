"""Progress that fits where it goes: moving bars in a terminal, a plain line now and then in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from loraf_train.terminal.tables import seconds_text

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0
PARTS_OF_A_LINE = 10  # and at each tenth


class Progress:
    """A context in which parts of a job report how far they are.

    Args:
        out: where commands write; bars appear only if it is a terminal.
    """

    def __init__(self, out: Console):
        self._out = out
        self._bars = None

    def __enter__(self) -> Progress:
        if self._out.is_terminal:
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}", markup=False),
            )
            self._bars = progress.Progress(*columns, console=self._out, transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def part(self, name: str) -> Callable[..., None]:
        """A function to call with (done, total) and, if wanted, a note of what else is known."""
        if self._bars is not None:
            return self._bar(name)
        return self._lines(name)

    def _bar(self, name: str) -> Callable[..., None]:
        bars = self._bars
        bar = bars.add_task(name, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bars.update(bar, completed=done, total=total, note=note)
            if done >= total:
                bars.update(bar, visible=False)

        return report

    def _lines(self, name: str) -> Callable[..., None]:
        start = last = time.monotonic()
        tenth = 0

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last, tenth
            now = time.monotonic()
            reached = PARTS_OF_A_LINE * done // max(1, total)
            if reached == tenth and done < total and now - last < SECONDS_BETWEEN_LINES:
                return
            last, tenth = now, reached
            rest = f", {note}" if note else ""
            self._out.print(f"{name}: {done} of {total}{rest} ({seconds_text(now - start)})")

        return report
