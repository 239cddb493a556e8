"""Answers of a backend that does not run vLLM, in OpenAI's form: read by OpenAI's own client, and equal to gRPC's."""

from __future__ import annotations

import asyncio
import copy

import openai
import pytest

from loraf_serve.backends.merged import MergedBackend
from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import model_folder
from tests.loraf_serve.http.stand import both_doors

CHAT = [{"role": "user", "content": "What is 6 times 7?"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETS = {
    "base": {"base": True},
    "trio": {},
    "trio@math:0.5+nlu": {"tasks": {"math": 0.5, "nlu": 1.0}},
    "trio@as_trained=nlu": {"as_trained": "nlu"},
}


def fake(template: str | None) -> FakeBackend:
    backend = FakeBackend()
    backend.tokenizer = copy.deepcopy(backend.tokenizer)  # it is shared
    backend.tokenizer.chat_template = template
    return backend


@pytest.fixture(scope="module")
def both():
    with both_doors(fake(TEMPLATE)) as doors:
        yield doors


@pytest.fixture(scope="module")
def merged():
    with both_doors(lambda: MergedBackend(model_folder(), "float32")) as doors:
        yield doors


@pytest.mark.parametrize("name", SETS)
def test_the_merged_backend_answers_as_over_grpc(merged, name):
    request = {"max_tokens": 8, "temperature": 0}
    expected = merged.grpc.client.generate("Hello", **request, ignore_eos=True, **SETS[name])
    body = {"ignore_eos": True}
    answer = merged.openai.completions.create(model=name, prompt="Hello", **request, extra_body=body)
    assert answer.choices[0].text == expected.text and answer.usage.completion_tokens == 8
    stream = merged.openai.completions.create(model=name, prompt="Hello", **request, extra_body=body, stream=True)
    assert "".join(event.choices[0].text for event in stream) == expected.text
    expected = merged.grpc.client.generate(messages=CHAT, **request, ignore_eos=True, **SETS[name])
    answer = merged.openai.chat.completions.create(model=name, messages=CHAT, **request, extra_body=body)
    assert answer.choices[0].message.content == expected.text


def test_what_only_vllms_app_can_do_is_not_implemented(merged):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for fields in (
        {"tools": tools},
        {"response_format": {"type": "json_object"}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"return_token_ids": True},
        {"prompt_logprobs": 1},
        {"messages": [*CHAT, {"role": "assistant", "content": "It is"}]},
    ):
        refused = merged.post("/v1/chat/completions", {"model": "trio", "messages": CHAT} | fields)
        assert refused.status_code == 501 and "the merged backend" in refused.text, refused.text
    with pytest.raises(openai.InternalServerError, match="echo") as refused:
        merged.openai.completions.create(model="trio", prompt="x", echo=True)
    assert refused.value.status_code == 501


def test_several_prompts_and_answers_keep_their_places(both):
    request = {"model": "trio@nlu", "prompt": ["a", "b", "c d"], "n": 2, "max_tokens": 4}
    expected = []
    for prompt in request["prompt"]:
        asked = request_of(pb.GenerateRequest, prompt, tasks=["nlu"], n=2, max_tokens=4)
        expected += [choice.text for choice in both.grpc.generation.Generate(asked).choices]
    answer = both.openai.completions.create(**request)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == 24 and answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    pieces: dict[int, str] = {}
    for event in both.openai.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            pieces[choice.index] = pieces.get(choice.index, "") + choice.text
    assert [pieces[i] for i in range(6)] == expected
    assert event.usage == answer.usage and event.system_fingerprint == answer.system_fingerprint


def test_chats_sync_and_async(both):
    expected = both.grpc.client.generate(messages=CHAT, max_tokens=5).text
    whole = both.openai.chat.completions.create(model="trio", messages=CHAT, max_completion_tokens=5)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"

    async def ask() -> tuple[str, str]:
        async with both.asynchronous() as client:
            request = {"model": "trio", "messages": CHAT, "max_tokens": 5}
            answers = await asyncio.gather(*(client.chat.completions.create(**request) for _ in range(20)))
            stream = await client.chat.completions.create(**request, stream=True)
            events = [event async for event in stream]
            assert events[0].choices[0].delta.role == "assistant"
            assert {answer.choices[0].message.content for answer in answers} == {expected}
            return "".join(event.choices[0].delta.content for event in events), events[-1].system_fingerprint

    text, fingerprint = asyncio.run(ask())
    assert text == expected and fingerprint == whole.system_fingerprint != ""
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert (
        both.openai.chat.completions.create(model="trio", messages=parts, max_tokens=5).choices[0].message.content
        == expected
    )


def test_a_chat_uses_what_the_context_has_room_for(both):
    answer = both.openai.chat.completions.create(model="trio", messages=CHAT)
    assert answer.usage.total_tokens == 256 and answer.choices[0].finish_reason == "length"


def test_log_probabilities(both):
    logprobs = both.openai.completions.create(model="trio", prompt="x", max_tokens=3, logprobs=1).choices[0].logprobs
    assert logprobs.token_logprobs == [-0.5] * 3 and logprobs.text_offset == [0, 1, 2]
    assert [next(iter(top)) for top in logprobs.top_logprobs] == logprobs.tokens
    chat = both.openai.chat.completions.create(
        model="trio", messages=CHAT, max_tokens=3, logprobs=True, top_logprobs=2, stream=True
    )
    positions = [position for event in chat for position in event.choices[0].logprobs.content]
    assert len(positions) == 3 and all(len(position.top_logprobs) == 2 for position in positions)


def test_a_chat_without_a_template_of_its_own():
    with both_doors(fake(None)) as both:
        one = {"model": "trio@math", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
        refused = both.post("/v1/chat/completions", one)
        assert refused.status_code == 400 and "apply_task_template" in refused.json()["error"]["message"]
        answered = both.post("/v1/chat/completions", one | {"apply_task_template": True})
        expected = both.grpc.client.generate("Hello", tasks=["math"], apply_task_template=True, max_tokens=5).text
        assert answered.json()["choices"][0]["message"]["content"] == expected
        assert answered.headers["loraf-prompt"] == "task template of math"
        for name, tasks in (("trio@math+nlu", {"tasks": ["math", "nlu"]}), ("trio", {}), ("base", {"base": True})):
            answered = both.post("/v1/chat/completions", one | {"apply_task_template": True, "model": name})
            expected = both.grpc.client.generate("Hello", **tasks, max_tokens=5).text
            assert answered.json()["choices"][0]["message"]["content"] == expected
            assert answered.headers["loraf-prompt"] == "plain"
        two = one | {"apply_task_template": True, "messages": one["messages"] * 2}
        assert both.post("/v1/chat/completions", two).json()["error"]["param"] == "apply_task_template"
        odd = one | {"apply_task_template": True, "model": "trio@nlu"}  # its template has two fields
        assert both.post("/v1/chat/completions", odd).json()["error"]["param"] == "apply_task_template"


def test_every_mistake_of_a_body_is_named_at_once(both):
    body = {
        "model": 5,
        "prompt": "x",
        "n": "two",
        "top_p": "x",
        "foo": 1,
        "stop": 3,
        "logit_bias": {"x": 1},
        "stream": "yes",
    }
    error = both.post("/v1/completions", body).json()["error"]
    assert [problem["field"] for problem in error["problems"]] == [
        "model",
        "stream",
        "n",
        "top_p",
        "stop",
        "logit_bias",
        "foo",
    ]
    assert all(problem["remedy"] for problem in error["problems"])


def test_null_counts_as_not_sent(both):
    body = {
        "model": "trio",
        "prompt": "x",
        "max_tokens": 3,
        "stop": None,
        "logprobs": None,
        "suffix": None,
        "user": "me",
    }
    assert both.post("/v1/completions", body).status_code == 200
