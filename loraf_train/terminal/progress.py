"""Progress of long work: moving bars in a terminal, a plain line now and then in a file or a pipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from loraf_train.terminal.tables import seconds_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 10.0
LINES_PER_PART = 10  # at each tenth of the work


class Report(Protocol):
    """Reports the progress of one part of the work."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Args: note: what else is known, such as the loss."""


class Progress:
    """A context in which parts of the work report their progress.

    Args:
        out: where commands print; bars appear only if it is a terminal.
    """

    def __init__(self, out: Console):
        self._out = out
        self._bars: Bars | None = None

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

    def part(self, name: str) -> Report:
        """Adds a part of the work; call the returned function whenever it has moved on."""
        return self._lines(name) if self._bars is None else _bar(self._bars, name)

    def _lines(self, name: str) -> Report:
        start = last = time.monotonic()
        tenth = 0
        first: tuple[int, float] | None = None  # work done and time at the first report; a resumed phase begins late

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last, tenth, first
            now = time.monotonic()
            first = first or (done, now)
            reached = LINES_PER_PART * done // max(1, total)
            if reached == tenth and done < total and now - last < SECONDS_BETWEEN_LINES:
                return
            last, tenth = now, reached
            addition = f", {note}" if note else ""
            left = _left(now - first[1], done - first[0], total - done)
            self._out.print(f"{name}: {done} of {total}{addition} ({seconds_text(now - start)}{left})")

        return report


def _left(seconds: float, done: int, left: int) -> str:
    """The estimated time that is left, if any work is.

    Args:
        seconds: that the work done has taken.
        done, left: parts of the work.
    """
    return f", about {seconds_text(seconds / done * left)} left" if left > 0 and done > 0 else ""


def _bar(bars: Bars, name: str) -> Report:
    bar = bars.add_task(name, total=None, note="")

    def report(done: int, total: int, note: str = "") -> None:
        bars.update(bar, completed=done, total=total, note=note)
        if done >= total:
            bars.update(bar, visible=False)

    return report
