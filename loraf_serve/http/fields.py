"""The fields of a request's body: each is read once, with its type; what nobody has read is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sized
from typing import Any, TypeVar

from loraf.errors import Problem
from loraf_serve.errors import InvalidRequest
from loraf_serve.limits import MAX_BAD_WORDS, MAX_CHOICES, MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, MAX_STOPS
from loraf_serve.request.structured_output import FIELD as FORM
from loraf_serve.v1 import generation_pb2 as pb

T = TypeVar("T")

MOST_PROBLEMS = 20
"""Of one body. More would cost time, and nobody reads them."""

_WHOLE = ("max_tokens", "min_tokens", "top_k", "seed", "n", "prompt_logprobs")
_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_FLAGS = ("ignore_eos", "skip_special_tokens")
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")  # two ways to write one id would be two biases


class Fields:
    """An object of JSON. A field that is null counts as not sent.

    Args:
        where: the path of the object in the body; "" for the body itself.
        problems: gets what is wrong.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[Problem], where: str = ""):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._left = set(self._values)
        self._where = where
        self.problems = problems

    def wrong(self, name: str, message: str, remedy: str) -> None:
        """Notes what is wrong with a field. Raises InvalidRequest: there are MOST_PROBLEMS already."""
        self.problems.append(Problem(message, self.path(name), remedy=remedy))
        if len(self.problems) >= MOST_PROBLEMS:
            raise InvalidRequest(self.problems)

    def is_wrong(self, name: str) -> bool:
        """Whether something about a field has been noted, or about a part of it."""
        path = self.path(name)
        return any(p.field == path or p.field.startswith((f"{path}.", f"{path}[")) for p in self.problems)

    def path(self, name: str) -> str:
        """The path of a field in the body."""
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str) -> Any:
        """The value of a field, of any type; None if it was not sent."""
        self._left.discard(name)
        return self._values.get(name)

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        return self._typed(name, lambda value: isinstance(value, str), "a text", default)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return self._typed(name, lambda value: isinstance(value, bool), "true or false", default)

    def whole(self, name: str) -> int | None:
        """A whole number; None if it was not sent, or is none."""
        return self._typed(name, is_whole, "a whole number", None)

    def number(self, name: str) -> float | None:
        """A number; None if it was not sent, or is none."""
        return self._typed(name, _is_number, "a number", None)

    def table(self, name: str) -> dict[str, Any] | None:
        """An object; None if it was not sent, or is none."""
        return self._typed(name, is_table, "an object", None)

    def entries(self, name: str, holds: Callable[[Any], bool], what: str, most: int) -> list[Any]:
        """A list of at most `most` entries, all of which pass `holds`."""
        values = self._typed(name, lambda value: isinstance(value, list), what, list[Any]())
        if self.is_too_long(name, values, most) or not values:
            return []
        return self._typed(name, lambda value: all(map(holds, value)), what, [])

    def is_too_long(self, name: str, values: Sized, most: int) -> bool:
        """Whether there are more than `most` values, which is noted. To be asked before they are looked at."""
        if len(values) > most:
            self.wrong(name, f"has {len(values)} entries", f"use at most {most}")
        return len(values) > most

    def _typed(self, name: str, holds: Callable[[Any], bool], what: str, default: T) -> T:
        value = self.take(name)
        if value is None:
            return default
        if not holds(value):
            self.wrong(name, f"is not {what}", f"send {what}, or leave it out")
            return default
        result: T = value
        return result

    def refuse(self, name: str, message: str, remedy: str = "leave it out", unless: object = None) -> None:
        """Refuses a field, unless it has a value that changes nothing."""
        value = self.take(name)
        if value is not None and (unless is None or value != unless):
            self.wrong(name, message, remedy)

    def refuse_others(self) -> None:
        """Refuses what has not been read: leaving it out could answer another question than was asked."""
        for name in sorted(self._left):
            self.wrong(name[:80], "is not a field that this server knows", "leave it out")


def is_text(value: object) -> bool:
    """Whether JSON's value is a text."""
    return isinstance(value, str)


def is_table(value: object) -> bool:
    """Whether JSON's value is an object."""
    return isinstance(value, dict)


