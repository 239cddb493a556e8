"""What must not get in by vLLM's app: the limits are those of gRPC."""

from __future__ import annotations

import pytest

from loraf_serve.limits import MAX_PROMPTS
from tests.loraf_serve.http.engine_stand import CHAT, GREEDY, over_grpc
from tests.loraf_serve.vllm_engines import shared

pytestmark = shared("mistral")

REFUSED = [
    ({"n": 17}, "n"),
    ({"n": 0}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": "x" * 20_000}, "prompt"),
    ({"prompt": [1, 5, 10**6]}, "prompt[2]"),
    ({"prompt": ["x"] * (MAX_PROMPTS + 1)}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["x", ""]}, "prompt[1]"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 2**70}, "max_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": 0.001}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"seed": -1}, "seed"),
    ({"stop": list("abcdefghijklmnopq")}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids[0]"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias[1000000]"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1000}}, "logit_bias[5]"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ({"allowed_token_ids": list(range(2000))}, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "bad_words": ["x"]}, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "min_tokens": 1}, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "response_format": {"type": "json_object"}}, "allowed_token_ids"),
    ({"stream_interval": 2**70}, "stream_interval"),
    ({"thinking_token_budget": "x"}, "thinking_token_budget"),
    ({"cache_salt": "x" * 2000}, None),
    ({"logprob_token_ids": [-1], "logprobs": 1}, "logprob_token_ids"),
    ({"bad_words": ["x"] * 65}, "bad_words"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
    ({"priority": 5000}, "priority"),
    ({"request_id": "x" * 200}, "request_id"),
    ({"structured_outputs": {"regex": "(" * 5000}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs.json"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"lora_request": {"lora_name": "x"}}, "lora_request"),
    ({"lora_path": "/etc"}, "lora_path"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
    ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    ({"suffix": "x"}, "suffix"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_completion_that_is_refused(both, fields, field):
    response = both.post("/v1/completions", {"model": "main", "prompt": "x", "max_tokens": 2} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["problems"][0]["message"] and error["request_id"] == response.headers["x-request-id"]
    assert field is None or error["problems"][0]["remedy"]
    assert field is None or error["param"] == field, response.text


PART = "messages[0].content[0]"
CHATS_REFUSED = [
    ({"messages": []}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x"}] * 2049}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
    ({"chat_template_kwargs": {"x": [{"y": 2**70}]}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"reasoning_effort": "wild"}, None),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"documents": [{"text": "x"}]}, "documents"),
    ({"functions": []}, "functions"),
    ({"messages": [{"role": "user", "content": "x" * 20_000}]}, None),
    ({"modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("fields", "field"), CHATS_REFUSED, ids=lambda value: str(value)[:40])
def test_a_chat_that_is_refused(both, fields, field):
    for stream in (False, True):
        body = {"model": "main", "messages": CHAT, "max_completion_tokens": 2, "stream": stream} | fields
        response = both.post("/v1/chat/completions", body)
        assert response.status_code == 400, response.text
        assert field is None or response.json()["error"]["param"] == field, response.text


def test_after_all_that_the_engine_answers(both):
    answer = both.openai.completions.create(model="main@code", prompt="Hello", **GREEDY)
    assert answer.choices[0].text == over_grpc(both, "code", prompt="Hello")[0]
    assert both.grpc.server._admission.in_flight == 0  # at once: the end of an answer comes after its place is free
