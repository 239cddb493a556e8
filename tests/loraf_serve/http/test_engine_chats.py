"""Tools, and models without a chat template, through vLLM's app."""

from __future__ import annotations

import json
from types import SimpleNamespace

import httpx
import openai
import pytest

from loraf.errors import ConfigError
from loraf_serve.request import prompts
from tests.loraf_serve.http.engine_stand import CHAT, on_engine
from tests.loraf_serve.vllm_engines import shared

pytestmark = shared("mistral")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }}){% endfor %}{{ m.tool_call_id or '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tools(vllm_pool, monkeypatch):
    engine = vllm_pool.get("mistral", "resident")
    monkeypatch.setattr(engine.backend.tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr(prompts, "copy", SimpleNamespace(deepcopy=lambda same: same))  # a copy would not have it
    choice = {"type": "function", "function": {"name": "weather"}}
    with on_engine(engine, tool_parser="hermes") as both:
        create = both.openai.chat.completions.create
        one = {"tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 100}
        answer = create(model="main", messages=CHAT, tool_choice=choice, **one).choices[0]
        (call,) = answer.message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
        follow_up = [*CHAT, answer.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        assert create(model="main", messages=follow_up, tools=TOOLS, max_tokens=3).choices[0].finish_reason
        answer = create(model="main", messages=CHAT, tool_choice="required", **one).choices[0]
        assert {json.loads(c.function.arguments)["city"] for c in answer.message.tool_calls} <= {"Bern", "Rome"}
    with pytest.raises(ConfigError, match="--tool-call-parser"), on_engine(engine, tool_parser="mistral"):
        pass  # the model has no token for it
    with on_engine(engine) as both, pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        both.openai.chat.completions.create(model="main", messages=CHAT, tools=TOOLS)


def test_a_task_template_where_the_model_has_none_of_its_own(vllm_pool, monkeypatch):
    engine = vllm_pool.get("mistral", "resident")
    monkeypatch.setattr(engine.backend.tokenizer, "chat_template", None)
    one = [{"role": "user", "content": "Hello"}]
    with on_engine(engine) as both:

        def ask(name: str, **more) -> httpx.Response:
            body = {"model": name, "messages": one, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
            return both.post("/v1/chat/completions", body)

        refused = ask("main@math")
        assert refused.status_code == 400 and "apply_task_template" in refused.text
        answered = ask("main@math", apply_task_template=True)
        request = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        expected = both.grpc.client.generate(**request, tasks=["math"], apply_task_template=True).text
        assert answered.json()["choices"][0]["message"]["content"] == expected
        assert answered.headers["loraf-prompt"] == "task template of math"
        answered = ask("main@math+nlu", apply_task_template=True)
        expected = both.grpc.client.generate(**request, tasks=["math", "nlu"]).text
        assert answered.json()["choices"][0]["message"]["content"] == expected
        assert answered.headers["loraf-prompt"] == "plain"
        body = {"model": "main@math", "apply_task_template": True, **request}
        expected = both.grpc.client.generate(**request, tasks=["math"], apply_task_template=True).text
        assert both.post("/v1/completions", body).json()["choices"][0]["text"] == expected
        refused = both.post("/v1/completions", body | {"model": "main"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "apply_task_template"