def is_whole(value: object) -> bool:
    """Whether JSON's value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_sampling(fields: Fields, form_field: list[str]) -> pb.SamplingParams:
    """Reads the fields of sampling that completions and chats share. Ranges are checked later, as over gRPC.

    Args:
        form_field: gets the name of the field that asks for a form of the answer, if there is one.
    """
    params = pb.SamplingParams()
    for name in _WHOLE:
        set_number(fields, params, name, fields.whole(name))
    for name in _NUMBERS:
        set_number(fields, params, name, fields.number(name))
    for name in _FLAGS:
        if (value := fields.take(name)) is not None:
            if isinstance(value, bool):
                setattr(params, name, value)
            else:
                fields.wrong(name, "is not true or false", "send true or false, or leave it out")
    stop = fields.take("stop")
    stop = [stop] if isinstance(stop, str) else stop
    if isinstance(stop, list) and fields.is_too_long("stop", stop, MAX_STOPS):
        pass
    elif stop is not None and not (isinstance(stop, list) and all(map(is_text, stop))):
        fields.wrong("stop", "is neither a text nor a list of texts", "send texts, or leave it out")
    else:
        params.stop.extend(stop or ())
    params.bad_words.extend(fields.entries("bad_words", is_text, "a list of texts", MAX_BAD_WORDS))
    for token in fields.entries("stop_token_ids", is_whole, "a list of token ids", MAX_STOP_TOKEN_IDS):
        if 0 <= token < 1 << 32:
            params.stop_token_ids.append(token)
        else:
            fields.wrong("stop_token_ids", f"{token} is not in the vocabulary", "use ids of the model's tokens")
    _read_biases(fields, params)
    _read_form(fields, params, form_field)
    return params


def _read_biases(fields: Fields, params: pb.SamplingParams) -> None:
    biases = fields.table("logit_bias") or {}
    if fields.is_too_long("logit_bias", biases, MAX_LOGIT_BIASES):
        return
    for token, bias in biases.items():
        if not _TOKEN_ID.fullmatch(token) or int(token) >= 1 << 32:
            fields.wrong("logit_bias", f"{token[:40]!r} is not a token id", "use ids of the model's tokens")
        elif not _is_number(bias):
            fields.wrong(f"logit_bias[{token}]", "is not a number", "use a value from -100 to 100")
        else:
            try:
                params.logit_bias[int(token)] = bias
            except (ValueError, OverflowError):
                fields.wrong(f"logit_bias[{token}]", "is out of range", "use a value from -100 to 100")


def set_number(fields: Fields, params: pb.SamplingParams, name: str, value: float | None, field: str = "") -> None:
    """Sets a field of sampling, unless the value is None.

    Args:
        field: of the body, if it is called otherwise.
    """
    if value is None:
        return
    try:
        setattr(params, name, value)
    except (ValueError, OverflowError):
        fields.wrong(field or name, f"{value} is out of range", "use a number within the range of the field")


_RESPONSE_FORMATS = "use text, json_object or json_schema"
_FORMS = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choice"}


def _read_form(fields: Fields, params: pb.SamplingParams, form_field: list[str]) -> None:
    """Reads `response_format` and `structured_outputs`."""
    response_format, structured = fields.table("response_format"), fields.table("structured_outputs")
    if structured is not None and response_format is not None:
        fields.wrong("structured_outputs", "says the same as response_format", "send one of them")
    elif response_format is not None:
        _read_response_format(fields, response_format, params, form_field)
    elif structured is not None:
        _read_structured(fields, structured, params, form_field)


def _read_response_format(
    fields: Fields, values: Mapping[str, Any], params: pb.SamplingParams, form_field: list[str]
) -> None:
    inside = Fields(values, fields.problems, "response_format")
    kind = inside.text("type")
    if kind == "json_object":
        params.structured_output.json_schema = '{"type": "object"}'
        form_field.append("response_format")
    elif kind == "json_schema":
        named = inside.table("json_schema")
        schema = Fields(named or {}, fields.problems, "response_format.json_schema")
        schema.text("name")
        schema.text("description")
        schema.flag("strict")  # an answer always keeps to its schema
        value = schema.table("schema")
        schema.refuse_others()
        if value is None:
            schema.wrong("schema", "is missing", "send a JSON schema")
        else:
            params.structured_output.json_schema = json.dumps(value)
            form_field.append("response_format.json_schema.schema")
    elif kind != "text":
        inside.wrong("type", f"{kind[:80]!r} is not a format of this server", _RESPONSE_FORMATS)
    inside.refuse_others()


def _read_structured(
    fields: Fields, values: Mapping[str, Any], params: pb.SamplingParams, form_field: list[str]
) -> None:
    inside = Fields(values, fields.problems, "structured_outputs")
    sent = [name for name in (*_FORMS, "json_object") if (name in values and values[name] is not None)]
    if len(sent) != 1:
        fields.wrong("structured_outputs", f"has {len(sent)} forms", f"send one of {', '.join(_FORMS)}")
        return
    name = sent[0]
    value = inside.take(name)
    inside.refuse_others()
    form = params.structured_output
    form_field.append(f"structured_outputs.{name}")
    if name == "choice" and isinstance(value, list) and inside.is_too_long(name, value, MAX_CHOICES):
        return
    if name == "choice" and isinstance(value, list) and all(map(is_text, value)):
        form.choice.texts.extend(value)
    elif name == "json" and isinstance(value, dict):
        form.json_schema = json.dumps(value)
    elif name == "json_object" and value is True:
        form.json_schema = '{"type": "object"}'
    elif name in ("json", "regex", "grammar") and isinstance(value, str):
        setattr(form, _FORMS[name], value)
    else:
        inside.wrong(name, "is not of the type that this form has", "send it as vLLM documents it")


def field_of(field: str, renamed: Mapping[str, str]) -> str:
    """A field of a gRPC request → the field of the body that it was read from.

    Args:
        renamed: fields that are called otherwise, by the beginning of their path; the first that fits counts.
    """
    field = _OF_FUNCTION.sub(r"\1.function.\2", field)
    for beginning, name in renamed.items():
        if field == beginning or field.startswith((f"{beginning}.", f"{beginning}[")):
            rest = field[len(beginning) :]
            return name if beginning in _WHOLLY else name + rest
    return field.removeprefix("sampling.")


# What stands in a tool over gRPC, and in the tool's function here.
_OF_FUNCTION = re.compile(r"(tools\[\d+\]|tool_calls\[\d+\])\.(name|description|parameters|arguments)")
_WHOLLY = ("adapter", "task_selection", FORM)  # nothing below them is a field of the body
