"""Tools, their calls and results, and reasoning reach the chat template as transformers documents, or are refused."""

from __future__ import annotations

import json

import pytest

from loraf_serve.adapters.registry import Registry
from loraf_serve.client import request_of
from loraf_serve.errors import InvalidRequest
from loraf_serve.request.validation import Validator
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend

# As those of published models: Qwen's, without its system prompt.
KNOWS_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KNOWS_IDS = KNOWS_TOOLS.replace("{{ m.content }}", "{{ m.content }}{{ m['tool_call_id'] }}")
WEATHER = {
    "name": "weather",
    "description": "Tells the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
USER = {"role": "user", "content": "Rain?"}


def call(name: str = "weather", arguments: str = '{"city": "Oslo"}', id: str = "") -> dict[str, str]:
    return {"id": id, "name": name, "arguments": arguments}


def prompt_of(template: str, messages: list[dict], tools: list[dict] = (), max_model_len: int = 2000) -> str:
    backend = FakeBackend(max_model_len=max_model_len)
    backend.tokenizer.chat_template = template
    request = request_of(pb.GenerateRequest, messages=messages, tools=tools, base=True)
    return backend.tokenizer.decode(Validator(backend).read_now(request, Registry()).prompt_token_ids)


def problems_of(template: str, messages: list[dict], tools: list[dict] = ()) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as error:
        prompt_of(template, messages, tools)
    return {problem.field: problem.message for problem in error.value.problems}


def test_it_is_the_prompt_that_transformers_makes():
    asked = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call(id="a"), call(id="b")]}
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in ("a", "b")]
    chat = [USER, asked, *results]
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    theirs = [
        USER,
        {**asked, "tool_calls": [{"id": id, "type": "function", "function": function} for id in ("a", "b")]},
        *results,
    ]
    for template in (KNOWS_TOOLS, KNOWS_IDS):
        tokenizer = FakeBackend().tokenizer
        tokenizer.chat_template = template
        tools = [{"type": "function", "function": WEATHER}]
        expected = tokenizer.apply_chat_template(theirs, tools=tools, tokenize=False, add_generation_prompt=True)
        assert prompt_of(template, chat, [WEATHER]) == expected
        assert '{"city": "Oslo"}' in expected and "<think>hm</think>" in expected


def test_a_tool_without_parameters_has_none():
    (line, *_) = prompt_of(KNOWS_TOOLS, [USER], [{"name": "now"}]).splitlines()
    function = {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert json.loads(line) == {"type": "function", "function": function}


def test_a_template_of_several_is_chosen_by_the_tools():
    backend = FakeBackend()
    backend.tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": KNOWS_TOOLS}
    validator = Validator(backend)
    for tools, beginning in (([], "Rain?"), ([{"name": "now"}], '{"type": "function"')):
        request = request_of(pb.GenerateRequest, messages=[USER], tools=tools, base=True)
        assert backend.tokenizer.decode(validator.read_now(request, Registry()).prompt_token_ids).startswith(beginning)


@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [
        ([USER], [WEATHER], "tools"),
        ([USER, {"role": "assistant", "tool_calls": [call()]}, USER], [], "messages.messages[1].tool_calls"),
        ([{**USER, "reasoning_content": "hm"}], [], "messages.messages[0].reasoning_content"),
    ],
)
def test_what_the_template_never_reads_is_refused(messages, tools, field):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (found,) = problems_of(plain, messages, tools).items()
    assert found[0] == field and "chat template does not" in found[1]


@pytest.mark.parametrize(
    ("messages", "tools", "field", "says"),
    [
        ([USER], [{"name": "a b"}], "tools[0].name", "not a name"),
        ([USER], [{"name": ""}], "tools[0].name", "not a name"),
        ([USER], [{"name": "x" * 65}], "tools[0].name", "not a name"),
        ([USER], [WEATHER, {"name": "now", "parameters": "{"}], "tools[1].parameters", "not valid JSON"),
        ([USER], [{"name": "now", "parameters": "[]"}], "tools[0].parameters", "not a JSON object"),
        ([USER], [{"name": "now", "parameters": '{"a": NaN}'}], "tools[0].parameters", "NaN"),
        ([USER], [{"name": "now", "parameters": '{"a": 1, "a": 2}'}], "tools[0].parameters", "twice"),
        ([USER], [{"name": "now", "parameters": '{"a":' * 64 + "{}" + "}" * 64}], "tools[0].parameters", "64 levels"),
        ([USER], [{"name": "now", "parameters": '{"a":' + "[" * 40_000}], "tools[0].parameters", "64 levels"),
        ([USER], [WEATHER, WEATHER], "tools", "one name"),
        ([USER], [{"name": "x"}] * 129, "tools", "129 tools"),
        ([USER], [{"name": "x", "description": "d" * (1 << 18)}], "tools", "characters"),
        (
            [USER, {"role": "assistant", "tool_calls": [call(arguments="x")]}, USER],
            [],
            "messages.messages[1].tool_calls[0].arguments",
            "not valid JSON",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [call(), call(name="")]}, USER],
            [],
            "messages.messages[1].tool_calls[1].name",
            "not a name",
        ),
        ([{**USER, "tool_calls": [call()]}, USER], [], "messages.messages[0].tool_calls", "role 'user'"),
        ([USER, {"role": "assistant", "tool_calls": [call()]}], [], "messages.messages[1].tool_calls", "come next"),
        (
            [USER, {"role": "tool", "tool_call_id": "a"}],
            [],
            "messages.messages[1].tool_call_id",
            "waits for its result",
        ),
        ([{"role": "r" * 65, "content": ""}], [], "messages.messages[0].role", "65 characters"),
    ],
)
def test_a_wrong_tool_is_named(messages, tools, field, says):
    found = problems_of(KNOWS_TOOLS, messages, tools)
    assert list(found) == [field]
    assert says in found[field]


def test_results_in_another_order_need_a_template_that_shows_ids():
    asked = {"role": "assistant", "tool_calls": [call(id="a"), call(id="b")]}
    chat = [USER, asked, *({"role": "tool", "content": id, "tool_call_id": id} for id in ("b", "a"))]
    assert prompt_of(KNOWS_IDS, chat)
    assert list(problems_of(KNOWS_TOOLS, chat)) == ["messages.messages[2].tool_call_id"]
    twice = [USER, asked, *({"role": "tool", "content": id, "tool_call_id": id} for id in ("a", "a"))]
    assert list(problems_of(KNOWS_IDS, twice)) == ["messages.messages[3].tool_call_id"]


@pytest.mark.parametrize("prompt", [{"prompt": "x"}, {"prompt_token_ids": [5]}])
def test_tools_require_messages(prompt):
    request = request_of(pb.GenerateRequest, tools=[WEATHER], base=True, **prompt)
    with pytest.raises(InvalidRequest) as error:
        Validator(FakeBackend()).read_now(request, Registry())
    assert [problem.field for problem in error.value.problems] == ["tools"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",  # TypeError
        "{{ 1 // 0 }}",
        "{{ messages[0].content.encode('utf-16').decode('ascii') }}",
        "{{ messages[7].content.x.y }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",  # RecursionError
        "{{ messages[0].__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_refuses_the_messages(template):
    found = problems_of(template, [USER])
    assert list(found) == ["messages"] and "chat template refuses them" in found["messages"]
