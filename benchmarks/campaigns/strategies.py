"""Hypothesis strategies for requests: valid ones, and ones with known mistakes.

They fit the stand of stand.py. A mistake is one of tests/loraf_serve/invalid_requests.py, so what the server must
answer is known without asking it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from hypothesis import strategies as st

from loraf_serve.client import request_of
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.invalid_requests import KINDS, InvalidKind

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
_WORD = st.text("abcdefghij .,é€😀", min_size=1, max_size=12).filter(str.strip)
_IDS = st.integers(0, 258)
_PRINTABLE = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=40)
_WEIGHT = st.floats(-16, 16, allow_nan=False)

# Forms that XGrammar keeps to as well.
_SCHEMAS = (
    {"type": "boolean"},
    {"type": "integer"},
    {"enum": ["a", "b", 3, None]},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
)
_REGEXES = ("[a-z]{1,8}", "(yes|no)", "[0-9]+", "a?b*c+", "x[^y]y")
_GRAMMARS = ('root ::= "yes" | "no"', 'root ::= [a-c]+ "."', 'root ::= "(" root ")" | "x"')
_FORMS = st.one_of(
    st.sampled_from(_SCHEMAS).map(lambda schema: {"json_schema": json.dumps(schema)}),
    st.sampled_from(_REGEXES).map(lambda regex: {"regex": regex}),
    st.sampled_from(_GRAMMARS).map(lambda grammar: {"grammar": grammar}),
    st.lists(_WORD, min_size=1, max_size=5, unique=True).map(lambda texts: {"choice": texts}),
)

_SELECTIONS = st.one_of(
    st.just({"adapter": "trio"}),
    st.just({"adapter": "trio", "base": True}),
    st.just({"adapter": "trio", "named": "both"}),
    st.sampled_from(("math", "nlu", "code")).map(lambda task: {"adapter": "trio", "as_trained": task}),
    st.dictionaries(st.sampled_from(("math", "nlu", "code")), _WEIGHT, min_size=1).map(
        lambda tasks: {"adapter": "trio", "tasks": tasks}
    ),
    st.dictionaries(st.sampled_from(("nlu", "code")), _WEIGHT, min_size=1).map(
        lambda tasks: {"adapter": "pair", "tasks": tasks}
    ),
)
_MESSAGE = st.builds(
    lambda role, content, reasoning: {"role": role, "content": content, "reasoning_content": reasoning},
    st.sampled_from(("system", "user", "assistant", "narrator")),
    _TEXT,
    st.one_of(st.just(""), _WORD),
)
_TOOL_USE = st.builds(
    lambda name, arguments, result: [
        {"role": "assistant", "tool_calls": [{"id": "c1", "name": name, "arguments": json.dumps(arguments)}]},
        {"role": "tool", "content": result, "tool_call_id": "c1"},
    ],
    st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True),
    st.dictionaries(_WORD, st.integers() | _WORD, max_size=2),
    _TEXT,
)
_TOOLS = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True), st.sampled_from(_SCHEMAS), max_size=3
).map(lambda tools: [{"name": name, "parameters": json.dumps(schema)} for name, schema in tools.items()])

_NUMBERS = {
    "temperature": st.just(0.0) | st.floats(0.01, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 400),
    "min_p": st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
    "logprobs": st.integers(0, 20),
    "skip_special_tokens": st.booleans(),
}
_NUMBERS_WITHOUT_FORM = {
    "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "prompt_logprobs": st.integers(0, 20),
    "ignore_eos": st.booleans(),
}


@st.composite
def _inputs(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(("prompt", "prompt_token_ids", "messages")))
    if kind == "prompt":
        return {"prompt": draw(_TEXT)}
    if kind == "prompt_token_ids":
        return {"prompt_token_ids": draw(st.lists(_IDS, min_size=1, max_size=40))}
    messages = draw(st.lists(_MESSAGE, min_size=1, max_size=3))
    if draw(st.integers(0, 3)) == 0:
        messages = [*messages, *draw(_TOOL_USE)]
    tools = draw(_TOOLS) if draw(st.integers(0, 2)) == 0 else []
    return {"messages": messages, "tools": tools}


@st.composite
def _sampling(draw: st.DrawFn) -> dict[str, Any]:
    has_form = draw(st.integers(0, 4)) == 0
    sampling: dict[str, Any] = {"max_tokens": draw(st.integers(1, 6))}
    numbers = _NUMBERS if has_form else _NUMBERS | _NUMBERS_WITHOUT_FORM
    for name in draw(st.lists(st.sampled_from(list(numbers)), max_size=4, unique=True)):
        sampling[name] = draw(numbers[name])
    if sampling.get("temperature", 1.0) and draw(st.integers(0, 5)) == 0:
        sampling["n"] = draw(st.integers(1, 3))
    if has_form:
        return sampling | draw(_FORMS)
    lists = {
        "stop": st.lists(_WORD, max_size=3),
        "stop_token_ids": st.lists(_IDS, max_size=4),
        "bad_words": st.lists(_WORD, max_size=3),
        "logit_bias": st.dictionaries(_IDS, st.floats(-100, 100), max_size=4),
    }
    for name in draw(st.lists(st.sampled_from(list(lists)), max_size=2, unique=True)):
        sampling[name] = draw(lists[name])
    if draw(st.integers(0, 5)) == 0:
        sampling["min_tokens"] = draw(st.integers(0, sampling["max_tokens"]))
    return sampling


@dataclass(frozen=True)
class Asked:
    """A request, and what must come of it.

    Attributes:
        request: of Generate.
        mistakes: what is wrong with it.
        streams: it goes to StreamGenerate.
    """

    request: pb.GenerateRequest
    mistakes: tuple[InvalidKind, ...]
    streams: bool

    @property
    def code(self) -> str:
        """The status: the worst of the mistakes' codes, as the service orders them."""
        codes = {mistake.code for mistake in self.mistakes}
        return next((c for c in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION") if c in codes), "OK")

    @property
    def fields(self) -> set[str]:
        """The fields that the status may name: at least one of them, and none but them."""
        return {field for mistake in self.mistakes for field in mistake.fields}


_MISTAKES = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique_by=lambda kind: kind.name)


@st.composite
def requests(draw: st.DrawFn, mistaken: float = 0.5) -> Asked:
    """Requests of which a share is invalid."""
    fields = draw(_inputs()) | draw(_SELECTIONS) | draw(_sampling())
    if draw(st.integers(0, 5)) == 0:
        fields["priority"] = draw(st.integers(-1000, 1000))
    if draw(st.integers(0, 5)) == 0:
        fields["request_id"] = draw(_PRINTABLE)
    request = request_of(pb.GenerateRequest, **fields)
    mistakes: list[InvalidKind] = []
    if draw(st.integers(0, 99)) < 100 * mistaken:
        parts: set[str] = set()
        for kind in draw(_MISTAKES):
            if not parts & kind.parts:
                kind.spoil(request)
                mistakes.append(kind)
                parts |= kind.parts
    return Asked(request, tuple(mistakes), draw(st.booleans()))


ADAPTER_REQUESTS: st.SearchStrategy[tuple[str, Message]] = st.one_of(
    st.just(("ListAdapters", adapter_pb2.ListAdaptersRequest())),
    st.sampled_from(("trio", "pair")).map(lambda name: ("GetAdapter", adapter_pb2.GetAdapterRequest(name=name))),
)
