"""`recipe: lori`: how the authors' later code (juzhengz/LoRI) words its tasks and reads answers, to compare with it.

    records with                 prompt                                     completion
    question, answer (GSM8K)     the question, a line break, a request      the worked answer, its #### written as
                                 to reason and to end with the number       «The final answer is:»
    instruction, answer          instruction and response under headings    the correct answer is X
    (language understanding)

Answers are read by the metrics `gsm8k` and `choice`; the choices are true and false, solution1 and solution2, or
answer1 to answer5, by the first record of an evaluation set. Only what the file leaves open is filled in: data.prompt,
data.completion, metric and choices come first. The sentences here are this project's own. Not taken over: templates
that differ between training and test, and examples that are left out of a score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraf.errors import ConfigError
from loraf_train.data import forms
from loraf_train.data.forms import Form, InstructionForm, RecordFault, TemplateForm, plain_text
from loraf_train.settings.parts import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraf_train.data.records import Record
    from loraf_train.settings.config import DataConfig

MATHS_PROMPT = "{question}\nReason step by step, and end with the final answer as a number.\n"
WRITTEN, MARKER = "####", "The final answer is:"  # in GSM8K's records, and in the texts that are learned
CHOICE_COMPLETION = "the correct answer is {answer}"
CHOICES = (("true", "false"), ("solution1", "solution2"), tuple(f"answer{i}" for i in range(1, 6)))


class MathsForm(TemplateForm):
    """GSM8K's records."""

    def texts(self, record: Record) -> list[tuple[str, str]]:
        worked, mark, number = str(record.get("answer")).rpartition(WRITTEN)
        if not mark:
            raise RecordFault(f"has no {WRITTEN} in its answer", "mend the record, or give data.completion")
        return super().texts({**record, "answer": f"{worked}{MARKER} {number.strip()}"})


def form_of(data: DataConfig, first: Record, tokenizer: PreTrainedTokenizerBase | None) -> Form | None:
    """As `forms.form_of`, with this recipe's templates where the task has none and its records are of a known kind."""
    if is_maths(first):
        if data.completion is None:
            return MathsForm(MATHS_PROMPT if data.prompt is None else data.prompt, "{answer}")
        if data.prompt is None:
            return TemplateForm(MATHS_PROMPT, data.completion)
    elif is_choice(first):
        if data.prompt is None:
            return InstructionForm(CHOICE_COMPLETION if data.completion is None else data.completion)
        if data.completion is None:
            return TemplateForm(data.prompt, CHOICE_COMPLETION)
    return forms.form_of(data, first, tokenizer)


def is_maths(record: Record) -> bool:
    return "question" in record and WRITTEN in str(record.get("answer"))


def is_choice(record: Record) -> bool:
    return "instruction" in record and bool(choices_of(record))


def choices_of(record: Record) -> tuple[str, ...]:
    """The choices that a record's label is one of; none if it is no label."""
    label = plain_text(record.get("answer"))
    return next((choices for choices in CHOICES if label in choices), ())


def metric_of(source: Source) -> str | None:
    """The metric of records like the source's first; None: they are of another kind, or cannot be read."""
    from loraf_train.data.records import read

    try:
        first = read(source)[0]
    except ConfigError:  # told when the data are loaded
        return None
    return "gsm8k" if is_maths(first) else "choice" if is_choice(first) else None
