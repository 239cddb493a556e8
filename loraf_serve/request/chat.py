"""Turns a chat and its tools into text, through the model's chat template.

What a template never reads is refused, not dropped: tools, calls of tools, reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from loraf.errors import Problem, one_line
from loraf_serve import limits
from loraf_serve.errors import InvalidRequest
from loraf_serve.request.json_text import NotJsonError, read_object
from loraf_serve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOOL_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{limits.MAX_TOOL_NAME}}}")
_ONLY_CONTENT = "send the text in content"


def size_problems(request: pb.GenerateRequest | pb.StreamGenerateRequest) -> list[Problem]:
    """What is too long in `messages` and `tools`. Takes little time however much a client sends."""
    problems: list[Problem] = []

    def check(count: int, most: int, unit: str, field: str) -> bool:
        if count > most:
            problems.append(Problem(f"has {count} {unit}", field, remedy=f"use at most {most}"))
        return count <= most

    messages, tools = request.messages.messages, request.tools
    if check(len(messages), limits.MAX_MESSAGES, "messages", "messages.messages"):
        total = 0
        for i, message in enumerate(messages):
            where = f"messages.messages[{i}]"
            check(len(message.role), limits.MAX_ROLE, "characters", f"{where}.role")
            total += len(message.role) + len(message.content) + len(message.reasoning_content)
            total += len(message.tool_call_id)
        calls = sum(len(message.tool_calls) for message in messages)
        if check(calls, limits.MAX_TOOL_CALLS, "calls of tools", "messages.messages"):
            for message in messages:
                total += sum(len(call.id) + len(call.name) + len(call.arguments) for call in message.tool_calls)
        check(total, limits.MAX_MESSAGES_CHARACTERS, "characters", "messages.messages")
    if check(len(tools), limits.MAX_TOOLS, "tools", "tools"):
        total = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in tools)
        check(total, limits.MAX_TOOLS_CHARACTERS, "characters", "tools")
    return problems


def read(tokenizer: PreTrainedTokenizerBase, chat: pb.Messages, tools: Sequence[pb.Tool]) -> Readable:
    """Returns the messages and tools as the model's chat template takes them.

    Raises:
        InvalidRequest: the model has no chat template, or it does not read something; a role or name is empty, a text
            is not JSON, or a tool's result belongs to no call.
    """
    if not tokenizer.chat_template:
        raise InvalidRequest(
            Problem("the model has no chat template", "messages", remedy="send prompt, or serve a chat model")
        )
    if not chat.messages:
        raise InvalidRequest(Problem("is empty", "messages.messages", remedy="send at least one message"))
    problems: list[Problem] = []
    functions = [_tool(tool, f"tools[{i}]", problems) for i, tool in enumerate(tools)]
    # The template for tools may be another one.
    template = tokenizer.get_chat_template(None, tools=functions or None)
    words = words_of(template)
    messages = [_message(m, f"messages.messages[{i}]", words, problems) for i, m in enumerate(chat.messages)]
    if tools and "tools" not in words:
        problems.append(Problem("the model's chat template does not know tools", "tools", remedy="leave it out"))
    if len({tool.name for tool in tools}) < len(tools):
        problems.append(Problem("has two tools of one name", "tools", remedy="give each its own name"))
    problems += _answer_problems(chat.messages, "tool_call_id" in words)
    last = chat.messages[-1]
    if last.tool_calls:
        message, remedy = "asks for tools, so their results come next", "send them, as messages of role tool"
        problems.append(Problem(message, f"messages.messages[{len(messages) - 1}].tool_calls", remedy=remedy))
    if problems:
        raise InvalidRequest(problems)
    return Readable(messages, functions)


class Readable(NamedTuple):
    """Messages and tools as transformers documents them."""

    messages: list[dict[str, Any]]
    functions: list[dict[str, Any]]


def text_of(tokenizer: PreTrainedTokenizerBase, chat: pb.Messages, tools: Sequence[pb.Tool]) -> str:
    """Returns the prompt as text, with the special tokens that the template writes.

    The answer continues a last message of the assistant, as in transformers' chat pipeline.

    Raises:
        InvalidRequest: as `read`; or the template refuses the messages, or fails on them.
    """
    messages, functions = read(tokenizer, chat, tools)
    continues = chat.messages[-1].role == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=functions or None,  # type: ignore[arg-type]  # also takes None
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )
    # Templates refuse unknown roles and orders of roles, and may fail in any way on what they do not expect.
    except Exception as error:
        remedy = "send messages as the model's chat template expects them"
        if continues:
            remedy += ", or end with a message of the user: the answer would continue the assistant's"
        message = f"the chat template refuses them ({one_line(error)})"
        raise InvalidRequest(Problem(message, "messages", remedy=remedy)) from None
    assert isinstance(text, str)  # because of tokenize=False
    return text


@lru_cache(maxsize=8)
def words_of(template: str) -> frozenset[str]:
    """Returns the names and literal texts in a chat template: what it does not name, it cannot read."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    words = {name.name for name in tree.find_all(nodes.Name)} | {get.attr for get in tree.find_all(nodes.Getattr)}
    return frozenset(words | {text.value for text in tree.find_all(nodes.Const) if isinstance(text.value, str)})


