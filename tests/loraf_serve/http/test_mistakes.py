"""All mistakes of a request in one answer, whoever finds them, in this server's own words."""

from __future__ import annotations

import pytest

from loraf_serve.http.fields import MOST_PROBLEMS
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.http.stand import both_doors

CHAT = {"model": "trio", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "trio", "prompt": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def both():
    with both_doors() as doors:
        yield doors


def problems(both, path: str, body: dict, status: int = 400) -> dict[str, str]:
    response = both.post(f"/v1/{path}", (COMPLETION if path == "completions" else CHAT) | body)
    error = response.json()["error"]
    assert response.status_code == status, response.text
    assert error["param"] == error["problems"][0]["field"] and all(p["remedy"] for p in error["problems"])
    assert len(error["problems"]) == len({(p["field"], p["message"]) for p in error["problems"]}), "told twice"
    return {problem["field"]: problem["message"] for problem in error["problems"]}


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        # a type, a range, an unknown field, a model, and the prompt
        (
            "completions",
            {"model": "gpt-4", "n": "two", "top_p": 7, "stop": [""], "what": 1, "prompt": ""},
            {"model", "n", "top_p", "stop[0]", "what", "prompt"},
        ),
        ("completions", {"temperature": "hot", "top_k": -7}, {"temperature", "top_k"}),
        ("completions", {"model": "trio@maht", "min_p": 3, "seed": "x"}, {"model", "min_p", "seed"}),
        ("completions", {"prompt": ["x", [1]], "n": 99}, {"prompt", "n"}),
        ("completions", {"prompt": ["x", "", ""], "n": 99}, {"prompt[1]", "prompt[2]", "n"}),
        ("completions", {"prompt": None, "n": 99}, {"prompt", "n"}),
        ("completions", {"prompt": [[]], "n": 99}, {"prompt", "n"}),
        ("completions", {"prompt": [10**40], "n": 99}, {"prompt", "n"}),
        ("completions", {"prompt": [[1], [], [10**6]]}, {"prompt[1]", "prompt[2][0]"}),
        ("completions", {"max_tokens": "x", "min_tokens": 40}, {"max_tokens"}),  # 40 may be right
        ("chat/completions", {"messages": None, "top_p": 7}, {"messages", "top_p"}),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 5}, {"content": "x"}], "n": 99},
            {"messages[0].content", "messages[1].role", "n"},
        ),
        ("chat/completions", {"tools": [{"function": 5}], "tool_choice": "auto"}, {"tools[0].function"}),
        (
            "chat/completions",
            {"tools": [{"function": {"name": ""}}], "tool_choice": "none", "n": 0},
            {"tools[0].function.name", "n", "tools"},
        ),
        ("chat/completions", {"logprobs": "x", "top_logprobs": 3}, {"logprobs"}),
        ("chat/completions", {"top_logprobs": 3, "n": 0}, {"top_logprobs", "n"}),
        (
            "chat/completions",
            {"max_completion_tokens": "x", "temperature": 9},
            {"max_completion_tokens", "temperature"},
        ),
    ],
)
def test_every_mistake_is_told_at_once(both, path, body, fields):
    found = problems(both, path, body)
    missing, more = fields - found.keys(), found.keys() - fields
    # The fake backend is none of vLLM's.
    assert not missing and all("vLLM's app can" in found[field] for field in more), (missing, more)


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("chat/completions", {"reasoning_effort": "much"}, "reasoning_effort", "is not one of the efforts"),
        ("chat/completions", {"stream_interval": 0}, "stream_interval", "is out of range"),
        ("chat/completions", {"tools": [{}]}, "tools[0].function", "is missing"),
        ("chat/completions", {"tools": [TOOL], "tool_choice": "must"}, "tool_choice", "is not a choice of tools"),
        ("chat/completions", {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "is not a choice"),
        (
            "chat/completions",
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
            "is not one of the tools",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": None}]}]},
            "messages[0].tool_calls[0].id",
            "is missing",
        ),
        ("completions", {"logprob_token_ids": [1]}, "logprob_token_ids", "needs logprobs"),
    ],
)
def test_what_vllms_models_would_refuse_is_refused_in_words_of_this_server(both, path, body, field, message):
    assert message in problems(both, path, body)[field]


def test_an_empty_list_of_tools_is_none(both):
    assert both.post("/v1/chat/completions", CHAT | {"tools": [], "apply_task_template": True}).status_code == 200


def test_only_what_was_sent_is_named(both):
    """`echo` with `logprobs` scores the prompt, but the client has not asked for `prompt_logprobs`."""
    assert set(problems(both, "completions", {"echo": True, "logprobs": 2}, 501)) == {"echo"}
    both_sent = {"echo": True, "logprobs": 2, "prompt_logprobs": 2}
    assert set(problems(both, "completions", both_sent, 501)) == {"echo", "prompt_logprobs"}
    assert set(problems(both, "completions", {"echo": True, "logprobs": 99}, 501)) == {"echo", "logprobs"}


@pytest.mark.parametrize(("path", "others"), [("completions", COMPLETION), ("chat/completions", CHAT)])
def test_the_remedy_of_prompt_logprobs_in_a_stream_helps(both, path, others):
    response = both.post(f"/v1/{path}", others | {"stream": True, "prompt_logprobs": 1})
    told = [p for p in response.json()["error"]["problems"] if "pieces" in p["message"]]
    assert [(p["field"], p["remedy"]) for p in told] == [("prompt_logprobs", "leave it out, or do not stream")]


def test_tools_that_nobody_could_call_are_named_and_not_the_choice_that_was_not_sent(both):
    assert "tool_choice" not in problems(both, "chat/completions", {"tools": [TOOL]}, 501)


def test_a_missing_chat_template_is_told_once_and_not_alone():
    backend = FakeBackend()
    backend.tokenizer.chat_template = None
    with both_doors(backend) as both:
        assert set(problems(both, "chat/completions", {})) == {"messages"}
        assert set(problems(both, "chat/completions", {"n": 0})) == {"messages", "n"}
        more = {"messages": CHAT["messages"] * 2, "apply_task_template": True, "n": 0}
        assert {"apply_task_template", "n"} <= set(problems(both, "chat/completions", more))


def test_what_is_wrong_with_a_model_is_not_taken_for_what_a_token_may_not_use(tmp_path):
    token, file = "math-0123456789abcdef", tmp_path / "tokens"
    file.write_text(f"{token} tasks=math")
    with both_doors(token_file=file, token=token) as both:
        assert set(problems(both, "completions", {"model": "gpt-4"}, 404)) == {"model"}
        for model in ("gpt-4", "trio@math:x", 5):
            body = {"model": model, "n": 0, "apply_task_template": True}
            assert set(problems(both, "completions", body)) == {"model", "n"}
            assert set(problems(both, "chat/completions", body)) == {"model", "n"}


def test_there_is_a_most(both):
    many = {"prompt": [""] * 100, **{f"x{i}": 1 for i in range(12)}}
    assert len(problems(both, "completions", many)) <= MOST_PROBLEMS
