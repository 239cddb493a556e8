"""The turns of a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraf.errors import LorafError, Problem
from loraf_serve.client import Answer
from loraf_serve.client.results import set_text


@dataclass
class Conversation:
    """What was said, in order.

    Attributes:
        system: instructions before the first turn; "": none.
        turns: questions with their answers.
    """

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    _saved: set[Path] = field(default_factory=set)

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """The conversation as messages, with a question at its end.

        Args:
            question: None for the last one, without its answer.
        """
        earlier = self.turns if question is not None else self.turns[:-1]
        asked = self.turns[-1].question if question is None else question
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in earlier:
            messages += turn.messages()
        return [*messages, {"role": "user", "content": asked}]

    def save(self, file: Path) -> None:
        """Writes the conversation as one line of JSON: a record of `messages`, as training reads it, and what answered.

        Raises:
            LorafError: there is no turn yet, or the file exists and is not one that this conversation was saved to.
            OSError: the file cannot be written.
        """
        if not self.turns:
            raise LorafError(Problem("there is nothing to save yet", remedy="ask a question first"))
        if file not in self._saved and file.exists():
            raise LorafError(Problem("exists already", file=str(file), remedy="give another name"))
        *turns, last = self.turns
        messages = [*self.messages(), *last.messages()[1:]]
        record = {"messages": messages, "answers": [turn.served_by() for turn in (*turns, last)]}
        file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        self._saved.add(file)


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        set_text: the set as it was chosen.
        text: the answer, which is incomplete if it was stopped.
        answer: the whole response; None if it was stopped.
    """

    question: str
    set_text: str
    text: str
    answer: Answer | None = None

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.text}]

    def served_by(self) -> dict[str, Any]:
        """What answered, for the saved record."""
        if self.answer is None:
            return {"set": self.set_text, "finish_reason": "stopped by the user"}
        served_by = self.answer.response.served_by
        return {
            "set": self.set_text,
            "tasks": set_text(served_by.tasks),
            "adapter": served_by.adapter,
            "digest": served_by.digest,
            "backend": served_by.backend,
            "finish_reason": self.answer.finish_reason,
        }
