"""Reads the conversation in a record, in any of the ways in which records write one.

    messages              OpenAI's form: a list of messages, every answer in it is learned
    prompt, completion    TRL's conversational form: two lists of messages, only answers in the second are learned

Beside them a record may have `tools` and `chat_template_kwargs`, which go to the chat template as TRL passes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loraf_train.data.forms.form import RecordFault
from loraf_train.data.forms.text import readable
from loraf_train.data.records import Record
from loraf_train.data.values import Unreadable
from loraf_train.grading.thoughts import CLOSES, OPENS

Message = dict[str, Any]

# Keys of a message that hold a part of what is said. A chat template that does not write one of them loses it. Other
# keys (id, name, tool_call_id, timestamp, …) are about the message, and templates may ignore them.
CALLS = ("tool_calls", "function_call", "function_calls")
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks", "thought", "thoughts")
PARTS = frozenset({*CALLS, *THOUGHTS, "tool_plan", "refusal", "functions", "tools", "documents"}) | {
    *("image", "images", "image_url", "audio", "audios", "video", "videos", "file", "files", "attachments", "parts")
}
_READ = PARTS | {"role", "content", "weight"}  # what is looked at; other keys may hold anything
_OTHER = "loraf_other"
_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:.*["'](role|content)["']\s*:.*\}\s*\]\s*""", re.DOTALL)
NOT_AS_TEXT = "store the list itself, in JSON lines or Parquet: CSV and JSON text make one text of it"
_AS_A_LIST = 'write messages as a list of {"role": …, "content": text}'
_OPTIONS_OF_RENDERING = {  # of apply_chat_template; a record may not decide them
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
}


@dataclass(frozen=True)
class Conversation:
    """A conversation of which at least one answer is learned.

    Attributes:
        messages: each has a role, and content that is text or None; keys without a value are left out.
        answers: indices of the assistant's messages to learn, ascending; 0 is never among them.
        options: further arguments of the chat template.
        in_prompt: number of messages that are in the record's `prompt`; None: all are in `messages`.
    """

    messages: list[Message]
    answers: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    in_prompt: int | None = None

    def place(self, index: int) -> str:
        """How error messages call a message."""
        if self.in_prompt is None:
            return f"message {index + 1}"
        if index < self.in_prompt:
            return f"message {index + 1} of prompt"
        return f"message {index + 1 - self.in_prompt} of completion"


def conversation_of(record: Record) -> Conversation:
    """Returns the conversation in a record.

    Raises:
        RecordFault: there is none, a message cannot be read, or there is nothing to learn.
    """
    if record.get("messages") is None and any(_has_messages(record.get(name)) for name in ("prompt", "completion")):
        prompt, completion = (_messages(record.get(name), name) for name in ("prompt", "completion"))
        messages, in_prompt = [*prompt, *completion], len(prompt)
    else:
        messages, in_prompt = _messages(record.get("messages"), "messages"), None
    options: dict[str, Any] = _options(record)
    conversation = Conversation(messages, [], options, in_prompt)
    for i, message in enumerate(messages):
        _check(message, conversation.place(i))
    answers = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1) and i >= max(1, in_prompt or 0)
    ]
    if not answers:
        where = "" if in_prompt is None else " in completion"
        raise RecordFault(
            f"has no answer of the assistant after a first message{where}", "end it with a message of the assistant"
        )
    return Conversation(messages, answers, options, in_prompt)


def variants(messages: list[Message]) -> list[list[Message]]:
    """Returns the messages in the ways in which chat templates want them: as they are first.

    Templates differ in three points: the arguments of a call are a mapping (which the template writes as JSON) or JSON
    text (as in OpenAI's files), the content of a message that only calls a tool is empty or None, and thoughts are a
    part of the content or have a key of their own.
    """
    found = [messages]
    if any("tool_calls" in message or message["content"] is None for message in messages):
        found = [
            [
                {**_with_arguments(m, convert), "content": empty if m["content"] is None else m["content"]}
                for m in messages
            ]
            for empty in ("", None)
            for convert in (_unchanged, _as_mapping, _as_json)
        ]
    found += [[_with_separate_thoughts(message) for message in variant] for variant in found]
    return [variant for i, variant in enumerate(found) if variant not in found[:i]]


def arguments_of(messages: list[Message]) -> Iterator[Any]:
    """Yields the arguments of every call."""
    for message in messages:
        for function in _called(message):
            yield function["arguments"]


def other_calls(message: Message) -> list[Message]:
    """Returns copies of a message, each with another name or other arguments in one of its calls.

    What a template writes of a copy differs from what it writes of the message, if it writes every call.
    """
    copies = []
    calls = message["tool_calls"]
    for i, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            continue
        changes: list[dict[str, Any]] = [{"name": _OTHER}]
        if function.get("arguments"):
            changes.append({"arguments": _other_arguments(function["arguments"])})
        for change in changes:
            other = {**function, **change}
            call_with_other = {**call, "function": other} if "function" in call else other
            copies.append({**message, "tool_calls": [*calls[:i], call_with_other, *calls[i + 1 :]]})
    return copies


