"""What every form of records has in common: it turns a record into prompts and completions, or says what is wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import date

from loraf.manifest import Templates
from loraf_train.data.records import Record


class RecordFault(Exception):
    """A record that cannot be formatted."""

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class Form(ABC):
    """How the records of one task become text.

    Attributes:
        templates: the same for the manifest: a server wraps prompts in them.
        ends: ids of the tokens with which a completion may end by itself; after every other the end of sequence is
            learned. Empty: only the end of sequence itself.
        wrote_date: whether texts so far depend on the date.
        losses: (message, remedy) of what the last record had and its texts have not, where that may be meant.
    """

    templates: Templates
    ends: tuple[int, ...] = ()
    wrote_date = False
    losses: tuple[tuple[str, str], ...] = ()

    def on(self, today: date) -> Form:
        """Returns this form for a day; only texts that name the date depend on it."""
        return self

    @abstractmethod
    def texts(self, record: Record) -> list[tuple[str, str]]:
        """Returns (prompt, completion) of every answer to learn, in order; several only in conversations.

        Raises:
            RecordFault: the record lacks a field, or has something else there.
        """

    def graded_text(self, completion: str) -> str:
        """Returns the part of a completion that metrics compare with an answer, whose thoughts are left out."""
        return completion

    def thinks(self, prompt: str) -> bool | None:
        """See `loraf_train.data.examples.EvaluationExample.thinks`."""
        return None
