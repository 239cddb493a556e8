"""Bodies and headers by which one client could harm others, or get an answer to another question than it asked."""

from __future__ import annotations

import time

import openai
import pytest

from loraf_serve.http import merged
from loraf_serve.http.fields import MOST_PROBLEMS
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.http.stand import both_doors

MANY = 200_000
CHAT = {"model": "trio", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "trio", "prompt": "x"}


@pytest.fixture(scope="module")
def both():
    with both_doors(max_message_bytes=16 << 20) as doors:
        yield doors


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"stop_token_ids": [-1] * MANY}, "stop_token_ids"),
        ("completions", {"stop_token_ids": [-1] * 100}, "stop_token_ids"),
        ("completions", {f"unknown{i}": 1 for i in range(MANY)}, "unknown0"),
        ("completions", {"logit_bias": {str(i): "x" for i in range(MANY)}}, "logit_bias"),
        ("completions", {"stop": [1] * MANY}, "stop"),
        ("completions", {"bad_words": [1] * MANY}, "bad_words"),
        ("completions", {"structured_outputs": {"choice": ["x"] * MANY}}, "structured_outputs.choice"),
        ("chat/completions", {"messages": [{"a": 1}] * MANY}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [1] * MANY}]}, "messages[0].content"),
        ("chat/completions", {"messages": [{"role": "user", "tool_calls": [{}] * MANY}]}, "messages[0].tool_calls"),
        ("chat/completions", {"tools": [{}] * MANY}, "tools"),
    ],
)
def test_long_lists_are_refused_with_few_problems_and_in_little_time(both, path, body, field):
    both.http.get("/health")
    usual = COMPLETION if path == "completions" else CHAT
    began = time.thread_time()
    response = both.post(f"/v1/{path}", usual | body)
    assert time.thread_time() - began < 2
    error = response.json()["error"]
    assert response.status_code == 400 and len(error["problems"]) <= MOST_PROBLEMS and len(response.content) < 20_000
    assert any(problem["field"] == field for problem in error["problems"])


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"tools": "x"}, "tools"),
        ("completions", {"messages": 5}, "messages"),
        ("completions", {"top_logprobs": "x"}, "top_logprobs"),
        ("completions", {"echo": 1}, "echo"),
        ("completions", {"echo": "yes"}, "echo"),
        ("completions", {"return_token_ids": "no"}, "return_token_ids"),
        ("completions", {"cache_salt": 1}, "cache_salt"),
        ("completions", {"logit_bias": {"0005": 1, "5": 2}}, "logit_bias"),
        ("completions", {"logit_bias": {"5" * 5000: 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"5": 10**400}}, "logit_bias[5]"),
        ("completions", {"temperature": 10**400}, "temperature"),
        ("completions", {"model": "trio@math:1_0"}, "model"),
        ("completions", {"model": "trio@math:٣"}, "model"),
        ("chat/completions", {"reasoning_effort": 3}, "reasoning_effort"),
        ("chat/completions", {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
        ("chat/completions", {"parallel_tool_calls": "x"}, "parallel_tool_calls"),
    ],
)
def test_what_nobody_obeys_or_no_number_can_hold_is_refused(both, path, body, field):
    response = both.post(f"/v1/{path}", (COMPLETION if path == "completions" else CHAT) | body)
    assert response.status_code == 400, response.text
    assert field in [problem["field"] for problem in response.json()["error"]["problems"]]


@pytest.mark.parametrize("host", ["[::1", "evil.com@localhost", "localhost/evil", "localhost:abc", "localhost:1:2", ""])
def test_a_host_that_is_none_is_foreign(both, host):
    response = both.http.get("/v1/models", headers={"Host": host})
    assert response.status_code == 403 and response.json()["error"]["param"] == "Host"


def test_prompts_that_can_never_have_their_places_are_a_mistake():
    with both_doors(max_queue=4) as both:
        with pytest.raises(openai.BadRequestError, match="5 prompts, and at most 4") as refused:
            both.openai.completions.create(model="trio", prompt=["x"] * 5)
        assert refused.value.body["problems"][0]["field"] == "prompt"
        assert len(both.openai.completions.create(model="trio", prompt=["x"] * 4).choices) == 4


def test_every_token_of_a_position_keeps_its_log_probability():
    def token(number: int, logprob: float, text: str) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=number, logprob=logprob, text=text)

    top = [token(1, -1.0, ""), token(2, -2.0, "G"), token(3, -3.0, ""), token(4, -4.0, "G")]
    among, beyond = pb.PositionLogprobs(chosen=top[2], top=top), pb.PositionLogprobs(chosen=token(5, -9.0, ""), top=top)
    expected = {"token_id:1": -1.0, "G": -2.0, "token_id:3": -3.0, "token_id:4": -4.0}
    assert list(merged._named([among, beyond])) == [
        ("token_id:3", expected),
        ("token_id:5", expected | {"token_id:5": -9.0}),
    ]
