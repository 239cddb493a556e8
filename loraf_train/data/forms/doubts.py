"""Values that have a text, but perhaps not the one that was meant: warnings, and mistakes where it cannot be meant.

    3.0 for 3            pandas stores whole numbers so where values of the column are missing
    messages             written as JSON by a template of the task
    null                 written in JSON for the keys that a table adds to its mappings
    an empty completion  the model learns to answer nothing
    system, history, …   fields beside the known ones that other trainers read, and no form writes

Only what a form writes as it is can be doubted: a placeholder with a format, such as {answer:.1f}, says what is meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loraf_train.data.forms.chat import ChatForm
from loraf_train.data.forms.form import Form
from loraf_train.data.forms.forms import TemplateForm, holds_messages
from loraf_train.data.records import Faults, Record
from loraf_train.settings.data import RecordSource, file_format

_CONVERSATION = ("prompt", "completion", "messages")  # fields that hold messages in records of other trainers
_UNUSED = (
    "system",
    "system_prompt",
    "history",
    "context",
    "functions",
    "documents",
    "images",
    "image",
    "audio",
    "videos",
)
_INTEGERS = "store the column as whole numbers (in pandas: astype('Int64'))"


def find_doubts(form: Form, source: RecordSource, records: Sequence[Record], faults: Faults, warnings: Faults) -> None:
    """Looks at the values that a form writes as they are.

    Args:
        records: all records of the source, in its order.
        faults: gets the mistakes.
        warnings: gets the others.
    """
    if type(form) is not TemplateForm:  # there the task's own templates decide
        _unused(form, records, warnings)
    if not isinstance(form, TemplateForm):
        return
    kind = file_format(source.file) if source.file is not None else ""
    is_table = kind in ("", ".parquet")  # or a dataset
    for field in form.plain_fields():
        values = [record.get(field) for record in records]
        if is_table:
            _added_keys(field, values, warnings)
        if kind in (".csv", ".tsv"):
            _whole_number_texts(field, values, warnings)
        else:
            _whole_numbers(field, values, faults if is_table else warnings, warnings)
        if field in _CONVERSATION:
            for number, value in enumerate(values, 1):
                if holds_messages(value):
                    remedy = "leave out data.prompt and data.completion to use the model's chat template"
                    message = f"field {field!r} holds messages, which the template of the task writes as JSON"
                    warnings.add(f"record {number}", message, remedy)


def find_empty(numbers: Sequence[int], count: int, warnings: Faults) -> None:
    """Warns of empty completions.

    Args:
        numbers: of the records that have one.
        count: number of all records.
    """
    if numbers:
        message = f"the completion is empty in {len(numbers)} of {count} records: the model learns to answer nothing"
        warnings.add(f"record {numbers[0]}", message, "fill the field or leave those records out, unless this is meant")


def _unused(form: Form, records: Sequence[Record], warnings: Faults) -> None:
    """Finds fields that would be a part of the prompt in other trainers."""
    used = form.plain_fields() if isinstance(form, TemplateForm) else []
    for field in _UNUSED:
        if field in used:
            continue
        filled = (n for n, record in enumerate(records, 1) if field in record and _is_filled(record[field]))
        number = next(filled, None)
        if number is not None:
            chat = isinstance(form, ChatForm)
            where = "write it as a message of the conversation" if chat else "name it in data.prompt"
            message = f"has field {field!r}, which is not a part of the prompt"
            warnings.add(f"record {number}", message, f"{where}, or leave the field out if it is not meant to be read")


def _is_filled(value: Any) -> bool:
    return not _is_missing(value) and not (isinstance(value, str | list | Mapping) and not value)


def _whole_numbers(field: str, values: Sequence[Any], beside_null: Faults, others: Faults) -> None:
    """Finds a column of whole numbers that is stored in floating point.

    Args:
        beside_null: gets columns with missing values, which are the reason why pandas stores them so.
        others: gets the others.
    """
    numbers = [value for value in values if not _is_missing(value)]
    if not numbers or not all(isinstance(value, float) and value.is_integer() for value in numbers):
        return
    shown, whole = str(numbers[0]), f"{numbers[0]:.0f}"
    remedy = (
        f"{_INTEGERS} or as text, or write {{{field}:.0f}} for {whole} and {{{field}:.1f}} for {shown} in a template"
    )
    place = f"record {values.index(numbers[0]) + 1}"
    if len(numbers) < len(values):
        because = f"pandas stores {whole} so where other values of its column are missing"
        beside_null.add(place, f"field {field!r} has {shown} and missing values: {because}", remedy)
    else:
        others.add(place, f"all values of field {field!r} are such as {shown}, and are learned so", remedy)


def _whole_number_texts(field: str, values: Sequence[Any], warnings: Faults) -> None:
    """Finds such a column in CSV, where its values are text, and missing ones are empty."""
    texts = [value for value in values if isinstance(value, str) and value]
    if texts and all(re.fullmatch(r"-?\d+\.0", text) for text in texts):
        message = f"all values of field {field!r} are such as {texts[0]}, and are learned so"
        warnings.add(f"record {values.index(texts[0]) + 1}", message, f"{_INTEGERS}, unless this is meant")


def _added_keys(field: str, values: Sequence[Any], warnings: Faults) -> None:
    number = next((i for i, value in enumerate(values, 1) if _has_null_key(value)), None)
    if number is not None:
        message = (
            f"field {field!r} has keys without a value, which are written as null: a table has all keys everywhere"
        )
        warnings.add(f"record {number}", message, "store the field as JSON text, unless null is meant")


def _has_null_key(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(item is None or _has_null_key(item) for item in value.values())
    return isinstance(value, list) and any(_has_null_key(item) for item in value)


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value)
