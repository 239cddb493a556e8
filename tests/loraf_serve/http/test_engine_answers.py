"""OpenAI's own client against vLLM's app on the engine that serves gRPC: the answers are gRPC's, token for token."""

from __future__ import annotations

import asyncio
import json

import pytest

from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.harness import eventually
from tests.loraf_serve.http.engine_stand import CHAT, GREEDY, idle, model, on_engine, over_grpc
from tests.loraf_serve.vllm_engines import shared

pytestmark = shared("mistral")
SETS = ("math", "nlu:0.5+math", "math:-1.25+nlu:0.5+code:2", "all", "as_trained=nlu", "support", "base")
PROMPTS = ("Hello", "What is 7 times 6?\n", "x", "The quick brown fox jumps over the lazy dog. " * 3)


def test_completions_of_many_sets_in_one_batch_are_grpcs(both):
    expected = {(s, p): over_grpc(both, s, prompt=p) for s in SETS for p in PROMPTS}

    async def ask_all():
        async with both.asynchronous() as client:
            answers = [client.completions.create(model=model(s), prompt=p, **GREEDY) for s, p in expected]
            return await asyncio.gather(*answers)

    for (text, prompt), answer in zip(expected, asyncio.run(ask_all()), strict=True):
        choice = answer.choices[0]
        assert (choice.text, choice.token_ids) == expected[text, prompt], (text, prompt)
        assert answer.model == model(text) and choice.finish_reason == "length"
        digest = "" if text == "base" else both.grpc.client.adapters()[0].digest
        assert answer.system_fingerprint.startswith(f"loraf:{digest}") and answer.usage.completion_tokens == 8


def test_chats_are_grpcs(both):
    for text in SETS:
        expected = over_grpc(both, text, messages=CHAT)
        answer = both.openai.chat.completions.create(model=model(text), messages=CHAT, **GREEDY)
        assert (answer.choices[0].message.content, answer.choices[0].token_ids) == expected, text
        assert answer.choices[0].message.role == "assistant"


def test_streams_join_to_the_whole_answer(both):
    expected = over_grpc(both, "math:0.5", prompt=PROMPTS[1])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = list(both.openai.completions.create(model="main@math:0.5", prompt=PROMPTS[1], **GREEDY, **options))
    pieces = [event.choices[0] for event in events if event.choices]
    assert ("".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids or ()]) == expected
    assert len(pieces) > 2 and events[-1].usage.completion_tokens == 8
    assert events[-1].system_fingerprint.endswith(":math:0.5")

    async def chat() -> str:
        async with both.asynchronous() as client:
            stream = await client.chat.completions.create(model="main@nlu", messages=CHAT, **GREEDY, stream=True)
            return "".join([event.choices[0].delta.content or "" async for event in stream])

    assert asyncio.run(chat()) == over_grpc(both, "nlu", messages=CHAT)[0]


def test_prompts_as_a_list_and_as_token_ids(both):
    ids = both.grpc.backend.tokenizer(PROMPTS[1])["input_ids"]
    expected = [over_grpc(both, "code", prompt=prompt)[0] for prompt in PROMPTS[:2]]
    answer = both.openai.completions.create(model="main@code", prompt=list(PROMPTS[:2]), **GREEDY)
    assert [choice.text for choice in answer.choices] == expected
    assert both.openai.completions.create(model="main@code", prompt=ids, **GREEDY).choices[0].text == expected[1]
    several = {"n": 2, "temperature": 1, "max_tokens": 3, "seed": 1}
    answer = both.openai.completions.create(model="main@code", prompt=["a", "b"], **several)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.usage.completion_tokens <= 12


def test_without_a_name_the_only_adapter_answers(both):
    expected = over_grpc(both, "all", prompt="Hello")
    for name in ("", "main", "main@all", "@all"):
        assert both.openai.completions.create(model=name, prompt="Hello", **GREEDY).choices[0].text == expected[0]
    expected = over_grpc(both, "nlu", prompt="Hello")
    assert both.openai.completions.create(model="@nlu", prompt="Hello", **GREEDY).choices[0].text == expected[0]


