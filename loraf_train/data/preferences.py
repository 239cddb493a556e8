"""Preferences: records with a prompt and two answers, of which the first is preferred.

Each answer becomes text as the completion of an ordinary record does: through the task's templates (data.prompt,
data.chosen, data.rejected), as text in the fields prompt, chosen and rejected, or, where these hold messages, through
the model's chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import zip_longest
from typing import TYPE_CHECKING

from loraf.errors import Problem
from loraf_train.data.cutting import Cut, first_learned, nothing_kept
from loraf_train.data.examples import Example, RecordText
from loraf_train.data.forms.form import Form, RecordFault
from loraf_train.data.forms.forms import form_of
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
        with _named(field, self._by_template):
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
        with _named(field, by_template):
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


@contextmanager
def _named(field: str, by_template: bool) -> Iterator[None]:
    """Lets what is wrong with an answer, which other forms call the completion, name it as the record or task does."""
    try:
        yield
    except RecordFault as fault:
        message, remedy = fault.message, fault.remedy.replace("data.completion", f"data.{field}")
        if not by_template:
            message = message.replace("field 'completion'", f"field {field!r}")
        raise RecordFault(message, remedy) from None


def as_completion(record: Record, field: str) -> Record:
    """Returns the record with one of its answers as the completion."""
    absent = [name for name in ("prompt", CHOSEN, REJECTED) if name not in record]
    if absent:
        has = ", ".join(map(str, record)) or "no fields"
        message = f"has no field {', '.join(map(repr, absent))} (it has: {has})"
        remedy = "name its fields in data.prompt, data.chosen and data.rejected"
        if absent == ["prompt"] and isinstance(record[field], list):
            remedy = "move the messages that both answers follow into a field prompt"
        raise RecordFault(message, remedy)
    others = {name: value for name, value in record.items() if name not in (CHOSEN, REJECTED, "completion")}
    return {**others, "completion": record[field]}


def find_doubtful(texts: Sequence[RecordText], faults: Faults, doubts: Faults, consequence: str) -> None:
    """Looks for pairs that prefer nothing, or contradict each other.

    Args:
        faults: gets pairs of answers to different prompts; and all, if no pair prefers anything.
        doubts: gets the others.
        consequence: of the same answer twice, for the message.
    """
    same = [text for text in texts if text.turns == text.rejected]
    if same and len(same) == len(texts):
        message = f"the chosen and the rejected answer of every pair are the same, in all {len(same)}"
        faults.add("", message, "write the answer that is not preferred into the field, or template, of rejected")
        return
    seen: set[tuple[str, str, str]] = set()
    for text in texts:
        (prompt, better), (other_prompt, worse) = text.turns[0], text.rejected[0]
        where = f"record {text.number}"
        if prompt != other_prompt:
            message = "its chosen and its rejected answer follow different prompts"
            faults.add(where, message, "give both answers to one prompt")
        elif better == worse:
            message = f"its chosen and its rejected answer are the same, so {consequence}"
            doubts.add(where, message, "leave it out: it prefers nothing")
        elif not worse.strip():
            doubts.add(where, "its rejected answer is empty", "fill the field, or template, unless this is meant")
        elif (prompt, worse, better) in seen:
            doubts.add(where, "another record prefers the answer that this one rejects", "leave one of them out")
        seen.add((prompt, better, worse))


@dataclass(frozen=True)
class CutPairs:
    """Pairs of at most max_length tokens.

    Attributes:
        chosen: what `cutting.cut` returns for the preferred answers.
        rejected: the other answer to each of the kept ones.
        cut_to_same: pairs that are left out since the cut left the same of both answers, whole, with their records.
        same: pairs that are left out since both answers have the same tokens, though perhaps not the same text.
    """

    chosen: Cut
    rejected: list[Example]
    cut_to_same: list[tuple[Pair, RecordText]]
    same: list[tuple[Pair, RecordText]]

    def warnings(self, max_length: int) -> list[Problem]:
        """What was left out, besides pairs whose texts are the same: `find_doubtful` tells of those."""
        found = []
        if self.cut_to_same:
            message = f"max_length {max_length} cuts {_count(self.cut_to_same)} to answers that are the same"
            found.append(_left_out(message, self.cut_to_same, f"set training.max_length to {self.needed} to keep all"))
        merged = [(pair, text) for pair, text in self.same if text.turns != text.rejected]
        if merged:
            message = f"the tokenizer makes the same tokens of both answers of {_count(merged)}"
            found.append(_left_out(message, merged, "let the answers differ in more than what the tokenizer unifies"))
        return found

    @property
    def needed(self) -> int:
        """The smallest max_length that leaves a difference in every pair that was cut to the same."""
        return max((1 + _first_difference(pair) for pair, _ in self.cut_to_same), default=0)


def cut_pairs(
    chosen: Sequence[Example], rejected: Sequence[Example], texts: Sequence[RecordText], max_length: int
) -> CutPairs:
    """Cuts the examples of each pair.

    Left out are a pair of which an answer has nothing left to learn, and one whose answers are the same then: its loss
    is the same whatever the model is.
    """
    kept: list[Pair] = []
    dropped: list[tuple[Example, RecordText]] = []
    cut_to_same: list[tuple[Pair, RecordText]] = []
    same: list[tuple[Pair, RecordText]] = []
    for better, worse, text in zip(chosen, rejected, texts, strict=True):
        if better.input_ids == worse.input_ids:
            same.append((Pair(better, worse), text))
        elif max(first_learned(better), first_learned(worse)) >= max_length:
            dropped.append((better, text))
        elif better.input_ids[:max_length] == worse.input_ids[:max_length]:
            cut_to_same.append((Pair(better, worse), text))
        else:
            kept.append(Pair(better, worse))
    longest = max((len(e.input_ids) for e in (*chosen, *rejected)), default=0)
    shortened = sum(max(len(p.chosen.input_ids), len(p.rejected.input_ids)) > max_length for p in kept)
    parts = Cut([_to_length(pair.chosen, max_length) for pair in kept], shortened, dropped, longest)
    return CutPairs(parts, [_to_length(pair.rejected, max_length) for pair in kept], cut_to_same, same)


def no_pair_kept(pairs: CutPairs, task: str, max_length: int) -> Problem:
    """The problem of a task of which every pair is left out."""
    dropped = pairs.chosen.dropped
    if not pairs.cut_to_same and not pairs.same:
        return nothing_kept(dropped, task, max_length)
    reasons = {
        "have the same tokens in both answers": len(pairs.same),
        f"are cut to the same answers by max_length {max_length}": len(pairs.cut_to_same),
        "have nothing left to learn within it": len(dropped),
    }
    parts = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    message = f"no pair of task {task!r} can teach anything: {parts}"
    (_, text) = (pairs.cut_to_same or pairs.same)[0]
    remedy = f"set max_length to {pairs.needed}" if pairs.cut_to_same else "give pairs whose answers differ"
    return Problem(message, "training.max_length" if pairs.cut_to_same else "data.train", str(text.source), remedy)


def _left_out(message: str, pairs: Sequence[tuple[Pair, RecordText]], remedy: str) -> Problem:
    text = pairs[0][1]
    where = f"record {text.number}"
    return Problem(
        f"{message}, so {'it is' if len(pairs) == 1 else 'they are'} not trained on", where, str(text.source), remedy
    )


def _count(pairs: Sequence[object]) -> str:
    return "one pair" if len(pairs) == 1 else f"{len(pairs)} pairs"


def _first_difference(pair: Pair) -> int:
    """The first place at which the answers, which differ, have other tokens."""
    tokens = zip_longest(pair.chosen.input_ids, pair.rejected.input_ids)
    return next(place for place, (better, worse) in enumerate(tokens) if better != worse)


def _to_length(example: Example, max_length: int) -> Example:
    return replace(example, input_ids=example.input_ids[:max_length])
