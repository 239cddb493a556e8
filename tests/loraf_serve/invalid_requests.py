"""The kinds of invalid requests, each with the code and the fields that it is refused with.

Tests send each kind alone; benchmarks/campaigns/generated_requests.py adds them to valid requests, also several at
once. They hold for a server with the adapters `trio` (tasks math, nlu, code) and `pair` (nlu, code), a chat template
that knows tools, a context of at most 1,024 tokens, and a vocabulary of fewer than 1,000.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from loraf_serve import limits
from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb

Request = pb.GenerateRequest
BEYOND = 100_000  # an id that no token has
_CODES = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}


@dataclass(frozen=True)
class InvalidKind:
    """One kind of mistake in a request.

    Attributes:
        spoil: makes the mistake in a valid request.
        code: name of the status.
        fields: exactly those that the status names.
        parts: what of the request it changes; two kinds with a part in common cannot be in one request.
    """

    name: str
    spoil: Callable[[Request], object]
    fields: tuple[str, ...]
    code: str
    parts: frozenset[str]


KINDS: list[InvalidKind] = []
"""Every kind for Generate and StreamGenerate."""


def _kind(
    name: str, spoil: Callable[[Request], object], *fields: str, parts: Iterable[str], code: str = "INVALID_ARGUMENT"
) -> None:
    assert code in _CODES and fields
    KINDS.append(InvalidKind(name, spoil, fields, code, frozenset(parts)))


def good_request() -> Request:
    """A valid request."""
    return request_of(Request, "x", adapter="trio", tasks=["math"], max_tokens=4)


# --- the prompt


def _chat(*messages: dict[str, Any]) -> Callable[[Request], None]:
    chat = request_of(Request, messages=messages).messages
    return lambda request: request.messages.CopyFrom(chat)


def _ids(*ids: int) -> Callable[[Request], None]:
    def spoil(request: Request) -> None:
        request.prompt_token_ids.SetInParent()
        request.prompt_token_ids.ids[:] = ids

    return spoil


def _prompt(text: str) -> Callable[[Request], None]:
    return lambda request: setattr(request, "prompt", text)


def _input_kind(name: str, spoil: Callable[[Request], object], *fields: str) -> None:
    def with_no_tools(request: Request) -> None:
        del request.tools[:]
        request.apply_task_template = False
        spoil(request)

    _kind(name, with_no_tools, *fields, parts=("input", "tools", "template"))


_USER = {"role": "user", "content": "a"}
_RESULT = {"role": "tool", "content": "1"}
_FIRST = "messages.messages[0]"


def _asks(**call: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call]}


_input_kind("no input", lambda request: request.ClearField("prompt") or _clear_input(request), "input")
_input_kind("empty prompt", _prompt(""), "prompt")
_input_kind("prompt longer than the context", _prompt("a" * 100_000), "prompt")
_input_kind("no token ids", _ids(), "prompt_token_ids")
_input_kind("a token beyond the vocabulary", _ids(1, BEYOND), "prompt_token_ids.ids[1]")
_input_kind("more token ids than the context", _ids(*[1] * 1024), "prompt_token_ids")
_input_kind("no messages", _chat(), "messages.messages")
_input_kind("a message without a role", _chat({"role": "", "content": "a"}), f"{_FIRST}.role")
_input_kind("a long role", _chat({"role": "r" * (limits.MAX_ROLE + 1), "content": "a"}), f"{_FIRST}.role")
_input_kind("too many messages", _chat(*[_USER] * (limits.MAX_MESSAGES + 1)), "messages.messages")
_input_kind(
    "too much text in messages",
    _chat({"role": "user", "content": "a" * limits.MAX_MESSAGES_CHARACTERS}),
    "messages.messages",
)
_input_kind(
    "too many calls of tools",
    _chat({"role": "assistant", "tool_calls": [{"name": "f"}] * (limits.MAX_TOOL_CALLS + 1)}, _RESULT),
    "messages.messages",
)
_input_kind(
    "a user who calls a tool", _chat({"role": "user", "tool_calls": [{"name": "f"}]}, _RESULT), f"{_FIRST}.tool_calls"
)
_input_kind("a call without a name", _chat(_asks(name=""), _RESULT), f"{_FIRST}.tool_calls[0].name")
_input_kind(
    "arguments that are not JSON",
    _chat(_asks(name="f", arguments="{"), _RESULT),
    f"{_FIRST}.tool_calls[0].arguments",
)
_input_kind(
    "arguments that are no object",
    _chat(_asks(name="f", arguments="[1]"), _RESULT),
    f"{_FIRST}.tool_calls[0].arguments",
)
_input_kind("calls that are not answered", _chat(_asks(name="f")), f"{_FIRST}.tool_calls")
_input_kind("a result of no call", _chat({**_RESULT, "tool_call_id": "c1"}, _USER), f"{_FIRST}.tool_call_id")


def _clear_input(request: Request) -> None:
    name = request.WhichOneof("input")
    if name:
        request.ClearField(name)


# --- tools


def _with_tools(*tools: dict[str, Any], chat: bool = True) -> Callable[[Request], None]:
    prepared = request_of(Request, tools=tools).tools

    def spoil(request: Request) -> None:
        request.apply_task_template = False
        if chat:
            _chat(_USER)(request)
        else:
            request.prompt = "x"
        del request.tools[:]
        request.tools.extend(prepared)

    return spoil


_IN_CHAT = ("input", "tools", "template")
_kind("tools without messages", _with_tools({"name": "f"}, chat=False), "tools", parts=_IN_CHAT)
_kind("a tool without a name", _with_tools({"name": ""}), "tools[0].name", parts=_IN_CHAT)
_kind("a tool with a space in its name", _with_tools({"name": "a b"}), "tools[0].name", parts=_IN_CHAT)
_kind(
    "parameters of a tool that are not JSON",
    _with_tools({"name": "f", "parameters": "{'a': 1}"}),
    "tools[0].parameters",
    parts=_IN_CHAT,
)
_kind("two tools of one name", _with_tools({"name": "f"}, {"name": "f"}), "tools", parts=_IN_CHAT)
_kind(
    "too many tools",
    _with_tools(*({"name": f"f{i}"} for i in range(limits.MAX_TOOLS + 1))),
    "tools",
    parts=_IN_CHAT,
)
_kind(
    "too much text in tools",
    _with_tools({"name": "f", "description": "a" * limits.MAX_TOOLS_CHARACTERS}),
    "tools",
    parts=_IN_CHAT,
)


# --- the template of a task


def _template(tasks: tuple[str, ...], spoil_input: Callable[[Request], object]) -> Callable[[Request], None]:
    def spoil(request: Request) -> None:
        del request.tools[:]
        spoil_input(request)
        request.adapter = "trio"
        _select(tasks)(request)
        request.apply_task_template = True

    return spoil


def _select(tasks: Iterable[str], weight: float | None = None) -> Callable[[Request], None]:
    def spoil(request: Request) -> None:
        request.task_selection.Clear()
        request.task_selection.tasks.SetInParent()
        for task in tasks:
            request.task_selection.tasks.tasks.add(name=task, weight=weight)

    return spoil


_TEMPLATE_PARTS = ("input", "tools", "template", "selection", "adapter")
for _name, _tasks, _input in (
    ("a template for token ids", ("math",), _ids(1, 5)),
    ("a template for a chat", ("math",), _chat(_USER)),
    ("a template for several tasks", ("math", "nlu"), _prompt("x")),
    ("a template that has not exactly one field", ("nlu",), _prompt("x")),
):
    _kind(_name, _template(_tasks, _input), "apply_task_template", parts=_TEMPLATE_PARTS)


# --- adapter and task set


def _selection(name: str, spoil: Callable[[Request], object], field: str, code: str = "INVALID_ARGUMENT") -> None:
    def without_template(request: Request) -> None:
        request.apply_task_template = False
        spoil(request)

    _kind(name, without_template, f"task_selection.{field}", parts=("selection", "template"), code=code)


def _named(kind: str, name: str) -> Callable[[Request], None]:
    def spoil(request: Request) -> None:
        request.task_selection.Clear()
        getattr(request.task_selection, kind).name = name
        getattr(request.task_selection, kind).SetInParent()

    return spoil


def _empty_selection(request: Request) -> None:
    request.task_selection.Clear()
    request.task_selection.SetInParent()


_selection("an empty selection", _empty_selection, "selection")
_selection("no task", _select([]), "tasks.tasks")
_selection("a task twice", _select(["nlu", "nlu"]), "tasks.tasks[1].name")
_selection("a weight that is not a number", _select(["nlu"], math.nan), "tasks.tasks[0].weight")
_selection("an infinite weight", _select(["nlu"], -math.inf), "tasks.tasks[0].weight")
_selection("a weight beyond 16", _select(["nlu"], 16.5), "tasks.tasks[0].weight")
_selection("an unknown task", _select(["nlu", "cooking"]), "tasks.tasks[1].name", "NOT_FOUND")
_selection("an unknown as_trained", _named("as_trained", "cooking"), "as_trained.name", "NOT_FOUND")
_selection("as_trained without a name", _named("as_trained", ""), "as_trained.name", "NOT_FOUND")
_selection("an unknown named set", _named("named", "cooking"), "named.name", "NOT_FOUND")
_selection("a task as a named set", _named("named", "nlu"), "named.name", "NOT_FOUND")


def _adapter_kind(name: str, adapter: str, code: str) -> None:
    def spoil(request: Request) -> None:
        request.apply_task_template = False
        request.adapter = adapter
        _select(["nlu"])(request)

    _kind(name, spoil, "adapter", parts=("adapter", "selection", "template"), code=code)


_adapter_kind("an unknown adapter", "cooking", "NOT_FOUND")
_adapter_kind("a path as an adapter", "../trio", "NOT_FOUND")
_adapter_kind("no adapter although there are several", "", "INVALID_ARGUMENT")


def _set(field: str, value: Any) -> Callable[[Request], None]:
    return lambda request: setattr(request, field, value)


_kind(
    "another digest",
    _set("adapter_digest", "0" * 64),
    "adapter_digest",
    parts=("digest", "adapter"),
    code="FAILED_PRECONDITION",
)
_kind("a priority beyond 1000", _set("priority", limits.MAX_PRIORITY + 1), "priority", parts=["priority"])
_kind("a priority below -1000", _set("priority", -limits.MAX_PRIORITY - 1), "priority", parts=["priority"])
_LONG_ID = "r" * (limits.MAX_REQUEST_ID + 1)
_kind("a long request id", _set("request_id", _LONG_ID), "request_id", parts=["request_id"])
_kind("a request id of several lines", _set("request_id", "a\nb"), "request_id", parts=["request_id"])


# --- sampling: numbers


def _number(field: str, value: float, *, also: dict[str, Any] | None = None) -> None:
    def spoil(request: Request) -> None:
        request.sampling.ClearField("min_tokens")
        request.sampling.ClearField("structured_output")
        for name, other in {**(also or {}), field: value}.items():
            setattr(request.sampling, name, other)

    parts = {f"sampling.{name}" for name in (field, "min_tokens", "form", *(also or {}))}
    with_others = f" with {also}" if also else ""
    _kind(f"{field} = {value}{with_others}", spoil, f"sampling.{field}", parts=parts)


for _field, _values in {
    "max_tokens": (0,),
    "temperature": (-1.0, 1e-9, 2.1, math.nan, math.inf),
    "top_p": (0.0, 1.1, math.nan),
    "top_k": (-2, -(2**31)),
    "min_p": (-0.1, 1.1),
    "seed": (-1,),
    "repetition_penalty": (0.0, 101.0),
    "presence_penalty": (2.1, math.inf),
    "frequency_penalty": (-2.1,),
    "logprobs": (limits.MAX_LOGPROBS + 1, 2**32 - 1),
    "prompt_logprobs": (limits.MAX_LOGPROBS + 1,),
}.items():
    for _value in _values:
        _number(_field, _value)
_number("n", 0, also={"temperature": 1.0})
_number("n", limits.MAX_N + 1, also={"temperature": 1.0})
_number("n", 2, also={"temperature": 0.0})
_number("min_tokens", 5, also={"max_tokens": 4})
_number("min_tokens", 100_000, also={"max_tokens": 2**32 - 1})


# --- sampling: lists


def _list(name: str, field: str, values: Iterable[Any], where: str = "") -> None:
    values = list(values)

    def spoil(request: Request) -> None:
        request.sampling.ClearField(field)
        getattr(request.sampling, field).extend(values)

    _kind(name, spoil, f"sampling.{field}{where}", parts=[f"sampling.{field}"])


_list("too many stop texts", "stop", map(str, range(limits.MAX_STOPS + 1)))
_list("an empty stop text", "stop", ["a", ""], "[1]")
_list("a long stop text", "stop", ["a" * (limits.MAX_STOP_LENGTH + 1)], "[0]")
_list("too many stop tokens", "stop_token_ids", range(limits.MAX_STOP_TOKEN_IDS + 1))
_list("a stop token beyond the vocabulary", "stop_token_ids", [3, BEYOND], "[1]")
_list("too many bad words", "bad_words", map(str, range(limits.MAX_BAD_WORDS + 1)))
_list("an empty bad word", "bad_words", [""], "[0]")
_list("a bad word of nothing but spaces", "bad_words", ["a", "  "], "[1]")
_list("a long bad word", "bad_words", ["a" * (limits.MAX_BAD_WORD_LENGTH + 1)], "[0]")
_list("bad words of too many tokens", "bad_words", (f"{i}" * 120 for i in range(10)))


def _bias(name: str, bias: dict[int, float], where: str = "") -> None:
    def spoil(request: Request) -> None:
        request.sampling.logit_bias.clear()
        request.sampling.logit_bias.update(bias)

    _kind(name, spoil, f"sampling.logit_bias{where}", parts=["sampling.logit_bias"])


_bias("a bias of a token beyond the vocabulary", {5: 1.0, BEYOND: 1.0}, f"[{BEYOND}]")
_bias("a bias that is not a number", {5: math.nan}, "[5]")
_bias("a bias beyond 100", {5: 100.5}, "[5]")


# --- the form of the answer


def _form(name: str, field: str, form: pb.StructuredOutput, prefix: str = "structured_output.", **also: Any) -> None:
    def spoil(request: Request) -> None:
        for other in ("min_tokens", "ignore_eos", "bad_words", "logit_bias", "stop_token_ids"):
            request.sampling.ClearField(other)
        request.sampling.structured_output.CopyFrom(form)
        for other, value in also.items():
            setattr(request.sampling, other, value)

    changed = ("form", "min_tokens", "ignore_eos", "bad_words", "logit_bias", "stop_token_ids", *also)
    _kind(name, spoil, f"sampling.{prefix}{field}", parts=[f"sampling.{part}" for part in changed])


def _choices(*texts: str) -> pb.StructuredOutput:
    return pb.StructuredOutput(choice=pb.Choices(texts=texts))


_TOO_DEEP = '{"a":' * (limits.MAX_JSON_DEPTH + 1) + "1" + "}" * (limits.MAX_JSON_DEPTH + 1)
_LONG_SCHEMA = json.dumps({"description": "a" * limits.MAX_SCHEMA})
_form("a form of no kind", "form", pb.StructuredOutput())
_form("a schema that is not JSON", "json_schema", pb.StructuredOutput(json_schema="{"))
_form("a schema that is no object", "json_schema", pb.StructuredOutput(json_schema="[]"))
_form("a schema with a name twice", "json_schema", pb.StructuredOutput(json_schema='{"a": 1, "a": 2}'))
_form("a schema with NaN", "json_schema", pb.StructuredOutput(json_schema='{"maximum": NaN}'))
_form("a deep schema", "json_schema", pb.StructuredOutput(json_schema=_TOO_DEEP))
_form("a deeper schema", "json_schema", pb.StructuredOutput(json_schema="[" * 10_000))
_form("a long schema", "json_schema", pb.StructuredOutput(json_schema=_LONG_SCHEMA))
_form("an empty regular expression", "regex", pb.StructuredOutput(regex=""))
_form("a regular expression with a null character", "regex", pb.StructuredOutput(regex="a\0"))
_form("a long regular expression", "regex", pb.StructuredOutput(regex="a" * (limits.MAX_REGEX + 1)))
_form("an empty grammar", "grammar", pb.StructuredOutput(grammar=" \n"))
_form("a grammar with a null character", "grammar", pb.StructuredOutput(grammar='root ::= "\0"'))
_form("no choices", "choice.texts", _choices())
_form("too many choices", "choice.texts", _choices(*map(str, range(limits.MAX_CHOICES + 1))))
_form("an empty choice", "choice.texts[1]", _choices("a", ""))
_form("a choice twice", "choice.texts[2]", _choices("a", "b", "a"))
_form("a form and min_tokens", "min_tokens", _choices("a"), prefix="", min_tokens=1, max_tokens=4)
_form("a form and ignore_eos", "ignore_eos", _choices("a"), prefix="", ignore_eos=True)


# --- fields that no release knows


def _unknown(request: Request) -> None:
    request.MergeFromString(b"\xfa\x7f\x01x")


def _unknown_in_sampling(request: Request) -> None:
    request.sampling.MergeFromString(b"\xf8\x3f\x01")


_EVERYTHING = ("input", "selection", "adapter", "unknown", "digest", "priority", "request_id", "template", "tools")
_kind("an unknown field", _unknown, "2047", parts=_EVERYTHING)
_kind("an unknown field of sampling", _unknown_in_sampling, "sampling.1023", parts=_EVERYTHING)