def _message(message: pb.Message, where: str, words: frozenset[str], problems: list[Problem]) -> dict[str, Any]:
    """The message as transformers documents it."""
    if not message.role:
        problems.append(Problem("is empty", f"{where}.role", remedy="use user, assistant or system"))
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content:
        fields["reasoning_content"] = message.reasoning_content
        _require_read("reasoning_content", where, words, problems)
    if message.tool_calls:
        calls = enumerate(message.tool_calls)
        fields["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]", problems) for i, call in calls]
        _require_read("tool_calls", where, words, problems)
        if message.role != "assistant":
            stands = f"is in a message of role {message.role!r}"
            problems.append(Problem(stands, f"{where}.tool_calls", remedy="only the assistant asks for tools"))
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _require_read(name: str, where: str, words: frozenset[str], problems: list[Problem]) -> None:
    if name not in words:
        problems.append(Problem("the model's chat template does not read it", f"{where}.{name}", remedy=_ONLY_CONTENT))


def _call(call: pb.ToolCall, where: str, problems: list[Problem]) -> dict[str, Any]:
    _check_name(call.name, f"{where}.name", problems)
    function = {"name": call.name, "arguments": _object(call.arguments, f"{where}.arguments", problems)}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}


def _tool(tool: pb.Tool, where: str, problems: list[Problem]) -> dict[str, Any]:
    _check_name(tool.name, f"{where}.name", problems)
    parameters = _object(tool.parameters, f"{where}.parameters", problems) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _check_name(name: str, where: str, problems: list[Problem]) -> None:
    if not _TOOL_NAME.fullmatch(name):
        remedy = f"use 1 to {limits.MAX_TOOL_NAME} characters out of a-z, A-Z, 0-9, '_', '-' and '.'"
        problems.append(Problem(f"{name[:80]!r} is not a name of a tool", where, remedy=remedy))


def _object(text: str, where: str, problems: list[Problem]) -> dict[str, Any]:
    if not text:
        return {}
    try:
        return read_object(text)
    except NotJsonError as error:
        problems.append(Problem(str(error), where, remedy="send a JSON object"))
        return {}


def _answer_problems(messages: Sequence[pb.Message], reads_ids: bool) -> list[Problem]:
    """The problems with `tool_call_id`. Without ids in the template, results are matched to calls by their order."""
    problems = []
    open_calls: list[str] = []
    for i, message in enumerate(messages):
        if message.tool_calls:
            open_calls = [call.id for call in message.tool_calls]
        if not message.tool_call_id:
            continue
        where = f"messages.messages[{i}].tool_call_id"
        if message.tool_call_id not in open_calls:
            unknown = f"{message.tool_call_id[:80]!r} is not the id of a call that waits for its result"
            problems.append(Problem(unknown, where, remedy="use the id of a call in the assistant's last message"))
            continue
        if not reads_ids and open_calls[0] != message.tool_call_id:
            mismatch = "the model's chat template shows no ids, and the results are in another order than the calls"
            problems.append(Problem(mismatch, where, remedy="send results in the order of the calls"))
        open_calls.remove(message.tool_call_id)
    return problems
