"""`loraf-client chat` in a real terminal: Ctrl-C, columns, control characters."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loraf_serve.chat.screen import Screen
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import eventually, serving
from tests.source_tree import ROOT


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, columns: int, *arguments: str):
        self._end, child = pty.openpty()
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loraf_serve.client_cli", "chat", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm", "COLUMNS": ""},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(child)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def until(self, pattern: str, seconds: float = 20) -> str:
        """Reads until the pattern is shown; returns what was shown up to it."""
        os.set_blocking(self._end, False)
        limit = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < limit, f"{pattern!r} is not in {self.text!r}"
            try:
                self.text += os.read(self._end, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        shown, self.text = self.text[: match.end()], self.text[match.end() :]
        return shown

    def ends(self) -> int:
        return self._process.wait(20)

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._end)


@contextmanager
def chatting(address: str, columns: int = 100, *arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(columns, "--server", address, *arguments)
    try:
        terminal.until("all> ")
        yield terminal
    finally:
        terminal.close()


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_chat():
    with serving(FakeBackend(seconds_per_token=0.05)) as running, chatting(running.address) as terminal:
        terminal.type("hello\n")
        terminal.until("hello\r\n.*[a-p]{3}")
        terminal.type("\x03")
        terminal.until(r"\[stopped\]")
        assert eventually(lambda: not running.backend.running)
        assert len(running.backend.closed_early) == 1
        terminal.until("all> ")
        terminal.type("half a line\x03")  # drops the line
        terminal.until("all> ")
        terminal.type("/compare math base -- which?\n")
        terminal.until("[a-p]{3}")
        terminal.type("\x03")
        terminal.until("all> ")
        assert eventually(lambda: not running.backend.running)
        terminal.type("/tasks math\n")
        terminal.until("math> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.ends() == 0


@pytest.mark.slow
def test_answers_stand_side_by_side_where_there_is_room():
    with serving() as running, chatting(running.address, 100, "--max-tokens", "4") as terminal:
        terminal.type("/compare math nlu -- which?\n")
        shown = terminal.until("all> ")
        assert re.search(r"math +nlu", shown) and re.search(r"\b[a-p]{4} +[a-p]{4}\b", shown)
    with serving() as running, chatting(running.address, 50, "--max-tokens", "4") as terminal:
        terminal.type("/compare math nlu -- which?\n")
        shown = terminal.until("all> ")
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "")
        assert re.search(r"math ─+\n[a-p]{4}\nnlu ─+\n[a-p]{4}\n", plain)


def test_an_answer_cannot_steer_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Screen().piece("a\x1b[2Jb\x07\r\nc\x9bd\te")
    assert capsys.readouterr().out == "a␛[2Jb␇\nc�d\te"


def test_a_file_gets_the_answer_as_it_is(capsys):
    Screen().piece("a\x1b[0m")
    assert capsys.readouterr().out == "a\x1b[0m"
