"""`recipe: lori`: prompts and grading as in the authors' later code (juzhengz/LoRI), for comparisons with it.

    records with                 prompt                                     completion
    question, answer (GSM8K)     the question, a line break, a request      the worked answer, with #### replaced by
                                 to reason and to end with the number       «The final answer is:»
    instruction, answer          instruction and response under headings    the correct answer is X
    (language understanding)

Answers are graded by the metrics `gsm8k` and `choice`; the first record of an evaluation set decides whether the
choices are true and false, solution1 and solution2, or answer1 to answer5. The recipe only fills in what the file
leaves out: data.prompt, data.completion, metric and choices take precedence. The sentences here are this project's own.
Not adopted: templates that differ between training and test, and examples left out of a score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraf_train.data.forms import forms
from loraf_train.data.forms.form import Form, RecordFault
from loraf_train.data.forms.forms import InstructionForm, TemplateForm
from loraf_train.data.forms.text import field_text, text_or_none

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraf_train.data.records import Record
    from loraf_train.settings.data import DataConfig

MATHS_PROMPT = "{question}\nReason step by step, and end with the final answer as a number.\n"
WRITTEN, MARKER = "####", "The final answer is:"  # in GSM8K's records, and in the texts to learn
CHOICE_COMPLETION = "the correct answer is {answer}"
CHOICES = (("true", "false"), ("solution1", "solution2"), tuple(f"answer{i}" for i in range(1, 6)))


class MathsForm(TemplateForm):
    """Records of GSM8K."""

    def texts(self, record: Record) -> list[tuple[str, str]]:
        if "answer" not in record:
            return super().texts(record)
        worked, mark, number = field_text(record.get("answer"), "answer").rpartition(WRITTEN)
        if not mark:
            raise RecordFault(f"has no {WRITTEN} in its answer", "fix the record, or set data.completion")
        return super().texts({**record, "answer": f"{worked}{MARKER} {number.strip()}"})


def form_of(data: DataConfig, first: Record, tokenizer: PreTrainedTokenizerBase | None) -> Form | None:
    """As `forms.form_of`, but with this recipe's templates if the task has none and its records are of a known kind."""
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
    return "question" in record and WRITTEN in (text_or_none(record.get("answer")) or "")


def is_choice(record: Record) -> bool:
    return "instruction" in record and bool(choices_of(record))


def choices_of(record: Record) -> tuple[str, ...]:
    """Returns the choices that include a record's answer; empty if none do."""
    label = text_or_none(record.get("answer"))
    return next((choices for choices in CHOICES if label in choices), ())


def metric_of(first: Record) -> str | None:
    """Returns the metric of records like a task's first one; None: they are of another kind."""
    return "gsm8k" if is_maths(first) else "choice" if is_choice(first) else None
