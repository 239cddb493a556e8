"""Where the chat's lines come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

_MORE = "\\"  # at the end of a line: the text goes on in the next one


class Keyboard:
    """Lines from a terminal, with an editor, history and completion by Tab; or from a pipe, without a prompt.

    Args:
        words: the words that Tab may complete, asked for at each key.
    """

    def __init__(self, words: Callable[[], Sequence[str]]):
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if self.is_terminal:
            _enable_editing(words)

    def line(self, prompt: str) -> str | None:
        """The next line, or several that end with a backslash as one text; None at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was typed is dropped.
        """
        parts: list[str] = []
        while True:
            part = self._read(prompt if not parts else "… ".rjust(len(prompt)))
            if part is None:
                return "\n".join(parts) if parts else None
            if not part.endswith(_MORE):
                return "\n".join([*parts, part])
            parts.append(part[: -len(_MORE)])

    def _read(self, prompt: str) -> str | None:
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None


def _enable_editing(words: Callable[[], Sequence[str]]) -> None:
    """Makes `input` an editor. Some builds of Python have none."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        matching = [word for word in words() if word.startswith(text)]
        return matching[state] if state < len(matching) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" +")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
