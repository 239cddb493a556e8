"""What this server takes, vLLM's own models of requests take too: their errors would be texts of pydantic."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from loraf_serve.errors import InvalidRequest
from loraf_serve.http import asked, fields
from loraf_serve.http.asked import read_completion
from loraf_serve.http.chats import read_chat
from loraf_serve.request import sampling

NAMES = sorted(
    {
        *(*fields._WHOLE, *fields._NUMBERS, *fields._FLAGS, *asked._BEYOND, *asked._BEYOND_CHAT),
        *(*asked._FOR_APP, *asked._FOR_APP_CHAT, *asked._NOT_SERVED, "tool_choice", "parallel_tool_calls", "prompt"),
        *("logit_bias", "bad_words", "response_format", "structured_outputs", "max_completion_tokens", "priority"),
        *("user", "request_id", "apply_task_template", "add_special_tokens"),
    }
)
FUNCTION = {"type": "function", "function": {"name": "f"}}
VALUES: tuple[Any, ...] = (
    *(True, False, 0, 1, -1, 3, 1.5, 10**30, "", "x", "none", "high"),
    *([], [1], ["x"], [None], [[]], [{"role": "user"}], [{"type": "function"}], [FUNCTION], {}, {"a": 1}),
    *(FUNCTION, {"type": "function"}, {"type": "function", "function": {"name": 5}}, {"type": "json_object"}),
)
CALLS: tuple[Any, ...] = (
    *({}, {"function": {}}, {"id": "a", "function": {"name": "f"}}, {"function": {"name": "f", "arguments": "{}"}}),
    {"id": "a", "function": {"name": "f", "arguments": "{}"}, "index": "x"},
    {"id": "a", "function": {"name": "f", "arguments": 5}},
    {"id": 5, "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": None, "type": "x", "function": None},
)
CHAT = {"model": "trio", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "trio", "prompt": "x"}


def bodies_of_chats() -> Iterator[dict[str, Any]]:
    for name, value in itertools.product(NAMES, VALUES):
        yield CHAT | {name: value}
    for more, (name, value) in itertools.product(
        ({"tools": [FUNCTION]}, {"stream": True}, {"logprobs": True}), itertools.product(NAMES, VALUES)
    ):
        yield CHAT | more | {name: value}
    for role, content, call in itertools.product(
        ("user", "assistant", "system", "tool", "x"), ("x", None, [], [{"type": "text", "text": "x"}]), CALLS
    ):
        message = {"role": role, "content": content}
        yield from (CHAT | {"messages": [message | more]} for more in ({"tool_calls": [call]}, {"tool_calls": []}, {}))
    for value in VALUES:
        for name in ("include_usage", "continuous_usage_stats"):
            yield CHAT | {"stream": True, "stream_options": {name: value}}
        yield CHAT | {"chat_template_kwargs": {"x": value}}


def bodies_of_completions() -> Iterator[dict[str, Any]]:
    for more, (name, value) in itertools.product(
        ({}, {"stream": True}, {"logprobs": 1}), itertools.product(NAMES, VALUES)
    ):
        yield COMPLETION | more | {name: value}


@pytest.mark.parametrize("is_chat", [False, True])
def test_vllms_models_take_whatever_is_not_refused_here(is_chat):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    taken = 0
    for body in bodies_of_chats() if is_chat else bodies_of_completions():
        try:
            read = (read_chat if is_chat else read_completion)(body)
            for request in read.requests:
                sampling.read(request.sampling, 1000, (0,))
        except InvalidRequest:
            continue
        if read.problems or not all(message.role for message in read.requests[0].messages.messages):
            continue  # a message without a role is refused with the chat
        (ChatCompletionRequest if is_chat else CompletionRequest).model_validate(
            json.loads(json.dumps(read.for_app | {"model": "trio"}))
        )
        taken += 1
    assert taken > 200
