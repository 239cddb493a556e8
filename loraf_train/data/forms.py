"""Formats records as prompt and completion. Four forms of records are known:

    fields named by templates     prompt: and completion: of the task, str.format over the record's fields
    messages                      a conversation; every answer of the assistant is a completion
    prompt, completion            used as they are
    instruction, input, output    INSTRUCTION_PROMPT around instruction and input, output as the completion

One form serves training, evaluation and serving of a task; its templates are stored with the task.
"""

from __future__ import annotations

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraf.manifest import Templates
from loraf_train.data.records import Record
from loraf_train.settings.data import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# After Stanford Alpaca's; where a record has an input, it follows the instruction after an empty line.
INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_PLACEHOLDER = "loraf-prompt-placeholder"
_NAME_FIELDS = "name only fields of the record in data.prompt and data.completion"


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
    """

    templates: Templates

    @abstractmethod
    def texts(self, record: Record) -> list[tuple[str, str]]:
        """Returns (prompt, completion) of every answer to learn, in order; several only in conversations.

        Raises:
            RecordFault: the record lacks a field, or has something else there.
        """


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
    if "messages" in first:
        return ChatForm(tokenizer) if tokenizer is not None else None
    if "prompt" in first and "completion" in first:
        return TemplateForm()
    if "instruction" in first and "output" in first:
        return InstructionForm()
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

    def _fields(self) -> list[str]:
        names: dict[str, None] = {}
        for template in (self.templates.prompt, self.templates.completion):
            for _, name, _, _ in string.Formatter().parse(template):
                if name is not None:
                    names[name.split("[")[0]] = None
        return list(names)


class InstructionForm(TemplateForm):
    def __init__(self, completion: str = "{output}"):
        super().__init__(INSTRUCTION_PROMPT, completion)

    def texts(self, record: Record) -> list[tuple[str, str]]:
        extra = record.get("input")
        if extra:
            record = {**record, "instruction": f"{record.get('instruction')}\n\n{extra}"}
        return super().texts(record)


class ChatForm(Form):
    """Conversations, formatted by the tokenizer's chat template, which writes all special tokens itself.

    Every answer of the assistant is learned after the prompt that a server would get for it: the template's text of the
    messages before it, with the opening of an answer at the end. So the template needs no generation markers. Answers
    with `"weight": 0` (as in OpenAI's files) are not learned; messages after the last answer are ignored.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            message = "has messages, but the model's tokenizer has no chat template"
            raise RecordFault(message, "use an instruct model, or records with prompt and completion")
        self._tokenizer = tokenizer
        try:
            turn = self._render([{"role": "user", "content": _PLACEHOLDER}], opening=True)
        except RecordFault:  # the template requires a system turn: the plain prompt is served
            turn = _PLACEHOLDER
        turn = turn if turn.count(_PLACEHOLDER) == 1 else _PLACEHOLDER
        escaped = turn.replace("{", "{{").replace("}", "}}")
        self.templates = Templates(escaped.replace(_PLACEHOLDER, "{prompt}"), "{completion}", special_tokens=False)

    def texts(self, record: Record) -> list[tuple[str, str]]:
        messages = record.get("messages")
        remedy = 'write messages as a list of {"role": …, "content": text}'
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
            raise RecordFault("has no list of messages", remedy)
        for number, message in enumerate(messages, 1):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise RecordFault(f"has no role or no text content in message {number}", remedy)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0 and i > 0]
        if not answers:
            raise RecordFault(
                "has no answer of the assistant after a first message", "end it with a message of the assistant"
            )
        turns = []
        for i in answers:
            prompt = self._render(messages[:i], opening=True)
            turns.append((prompt, self._answer(prompt, messages[: i + 1])))
        return turns

    def _answer(self, prompt: str, messages: list[Mapping[str, Any]]) -> str:
        """Returns the last message as the template writes it after `prompt`, without the end of sequence."""
        content: str = messages[-1]["content"]
        try:
            whole = self._render(messages, opening=False)
        except RecordFault:  # the template accepts no answer at the end
            return content
        if not whole.startswith(prompt):
            return content
        turn = whole[len(prompt) :]
        if turn.startswith(content):
            written = content
        elif turn.lstrip().startswith(content.strip()):  # the template trims, or adds a space before
            written = turn[: len(turn) - len(turn.lstrip())] + content.strip()
        else:
            return content
        after = turn[len(written) :]
        gap = after[: len(after) - len(after.lstrip())]
        ends = self._tokenizer.eos_token is not None and after.lstrip().startswith(self._tokenizer.eos_token)
        return written + gap if ends else written

    def _render(self, messages: list[Mapping[str, Any]], opening: bool) -> str:
        """Formats messages.

        Args:
            opening: whether to end with the opening of an answer of the assistant.
        """
        import jinja2

        conversation = [dict(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise RecordFault(f"is refused by the chat template ({error})", "fix the order of its roles") from None
        assert isinstance(text, str)  # token ids only with tokenize=True
        return text


def plain_text(value: Any) -> str | None:
    """Returns a field's value as text: booleans, lists and mappings as JSON. None stays None."""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value if value is None else str(value)


class _Formatter(string.Formatter):
    """`str.format` over a record's fields: without attributes, with booleans as JSON; null is a fault."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        name, *keys = field_name.replace("]", "").split("[")
        if name not in kwargs:
            raise RecordFault(f"has no field {name!r}", _NAME_FIELDS)
        value = kwargs[name]
        for key in keys:
            try:
                value = value[int(key) if isinstance(value, list) else key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise RecordFault(f"has nothing at {{{field_name}}}", "fix the template or the record") from None
        if value is None:
            raise RecordFault(f"has null in field {field_name!r}", "fill the field or leave the record out")
        return value, name

    def format_field(self, value: Any, format_spec: str) -> str:
        if not format_spec:
            return plain_text(value) or ""  # None never gets here
        try:
            return str(super().format_field(value, format_spec))
        except (ValueError, TypeError) as error:
            raise RecordFault(f"has a value that the template cannot format ({error})", "fix the template") from None


_FORMATTER = _Formatter()
