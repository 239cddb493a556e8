"""Preferences: records with a prompt and two answers, of which the first is preferred.

Each answer becomes text as the completion of an ordinary record does: through the task's templates (data.prompt,
data.chosen, data.rejected), as text in the fields prompt, chosen and rejected, or, where these hold messages, through
the model's chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING

from loraf_train.data.cutting import Cut, first_learned
from loraf_train.data.examples import Example, RecordText
from loraf_train.data.form import Form, RecordFault
from loraf_train.data.forms import form_of
from loraf_train.data.records import Faults, Record
from loraf_train.settings.data import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(frozen=True)
class Pair:
    """A preference: two answers to one prompt."""

    chosen: Example
    rejected: Example


class PreferenceForm(Form):
    """Texts of preferred answers, and beside them those of the others.

    Args:
        chosen, rejected: the form of a record that has this answer as its completion.
        by_template: whether they name the record's own fields.
    """

    def __init__(self, chosen: Form, rejected: Form, by_template: bool):
        self._inner = {CHOSEN: chosen, REJECTED: rejected}
        self._by_template = by_template
        self.templates = chosen.templates
        self.ends = chosen.ends

    @property
    def wrote_date(self) -> bool:  # type: ignore[override]  # the inner forms learn it while they write
        return any(form.wrote_date for form in self._inner.values())

    @property
    def losses(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]  # as above
        return self._inner[CHOSEN].losses

    def on(self, today: date) -> Form:
        chosen, rejected = (form.on(today) for form in self._inner.values())
        return PreferenceForm(chosen, rejected, self._by_template)

    def texts(self, record: Record) -> list[tuple[str, str]]:
        return self._texts(record, CHOSEN)

    def rejected_texts(self, record: Record) -> list[tuple[str, str]]:
        """Returns the prompt with the other answer. Raises RecordFault."""
        return self._texts(record, REJECTED)

    def _texts(self, record: Record, field: str) -> list[tuple[str, str]]:
        turns = self._inner[field].texts(record if self._by_template else as_completion(record, field))
        if len(turns) != 1:
            message = f"has {len(turns)} answers of the assistant in field {field!r}"
            raise RecordFault(message, "give one answer, and put what came before it into the field prompt")
        return turns

    def graded_text(self, completion: str) -> str:
        return self._inner[CHOSEN].graded_text(completion)

    def thinks(self, prompt: str) -> bool | None:
        return self._inner[CHOSEN].thinks(prompt)


def preference_form(
    data: DataConfig, first: Record, tokenizer: PreTrainedTokenizerBase | None
) -> PreferenceForm | None:
    """Returns the form of a task's preferences, chosen by its templates or by its first record.

    Args:
        tokenizer: see `forms.form_of`.

    Raises:
        RecordFault: the record has no two answers, or see `forms.form_of`.
    """
    by_template = any(template is not None for template in (data.prompt, data.chosen, data.rejected))
    forms = []
    for field in (CHOSEN, REJECTED):
        completion = getattr(data, field)
        if by_template:
            update = {"prompt": data.prompt, "completion": f"{{{field}}}" if completion is None else completion}
            inner = form_of(data.model_copy(update=update), first, tokenizer)
        else:
            inner = form_of(data, as_completion(first, field), tokenizer)
        if inner is None:
            return None
        forms.append(inner)
    chosen, rejected = forms
    return PreferenceForm(chosen, rejected, by_template)


def as_completion(record: Record, field: str) -> Record:
    """Returns the record with one of its answers as the completion."""
    absent = [name for name in ("prompt", CHOSEN, REJECTED) if name not in record]
    if absent:
        has = ", ".join(map(str, record)) or "no fields"
        message = f"has no field {', '.join(map(repr, absent))} (it has: {has})"
        raise RecordFault(message, "name its fields in data.prompt, data.chosen and data.rejected")
    others = {name: value for name, value in record.items() if name not in (CHOSEN, REJECTED, "completion")}
    return {**others, "completion": record[field]}


def find_doubtful(texts: Sequence[RecordText], faults: Faults, doubts: Faults) -> None:
    """Looks for pairs that prefer nothing, or contradict each other.

    Args:
        faults: gets pairs of answers to different prompts.
        doubts: gets the others.
    """
    seen: set[tuple[str, str, str]] = set()
    for text in texts:
        (prompt, better), (other_prompt, worse) = text.turns[0], text.rejected[0]
        where = f"record {text.number}"
        if prompt != other_prompt:
            message = "its chosen and its rejected answer follow different prompts"
            faults.add(where, message, "give both answers to one prompt")
        elif better == worse:
            doubts.add(where, "its chosen and its rejected answer are the same", "leave it out: it prefers nothing")
        elif (prompt, worse, better) in seen:
            doubts.add(where, "another record prefers the answer that this one rejects", "leave one of them out")
        seen.add((prompt, better, worse))


def cut_pairs(
    chosen: Sequence[Example], rejected: Sequence[Example], texts: Sequence[RecordText], max_length: int
) -> tuple[Cut, list[Example]]:
    """Cuts the examples of each pair; one of which an answer has nothing left to learn is dropped.

    Returns:
        What `cutting.cut` returns for the chosen examples, and the rejected ones of the kept pairs.
    """
    kept: list[Pair] = []
    dropped: list[tuple[Example, RecordText]] = []
    for better, worse, text in zip(chosen, rejected, texts, strict=True):
        if max(first_learned(better), first_learned(worse)) < max_length:
            kept.append(Pair(better, worse))
        else:
            dropped.append((better, text))
    longest = max((len(e.input_ids) for e in (*chosen, *rejected)), default=0)
    shortened = sum(max(len(p.chosen.input_ids), len(p.rejected.input_ids)) > max_length for p in kept)
    parts = Cut([_to_length(pair.chosen, max_length) for pair in kept], shortened, dropped, longest)
    return parts, [_to_length(pair.rejected, max_length) for pair in kept]


def _to_length(example: Example, max_length: int) -> Example:
    return replace(example, input_ids=example.input_ids[:max_length])
