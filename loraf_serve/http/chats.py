"""The body of a chat; see `asked`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loraf_serve.http.asked import TASK_TEMPLATE, Asked, read_common, read_params
from loraf_serve.http.fields import Fields, is_table, is_text, set_number
from loraf_serve.limits import MAX_MESSAGES, MAX_TOOL_CALLS, MAX_TOOLS
from loraf_serve.request.structured_output import FIELD as FORM
from loraf_serve.v1 import generation_pb2 as pb

_TEXT_PART = "only parts of type text are served"


def read_chat(values: Mapping[str, Any]) -> Asked:
    """Reads the body of /v1/chat/completions. Raises InvalidRequest: it has MOST_PROBLEMS mistakes."""
    fields = Fields(values, [])
    asked = read_common(fields, is_chat=True)
    request = asked.requests[0]
    params = request.sampling
    params.CopyFrom(read_params(fields, asked))
    _max_tokens(fields, asked, params)
    if fields.flag("logprobs"):
        set_number(fields, params, "logprobs", fields.whole("top_logprobs") or 0, "top_logprobs")
        asked.renamed["sampling.logprobs"] = "top_logprobs"
    elif fields.whole("top_logprobs") and not fields.is_wrong("logprobs"):
        fields.wrong("top_logprobs", "needs logprobs", "set logprobs to true")
    request.messages.SetInParent()
    if values.get("messages") is None:
        fields.wrong("messages", "is missing", "send a list of messages")
    for i, message in enumerate(fields.entries("messages", is_table, "a list of messages", MAX_MESSAGES)):
        _message(Fields(message, fields.problems, f"messages[{i}]"), request.messages.messages.add())
    for i, tool in enumerate(fields.entries("tools", is_table, "a list of tools", MAX_TOOLS)):
        _tool(Fields(tool, fields.problems, f"tools[{i}]"), request.tools.add())
    _tool_choice(fields, asked)
    asked.apply_task_template = fields.flag(TASK_TEMPLATE)
    asked.continues = values.get("continue_final_message") is True and values.get("add_generation_prompt") is False
    fields.refuse("add_special_tokens", "the chat template writes the special tokens", unless=False)
    fields.refuse_others()
    asked.texts.append(None)
    if not fields.problems:
        asked.for_app["messages"] = list(map(_for_app, asked.for_app["messages"]))
    if not request.tools:
        asked.for_app.pop("tools", None)  # vLLM's app would refuse an empty list
    return asked


def _for_app(message: Mapping[str, Any]) -> dict[str, Any]:
    """A valid message as vLLM's app takes it: without null, which counts as not sent, and with what goes without saying
    in calls of tools."""
    sent = {name: value for name, value in message.items() if value is not None}
    if "tool_calls" in sent:
        sent["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": call["function"]} for call in sent["tool_calls"]
        ]
    return sent


def _max_tokens(fields: Fields, asked: Asked, params: pb.SamplingParams) -> None:
    """A chat's limit on tokens: what the context has room for, unless the client says otherwise."""
    newer = fields.whole("max_completion_tokens")
    if newer is None:
        if not params.HasField("max_tokens"):
            params.max_tokens = (1 << 31) - 1
        return
    if params.HasField("max_tokens") and params.max_tokens != newer:
        fields.wrong("max_tokens", "differs from max_completion_tokens", "send one of them")
    set_number(fields, params, "max_tokens", newer, "max_completion_tokens")
    asked.renamed["sampling.max_tokens"] = "max_completion_tokens"


