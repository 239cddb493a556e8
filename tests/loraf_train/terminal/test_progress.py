"""The time that is left, as it stands in the lines of a file or a pipe."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from loraf_train.terminal.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(clock, reports: list[tuple[float, int]], total: int) -> list[str]:
    """What is printed for reports of (seconds, work done)."""
    written = io.StringIO()
    with Progress(Console(file=written, width=120)) as progress:
        step = progress.part("math")
        for seconds, done in reports:
            clock[0] = seconds
            step(done, total)
    return written.getvalue().splitlines()


def test_a_line_tells_what_is_left(clock):
    """5 steps in 20 s, after the first: 5 more take 20 s."""
    assert lines(clock, [(100, 1), (120, 6)], 11)[-1] == "math: 6 of 11 (2 min 00 s, about 20.0 s left)"


def test_what_was_done_before_a_resume_does_not_count(clock):
    assert lines(clock, [(10, 801), (30, 821)], 1000)[-1] == "math: 821 of 1000 (30.0 s, about 2 min 59 s left)"


def test_nothing_is_left_at_the_end_and_nothing_is_known_at_the_first_report(clock):
    first, last = lines(clock, [(10, 5), (20, 10)], 10)
    assert first == "math: 5 of 10 (10.0 s)" and last == "math: 10 of 10 (20.0 s)"
