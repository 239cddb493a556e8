"""Formats records as prompt and completion. Four forms of records are known:

    fields named by templates     prompt: and completion: of the task, str.format over the record's fields
    messages                      a conversation; every answer of the assistant is a completion
    prompt, completion            used as they are; two lists of messages are a conversation (TRL's form of it)
    instruction, input, output    INSTRUCTION_PROMPT around instruction and input, output as the completion

Fields that are null count as missing when a form is chosen. One form serves training, evaluation and serving of a task;
its templates are stored with the task. What text a value becomes is said in `loraf_train.data.forms.text`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraf.manifest import Templates
from loraf_train.data.forms.chat import ChatForm
from loraf_train.data.forms.form import Form, RecordFault
from loraf_train.data.forms.messages import NOT_AS_TEXT, are_messages_as_text
from loraf_train.data.forms.text import field_text, readable, text_of
from loraf_train.data.records import Record
from loraf_train.data.values import Unreadable
from loraf_train.settings.data import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# After Stanford Alpaca's; where a record has an input, it follows the instruction after an empty line.
INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_CONVERSATIONS = ("conversations", "conversation", "dialog", "dialogue")  # ShareGPT's, and others
_NAME_FIELDS = "name only fields of the record in data.prompt and data.completion"


def form_of(data: DataConfig, first: Record, tokenizer: PreTrainedTokenizerBase | None) -> Form | None:
    """Returns the form of a task's records, chosen by its templates or by its first record.

    Args:
        tokenizer: needed for conversations; without it the form of those is None.

    Raises:
        RecordFault: the record has none of the known forms, or the tokenizer has no chat template.
    """
    if data.prompt is not None or data.completion is not None:
        default = Templates()
        return TemplateForm(
            default.prompt if data.prompt is None else data.prompt,
            default.completion if data.completion is None else data.completion,
        )
    present = {name for name, value in first.items() if value is not None}
    pair = present >= {"prompt", "completion"}
    if "messages" in present or pair and any(holds_messages(first[name]) for name in ("prompt", "completion")):
        return ChatForm(tokenizer) if tokenizer is not None else None
    if pair:
        return PairForm()
    if present >= {"instruction", "output"}:
        return InstructionForm()
    if first.keys() >= {"prompt", "completion"}:  # with null: a mistake of this record
        return PairForm()
    if first.keys() >= {"instruction", "output"}:
        return InstructionForm()
    conversation = next((name for name in _CONVERSATIONS if isinstance(first.get(name), list)), None)
    if conversation is not None:
        remedy = 'name it messages, as a list of {"role": …, "content": text}; human is user, and gpt is assistant'
        raise RecordFault(f"has a conversation in field {conversation!r}, which is not read", remedy)
    raise RecordFault(
        f"has none of the known forms (it has: {', '.join(map(str, first)) or 'no fields'})",
        "set templates over its fields in data:, such as prompt: '{question}\\n' and completion: '{answer}'",
    )


class TemplateForm(Form):
    def __init__(self, prompt: str = Templates().prompt, completion: str = Templates().completion):
        self.templates = Templates(prompt, completion)

    def texts(self, record: Record) -> list[tuple[str, str]]:
        absent = [name for name in self._fields() if name not in record]
        if absent:
            fields = ", ".join(map(str, record)) or "no fields"
            names = ", ".join(repr(name) for name in absent)
            raise RecordFault(f"has no field {names} (it has: {fields})", _NAME_FIELDS)
        templates = (self.templates.prompt, self.templates.completion)
        prompt, completion = (_FORMATTER.vformat(template, (), record) for template in templates)
        return [(prompt, completion)]

    def plain_fields(self) -> list[str]:
        """Names of the fields whose whole value is written without a format, such as {answer}."""
        return [name for name, spec in self._placeholders() if not spec and "[" not in name]

    def _fields(self) -> list[str]:
        return list(dict.fromkeys(name.split("[")[0] for name, _ in self._placeholders()))

    def _placeholders(self) -> list[tuple[str, str]]:
        """(field with its keys, format) of every placeholder of both templates."""
        parts = [
            part
            for template in (self.templates.prompt, self.templates.completion)
            for part in string.Formatter().parse(template)
        ]
        return [(name, spec or "") for _, name, spec, _ in parts if name is not None]


class PairForm(TemplateForm):
    """Records whose prompt and completion are used as they are."""

    def texts(self, record: Record) -> list[tuple[str, str]]:
        for name in ("prompt", "completion"):
            value = record.get(name)
            if are_messages_as_text(value):
                remedy = f"{NOT_AS_TEXT}; if the text is meant, write data.prompt and data.completion over the fields"
                raise RecordFault(f"has messages as one text in field {name!r}", remedy)
            if holds_messages(value):
                message = f"has messages in field {name!r}, but the task's first record has text in its fields"
                raise RecordFault(message, "use one form for all records of a task")
            if isinstance(value, Mapping) and _is_message(value) and value["role"] in ROLES:
                raise RecordFault(f"has a message in field {name!r} that is not in a list", "write [ and ] around it")
            if isinstance(value, list) and value and all(_is_of_sharegpt(item) for item in value):
                remedy = "rename them to role and content; human is user, and gpt is assistant"
                raise RecordFault(f"has messages in field {name!r} with the keys from and value", remedy)
        return super().texts(record)


class InstructionForm(TemplateForm):
    """Records in the form of Alpaca's. An input that is null or empty is left out; every other is text, 0 as well."""

    def __init__(self, completion: str = "{output}"):
        super().__init__(INSTRUCTION_PROMPT, completion)

    def texts(self, record: Record) -> list[tuple[str, str]]:
        extra = record.get("input")
        if isinstance(extra, float) and math.isnan(extra):
            raise RecordFault("has NaN in field 'input'", 'write null or "" where there is no input')
        text = "" if extra is None else field_text(extra, "input")
        if text and "instruction" in record:
            record = {**record, "instruction": f"{field_text(record['instruction'], 'instruction')}\n\n{text}"}
        return super().texts(record)

    def plain_fields(self) -> list[str]:
        return [*super().plain_fields(), "input"]


def holds_messages(value: Any) -> bool:
    """Whether a field's value is a list of messages, and not a list of other mappings, which is text as JSON."""
    is_list = isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
    return is_list and any(_is_message(item) for item in value)


def _is_message(item: Mapping[str, Any]) -> bool:
    return isinstance(item.get("role"), str) and ("content" in item or "tool_calls" in item)


def _is_of_sharegpt(item: Any) -> bool:
    return isinstance(item, Mapping) and item.keys() >= {"from", "value"}


class _Formatter(string.Formatter):
    """`str.format` over a record's fields: without attributes, and with the texts of `loraf_train.data.forms.text`."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        name, *keys = field_name.replace("]", "").split("[")
        if name not in kwargs:
            raise RecordFault(f"has no field {name!r}", _NAME_FIELDS)
        value = kwargs[name]
        for key in keys:
            if isinstance(value, Unreadable):
                break
            try:
                value = value[int(key) if isinstance(value, list) else key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise RecordFault(f"has nothing at {{{field_name}}}", "fix the template or the record") from None
        return readable(value, field_name), name

    def format_field(self, value: Any, format_spec: str) -> str:
        if not format_spec:
            return text_of(value)
        try:
            return str(super().format_field(value, format_spec))
        except (ValueError, TypeError) as error:
            raise RecordFault(f"has a value that the template cannot format ({error})", "fix the template") from None


_FORMATTER = _Formatter()