def test_log_probabilities_are_grpcs_and_none_is_lost(both):
    request = {"max_tokens": 6, "temperature": 0, "logprobs": 5}
    asked = request_of(pb.GenerateRequest, "Hello", tasks=["math"], **request, ignore_eos=True)
    expected = both.grpc.generation.Generate(asked).choices[0].logprobs
    answer = both.openai.completions.create(
        model="main@math", prompt="Hello", **request, extra_body={"ignore_eos": True}
    ).choices[0]
    assert answer.logprobs.token_logprobs == pytest.approx([position.chosen.logprob for position in expected])
    for position, top in zip(expected, answer.logprobs.top_logprobs, strict=True):
        # vLLM's app may show the sampled token in addition.
        assert sorted(top.values(), reverse=True)[:5] == pytest.approx([token.logprob for token in position.top])
    chat = both.openai.chat.completions.create(
        model="main@math", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    positions = chat.choices[0].logprobs.content
    assert all(len(position.top_logprobs) == 3 for position in positions)


def test_echo_scores_a_text(both):
    """As lm-evaluation-harness does: log-probabilities of the prompt's tokens, and one more token."""
    ids = both.grpc.backend.tokenizer("Hello there")["input_ids"]
    asked = request_of(pb.GenerateRequest, prompt_token_ids=ids, tasks=["math"], max_tokens=1, prompt_logprobs=1)
    scored = both.grpc.generation.Generate(asked)
    for prompt in ("Hello there", ids):
        answer = both.openai.completions.create(
            model="main@math", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0
        ).choices[0]
        values = answer.logprobs.token_logprobs
        assert len(values) == len(ids) + 1 and values[0] is None
        expected = [position.chosen.logprob for position in scored.prompt_logprobs[1:]]
        assert values[1 : len(ids)] == pytest.approx(expected)
        assert "Hello there" in answer.text


def test_a_form_of_the_answer(both):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    for _ in range(2):
        answer = both.openai.chat.completions.create(
            model="main", messages=CHAT, response_format=response_format, max_tokens=40
        )
        assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)
    body = {"model": "main", "prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}}
    assert both.post("/v1/completions", body).json()["choices"][0]["text"] in ("yes", "no")


def test_fields_that_only_vllms_app_knows_are_obeyed(both):
    def complete(**fields):
        body = {
            "model": "main",
            "prompt": "Hello",
            "max_tokens": 8,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }
        return both.post("/v1/completions", body).json()["choices"][0]

    letter = both.grpc.backend.tokenizer("a")["input_ids"][-1]
    assert set(complete(allowed_token_ids=[letter, 101])["token_ids"]) <= {letter, 101}
    only = {"allowed_token_ids": [letter], "stop": "a"}
    stopped, kept = complete(**only), complete(**only, include_stop_str_in_output=True)
    assert (stopped["text"], kept["text"], kept["stop_reason"]) == ("", "a", "a")
    named = complete(logprobs=1, logprob_token_ids=[7, 9], return_tokens_as_token_ids=True)["logprobs"]
    assert {"token_id:7", "token_id:9"} <= set(named["top_logprobs"][0])
    pieces = [
        line
        for line in both.post(
            "/v1/completions",
            {"model": "main", "prompt": "x", "max_tokens": 8, "ignore_eos": True, "stream": True, "stream_interval": 4},
        ).text.splitlines()
        if line.startswith("data: {")
    ]
    assert len(pieces) <= 4

    def chat(**fields):
        body = {"model": "main", "messages": CHAT, "max_tokens": 4, "return_prompt_text": True, **fields}
        return both.post("/v1/chat/completions", body).json()["prompt_text"]

    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    assert chat(messages=begun, continue_final_message=True, add_generation_prompt=False).endswith("It is")
    assert not chat(messages=begun).endswith("It is")
    assert chat() != chat(add_generation_prompt=False)


def test_sixteen_stops_as_over_grpc(both):
    """vLLM's app admits four."""
    whole = both.openai.completions.create(model="main", prompt="x", max_tokens=40, temperature=0).choices[0].text
    stops = [f"never {i}" for i in range(15)] + [whole[3:5]]
    answer = both.openai.completions.create(
        model="main", prompt="x", max_tokens=40, temperature=0, stop=stops, extra_body={}
    )
    assert answer.choices[0].text == whole[: whole.index(whole[3:5])] and answer.choices[0].finish_reason == "stop"


def test_slots_answer_through_the_same_app(vllm_pool):
    engine = vllm_pool.get("mistral", "slots")
    texts = ("math", "nlu:0.5+math", "code", "math+nlu", "nlu", "base")  # more sets than slots
    with on_engine(engine) as both:
        expected = {text: over_grpc(both, text, prompt="Hello") for text in texts}

        async def ask_all():
            async with both.asynchronous() as client:
                asked = [client.completions.create(model=model(t), prompt="Hello", **GREEDY) for t in expected]
                return await asyncio.gather(*asked)

        for text, answer in zip(expected, asyncio.run(ask_all()), strict=True):
            assert (answer.choices[0].text, answer.choices[0].token_ids) == expected[text], text
        assert eventually(lambda: idle(both, engine))
