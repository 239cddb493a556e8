"""Requests from Python values: every field of the protocol, in the forms that people have at hand."""

from __future__ import annotations

import json

import pydantic
import pytest

from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}


class Person(pydantic.BaseModel):
    name: str


def form_of(**fields) -> pb.StructuredOutput:
    return request_of(pb.GenerateRequest, "x", **fields).sampling.structured_output


def test_every_field_can_be_given():
    request = request_of(
        pb.StreamGenerateRequest,
        messages=[{"role": "user", "content": "hi"}],
        tools=[{"name": "look", "description": "Looks.", "parameters": SCHEMA}],
        adapter="trio",
        adapter_digest="d" * 64,
        tasks={"math": 0.5},
        apply_task_template=True,
        priority=0,
        request_id="r",
        choice=["a", "b"],
        prompt_logprobs=0,
        bad_words=["no"],
    )
    assert {field.name for field, _ in request.ListFields()} == set(
        pb.StreamGenerateRequest.DESCRIPTOR.fields_by_name
    ) - {"prompt", "prompt_token_ids"}
    assert json.loads(request.tools[0].parameters) == SCHEMA
    assert request.HasField("priority") and request.sampling.HasField("prompt_logprobs")
    assert request.sampling.bad_words == ["no"]


def test_a_schema_may_be_a_dictionary_a_text_or_a_model():
    assert json.loads(form_of(json_schema=SCHEMA).json_schema) == SCHEMA
    assert form_of(json_schema='{"type": "object"}').json_schema == '{"type": "object"}'
    assert json.loads(form_of(json_schema=Person).json_schema) == Person.model_json_schema()


def test_the_other_forms():
    assert form_of(regex="a+").regex == "a+"
    assert form_of(grammar="root ::= 'a'").grammar == "root ::= 'a'"
    assert form_of(choice=["yes", "no"]).choice.texts == ["yes", "no"]
    assert form_of(structured_output={"regex": "a"}).regex == "a"
    assert not request_of(pb.GenerateRequest, "x").sampling.HasField("structured_output")


def test_an_empty_form_is_sent_so_that_the_server_refuses_it():
    assert form_of(choice=[]).WhichOneof("form") == "choice"
    assert form_of(regex="").WhichOneof("form") == "regex"


@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "name": "look", "arguments": {"größe": 3}},
        {"id": "1", "name": "look", "arguments": '{"größe": 3}'},
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"größe": 3}'}},
    ],
    ids=["own", "own as text", "OpenAI's"],
)
def test_a_conversation_with_tools(call):
    chat = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    function = {"name": "look", "parameters": SCHEMA}
    for tools in ([function], [{"type": "function", "function": function}]):
        request = request_of(pb.GenerateRequest, messages=chat, tools=tools)
        first, second = request.messages.messages
        assert first.tool_calls[0] == pb.ToolCall(id="1", name="look", arguments='{"größe": 3}')
        assert (first.content, first.reasoning_content, second.tool_call_id) == ("", "hm", "1")
        assert request.tools[0].name == "look" and json.loads(request.tools[0].parameters) == SCHEMA


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"regex": "a", "choice": ["a"]}, TypeError, "give one of json_schema, regex, choice, grammar and structured"),
        ({"regex": "a", "structured_output": {"regex": "b"}}, TypeError, "give one of json_schema"),
        ({"choice": "yes"}, TypeError, r"choice is a list: choice=\['yes'\]"),
        ({"stop": "end"}, TypeError, r"stop is a list: stop=\['end'\]"),
        ({"bad_words": "end"}, TypeError, r"bad_words is a list"),
        ({"stop": ["\udcff"]}, ValueError, "stop=.*surrogates"),
        ({"json_schema": {1, 2}}, TypeError, "json_schema: .*not JSON serializable"),
        ({"json_schema": {"x": float("nan")}}, ValueError, "json_schema: "),
        ({"messages": [{"role": "user", "text": "x"}], "prompt": None}, TypeError, r"messages\[0\] has no field text"),
        ({"messages": [{"role": 3}], "prompt": None}, TypeError, r"messages\[0\]\.role=3"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"nam": "x"}]}], "prompt": None},
            TypeError,
            r"messages\[0\]\.tool_calls\[0\] has no field nam",
        ),
        ({"tools": [{"name": "x"}, {"name": "y", "strict": True}]}, TypeError, r"tools\[1\] has no field strict"),
        ({"priority": "high"}, TypeError, "priority='high'"),
    ],
)
def test_mistakes_name_the_field(arguments, error, says):
    with pytest.raises(error, match=says):
        request_of(pb.GenerateRequest, **{"prompt": "x", **arguments})
