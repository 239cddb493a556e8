"""Errors, drawn as a tree. Each says which file, which field and what to do about it.

    LorafError                     everything this project raises on purpose
    ├── ConfigError                a tasks.yaml, a data file or a command line that cannot be used
    ├── SelectionError             a task set that makes no sense (a name twice, a weight out of range)
    │   └── UnknownTask            a task or adapter that is not there
    └── CheckpointError            a checkpoint that cannot be used as asked
        ├── CorruptCheckpoint      missing, changed or malformed files
        └── BaseMismatch           the checkpoint was trained for another base model

All of them are the user's to mend, so commands end with exit status 2 and the text, never a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is and how to mend it.

    `file` and `field` may be empty when there is none (a command-line value has only a field).
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
    """Carries every problem found, not only the first.

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

    def __reduce__(self):
        return (type(self), (self.problems,))


class ConfigError(LorafError):
    """A configuration, data file or command line that cannot be used."""


class SelectionError(LorafError):
    """A task set that makes no sense."""


class UnknownTask(SelectionError):
    """A task (or adapter) name that is not loaded; the text names what there is."""


class CheckpointError(LorafError):
    """A checkpoint that cannot be used as asked."""


class CorruptCheckpoint(CheckpointError):
    """Files missing, changed since they were written, or malformed."""


class BaseMismatch(CheckpointError):
    """The checkpoint belongs to another base model."""
