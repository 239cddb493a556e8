"""Makes request messages from Python values."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from loraf_serve.v1 import generation_pb2 as pb

Request = TypeVar("Request", pb.GenerateRequest, pb.StreamGenerateRequest)
M = TypeVar("M", bound=Message)


def request_of(
    kind: type[Request],
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    prompt_token_ids: Sequence[int] | None = None,
    adapter: str = "",
    adapter_digest: str = "",
    tasks: Sequence[str] | Mapping[str, float] | None = None,
    named: str | None = None,
    as_trained: str | None = None,
    base: bool = False,
    apply_task_template: bool = False,
    json_schema: Any = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    grammar: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    priority: int | None = None,
    request_id: str = "",
    **sampling: Any,
) -> Request:
    """Makes a request message.

    Args:
        kind: GenerateRequest or StreamGenerateRequest.
        messages: a chat, as [{"role": "user", "content": "…"}]. Tool calls may have the form of `ToolCall` or of
            OpenAI's API.
        tasks: use exactly these tasks: names, or a mapping from names to weights.
        named: use the named set of this name, one of `Adapter.sets`.
        as_trained: use the task set that was active when this task had just been trained.
        base: use the base model without any task.
        apply_task_template: put the prompt into the template that the selected task was trained with.
        json_schema: answer in JSON that follows this schema: a dictionary, its JSON text, or a pydantic model.
        regex: answer with text that matches this regular expression as a whole.
        choice: answer with one of these texts.
        grammar: answer with text that this grammar derives.
        tools: tools that the model may call: [{"name": "…", "description": "…", "parameters": {…JSON schema…}}], or
            the form of OpenAI's API.
        priority: requests of a lower number run first; 0 is normal.
        sampling: fields of SamplingParams: max_tokens, temperature, top_p, stop, bad_words, prompt_logprobs, …

    Raises:
        TypeError: several inputs, selections or forms; an unknown field; or a value of the wrong type.
        ValueError: a number out of its field's range.
    """
    if (prompt is not None) + (messages is not None) + (prompt_token_ids is not None) > 1:
        raise TypeError("give one of prompt, messages and prompt_token_ids")
    if (tasks is not None) + (named is not None) + (as_trained is not None) + bool(base) > 1:
        raise TypeError("give one of tasks, named, as_trained and base, or none of them for all tasks")
    forms = {"json_schema": json_schema, "regex": regex, "choice": choice, "grammar": grammar}
    fields = {
        "adapter": adapter,
        "adapter_digest": adapter_digest,
        "apply_task_template": apply_task_template,
        "priority": priority,
        "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)],
        "request_id": request_id,
        "sampling": _fill(pb.SamplingParams, sampling | _structured_output(forms, sampling), ""),
    }
    request = _fill(kind, fields, "")
    if prompt is not None:
        request.prompt = prompt
    elif messages is not None:
        request.messages.SetInParent()
        request.messages.messages.extend(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    elif prompt_token_ids is not None:
        request.prompt_token_ids.SetInParent()
        request.prompt_token_ids.ids.extend(prompt_token_ids)
    if tasks is not None:
        request.task_selection.tasks.SetInParent()
        for name in _texts("tasks", tasks):
            weight = tasks[name] if isinstance(tasks, Mapping) else None
            request.task_selection.tasks.tasks.add(name=name, weight=weight)
    elif named is not None:
        request.task_selection.named.name = named
        request.task_selection.named.SetInParent()
    elif as_trained is not None:
        request.task_selection.as_trained.name = as_trained
        request.task_selection.as_trained.SetInParent()
    elif base:
        request.task_selection.base.SetInParent()
    return request


def _structured_output(forms: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, pb.StructuredOutput]:
    given = [name for name, value in forms.items() if value is not None]
    if len(given) + ("structured_output" in sampling) > 1:
        raise TypeError(f"give one of {', '.join(forms)} and structured_output")
    if not given:
        return {}
    name, value = given[0], forms[given[0]]
    if name == "json_schema":
        value = _json_text(name, value.model_json_schema() if hasattr(value, "model_json_schema") else value)
    elif name == "choice":
        value = pb.Choices(texts=_texts(name, value))
    return {"structured_output": _fill(pb.StructuredOutput, {name: value}, "")}


def _message(message: Mapping[str, Any], where: str) -> pb.Message:
    calls = message.get("tool_calls") or ()
    fields = {
        **message,
        "content": "" if message.get("content") is None else message["content"],  # as OpenAI's API, beside tool calls
        "tool_calls": [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)],
    }
    return _fill(pb.Message, fields, where)


def _tool_call(call: Mapping[str, Any], where: str) -> pb.ToolCall:
    fields = _without_openai_wrapping(call)
    if "arguments" in fields:
        fields["arguments"] = _json_text(f"{where}.arguments", fields["arguments"])
    return _fill(pb.ToolCall, fields, where)


def _tool(tool: Mapping[str, Any], where: str) -> pb.Tool:
    fields = _without_openai_wrapping(tool)
    if "parameters" in fields:
        fields["parameters"] = _json_text(f"{where}.parameters", fields["parameters"])
    return _fill(pb.Tool, fields, where)


def _without_openai_wrapping(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{"type": "function", "function": {…}} as the function's own fields beside the others."""
    if not isinstance(fields.get("function"), Mapping):
        return dict(fields)
    others = {name: value for name, value in fields.items() if name not in ("type", "function")}
    return {**others, **fields["function"]}


def _fill(kind: type[M], fields: Mapping[str, Any], where: str) -> M:
    """Makes a message field by field, so that an error names the field, which is below `where`."""
    message = kind()
    prefix = f"{where}." if where else ""
    for name, value in fields.items():
        field = message.DESCRIPTOR.fields_by_name.get(name)
        if field is None:
            raise TypeError(f"{where or message.DESCRIPTOR.name} has no field {name}")
        if field.is_repeated:
            _texts(prefix + name, value)
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            error_kind = TypeError if isinstance(error, TypeError) else ValueError
            raise error_kind(f"{prefix}{name}={reprlib.repr(value)}: {error}") from None
    return message


def _texts(name: str, value: Any) -> Any:
    """Refuses a text where a list of them belongs: its letters would be taken one by one."""
    if isinstance(value, str):
        raise TypeError(f"{name} is a list: {name}=[{reprlib.repr(value)}]")
    return value


def _json_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