def _message(fields: Fields, message: pb.Message) -> None:
    message.role = fields.text("role")
    content = fields.take("content")
    if isinstance(content, list) and fields.is_too_long("content", content, MAX_MESSAGES):
        pass
    elif isinstance(content, list):
        message.content = "\n".join(_parts(fields, content))
    elif isinstance(content, str):
        message.content = content
    elif content is not None:
        fields.wrong("content", "is neither a text nor a list of parts", "send a text")
    message.reasoning_content = fields.text("reasoning_content") or fields.text("reasoning")
    fields.take("reasoning")
    message.tool_call_id = fields.text("tool_call_id")
    for i, call in enumerate(fields.entries("tool_calls", is_table, "a list of calls", MAX_TOOL_CALLS)):
        inside = Fields(call, fields.problems, fields.path(f"tool_calls[{i}]"))
        inside.take("index")
        function = _function(inside)
        for required, parent in (("id", inside), ("arguments", function)):
            if parent.take(required) is None and not inside.is_wrong("function"):
                parent.wrong(required, "is missing", "send the call as the model has made it")
        message.tool_calls.add(id=inside.text("id"), name=function.text("name"), arguments=function.text("arguments"))
        function.refuse_others()
        inside.refuse_others()
    fields.refuse_others()


def _parts(fields: Fields, content: list[Any]) -> list[str]:
    texts = []
    for i, part in enumerate(content):
        if (
            isinstance(part, dict)
            and set(part) == {"type", "text"}
            and part["type"] == "text"
            and is_text(part["text"])
        ):
            texts.append(part["text"])
        else:
            fields.wrong(f"content[{i}]", _TEXT_PART, "send text")
    return texts


def _tool(fields: Fields, tool: pb.Tool) -> None:
    function = _function(fields)
    tool.name, tool.description = function.text("name"), function.text("description")
    parameters = function.table("parameters")
    if parameters is not None:
        tool.parameters = json.dumps(parameters)
    function.flag("strict")
    function.refuse_others()
    fields.refuse_others()


def _function(fields: Fields) -> Fields:
    """The function in a tool, or in a call of one."""
    if fields.text("type", "function") != "function":
        fields.wrong("type", "is not function", "send a function: no other kind is served")
    if fields.take("function") is None:
        fields.wrong("function", "is missing", "send an object with the function's name")
    return Fields(fields.table("function") or {}, fields.problems, fields.path("function"))


def _tool_choice(fields: Fields, asked: Asked) -> None:
    """Which tools the model may or must call; with tools, OpenAI's default is `auto`."""
    has_tools = bool(asked.requests[0].tools)
    choice = fields.take("tool_choice")
    asked.tool_choice = ("auto" if has_tools else "none") if choice is None else choice
    parallel = fields.take("parallel_tool_calls")
    if not isinstance(parallel, bool | None):
        fields.wrong("parallel_tool_calls", "is not true or false", "send true or false, or leave it out")
    elif parallel is not None and has_tools:
        asked.for_app["parallel_tool_calls"] = parallel
    if choice is not None and not _is_choice(choice):
        remedy = 'use none, auto, required, or {"type": "function", "function": {"name": NAME}}'
        fields.wrong("tool_choice", "is not a choice of tools", remedy)
    elif asked.tool_choice != "none" and not has_tools and not fields.is_wrong("tools"):
        fields.wrong("tool_choice", "there are no tools", "send tools, or leave it out")
    elif isinstance(choice, dict) and choice["function"]["name"] not in (names := _names(asked)) and has_tools:
        remedy = f"choose from: {', '.join(names)[:200]}"
        fields.wrong("tool_choice.function.name", "is not one of the tools", remedy)
    elif has_tools:
        asked.for_app["tool_choice"] = asked.tool_choice
        asked.renamed.setdefault(FORM, "tools")  # a call that must be made has a form
        must_call = asked.tool_choice not in ("none", "auto")
        if must_call and asked.for_app.get("allowed_token_ids"):
            fields.wrong("tool_choice", "a call has a form of its own", "leave allowed_token_ids out")
        if must_call and asked.requests[0].sampling.HasField("structured_output"):
            remedy = "use auto or none, or leave the form of the answer out"
            fields.wrong("tool_choice", "a call has a form of its own", remedy)


def _is_choice(value: object) -> bool:
    if not isinstance(value, dict):
        return value in ("none", "auto", "required")
    function = value.get("function")
    if set(value) != {"type", "function"} or value["type"] != "function" or not isinstance(function, dict):
        return False
    return set(function) == {"name"} and is_text(function["name"])


def _names(asked: Asked) -> list[str]:
    return [tool.name for tool in asked.requests[0].tools]
