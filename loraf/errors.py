"""The error tree. Each error names the file and the field, and says how to fix it.

    LorafError                     everything this project raises on purpose
    ├── ConfigError                a tasks.yaml, a data file or a command line that cannot be used
    ├── SelectionError             an invalid task set (a name twice, a weight out of range)
    │   └── UnknownTask            a task or adapter that does not exist
    └── CheckpointError            a checkpoint that cannot be used in this way
        ├── CorruptCheckpoint      missing, changed or malformed files
        └── BaseMismatch           the checkpoint was trained for another base model

The user can fix every one of them, so commands print the text without a traceback and exit with status 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_LONGEST = 300  # characters of `one_line`


def one_line(error: BaseException) -> str:
    """Returns an exception's text on one line, up to 300 characters; the name of its type if it has no text."""
    text = " ".join(str(error).split())
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]} …") or type(error).__name__


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is and how to fix it.

    `file` and `field` are empty where they do not apply (a command-line value has only a field).
    """

    message: str
    field: str = ""
    file: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.field) if part)
        text = f"{where}: {self.message}" if where else self.message
        return f"{text} → {self.remedy}" if self.remedy else text


class LorafError(Exception):
    """Carries every problem that was found, not only the first.

    Args:
        problems: one problem, a plain message, or several problems.
    """

    def __init__(self, problems: Problem | str | Iterable[Problem]):
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        return "\n".join(f"{i}. {p}" for i, p in enumerate(self.problems, 1))

    def __reduce__(self) -> tuple[type[LorafError], tuple[tuple[Problem, ...]]]:
        return (type(self), (self.problems,))


class ConfigError(LorafError):
    """A configuration, data file or command line that cannot be used."""


class SelectionError(LorafError):
    """An invalid task set."""


class UnknownTask(SelectionError):
    """The name of a task or adapter that does not exist; the message lists those that do."""


class CheckpointError(LorafError):
    """A checkpoint that cannot be used in this way."""


class CorruptCheckpoint(CheckpointError):
    """Files are missing, malformed, or were changed after they had been written."""


class BaseMismatch(CheckpointError):
    """The checkpoint belongs to another base model."""