def _other_arguments(arguments: Any) -> Any:
    mapping = _as_mapping(arguments)
    if not isinstance(mapping, Mapping):
        return arguments if not isinstance(arguments, str) else arguments + _OTHER
    other = {**mapping, _OTHER: _OTHER}
    return _as_json(other) if isinstance(arguments, str) else other


def are_messages_as_text(value: object) -> bool:
    """Whether a text is a list of messages, as JSON or as pandas writes it to CSV."""
    return isinstance(value, str) and _AS_TEXT.fullmatch(value) is not None


def _has_messages(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(part, Mapping) and "role" in part for part in value)


def _messages(value: object, name: str) -> list[Message]:
    """Returns copies of a field's messages; each then has `content`, which is None if there is something else only."""
    if are_messages_as_text(value):
        raise RecordFault(f"has no list of messages, but {name} as one text", NOT_AS_TEXT)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise RecordFault(
            f"has no list of messages in {name}" if name != "messages" else "has no list of messages", _AS_A_LIST
        )
    messages = []
    for i, message in enumerate(value):
        kept: Message = {}
        for key, part in message.items():
            if part is None or isinstance(part, Unreadable) and key not in _READ:
                continue
            kept[key] = readable(part, f"{name}[{i}][{key}]") if key in _READ else part
            if key in PARTS and kept[key] in ("", [], {}):
                del kept[key]
        content = kept.get("content")
        messages.append({**kept, "content": None if content == "" and kept.keys() & PARTS else content})
    return messages


def _check(message: Message, place: str) -> None:
    """Raises RecordFault if a message cannot be read; makes a single text part of `content` plain text."""
    if not isinstance(message.get("role"), str):
        raise RecordFault(f"has no role in {place}", _AS_A_LIST)
    content = message["content"]
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping):
        part = content[0]
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            message["content"] = content = part["text"]
    if isinstance(content, list):
        kinds = [str(part.get("type")) for part in content if isinstance(part, Mapping) and part.get("type") != "text"]
        found = f" but {', '.join(dict.fromkeys(kinds))}" if kinds else " but a list"
        raise RecordFault(f"has no text content in {place}{found}", "write content as one text")
    if content is None and not any(key in PARTS for key in message):
        raise RecordFault(f"has no text content in {place}", _AS_A_LIST)
    if content is not None and not isinstance(content, str):
        raise RecordFault(f"has no text content in {place} but {type(content).__name__}", "write content as one text")
    if message.get("weight", 1) not in (0, 1):
        remedy = "write 1 to learn the answer and 0 to leave it out"
        raise RecordFault(f"has weight {message['weight']!r:.40} in {place}", remedy)
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        remedy = 'write it as a list of {"type": "function", "function": {"name": …, "arguments": {…}}}'
        raise RecordFault(f"has no list of calls in tool_calls of {place}", remedy)


def _options(record: Record) -> dict[str, Any]:
    options: dict[str, Any] = {}
    tools = _given(record, "tools")
    if isinstance(tools, str) and tools.strip():  # as TRL: JSON keeps Parquet from merging the tools' schemas
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RecordFault(f"has tools that are not JSON ({error})", "write tools as a list") from None
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            remedy = 'write tools as a list of {"type": "function", "function": {"name": …, "parameters": {…}}}'
            raise RecordFault("has no list of tools in tools", remedy)
        options["tools"] = [dict(tool) for tool in tools]
    more = _given(record, "chat_template_kwargs")
    if more:
        if not isinstance(more, Mapping) or not all(isinstance(key, str) for key in more):
            raise RecordFault("has no mapping in chat_template_kwargs", 'write it as {"enable_thinking": false}')
        for key in sorted(_OPTIONS_OF_RENDERING & more.keys()):
            raise RecordFault(f"has {key} in chat_template_kwargs", "leave it out: the program sets it itself")
        options.update({key: value for key, value in more.items() if value is not None})
    return options


def _given(record: Record, name: str) -> Any:
    value = record.get(name)
    return None if value is None else readable(value, name)


def _with_separate_thoughts(message: Message) -> Message:
    thoughts, closes, content = (message["content"] or "").partition(CLOSES)
    if message["role"] != "assistant" or not closes or any(key in message for key in THOUGHTS):
        return message
    thoughts = thoughts.lstrip().removeprefix(OPENS).strip("\n")
    return {**message, "content": content.lstrip("\n"), "reasoning_content": thoughts}


def _called(message: Message) -> Iterator[Mapping[str, Any]]:
    """Yields the function of every call that has arguments."""
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        if isinstance(function, Mapping) and function.get("arguments") is not None:
            yield function


def _with_arguments(message: Message, convert: Callable[[Any], Any]) -> Message:
    """Returns a message with the arguments of its calls converted."""
    if "tool_calls" not in message:
        return message

    def converted(function: Any) -> Any:
        if not isinstance(function, Mapping) or function.get("arguments") is None:
            return function
        return {**function, "arguments": convert(function["arguments"])}

    calls = [
        {**call, "function": converted(call["function"])} if "function" in call else converted(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _unchanged(arguments: Any) -> Any:
    return arguments


def _as_mapping(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
