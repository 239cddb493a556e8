"""Limits hold before anything takes long, and long requests do not delay short ones."""

from __future__ import annotations

import asyncio
import threading

import pytest

from loraf_serve import limits
from loraf_serve.adapters.registry import Registry
from loraf_serve.client import request_of
from loraf_serve.errors import InvalidRequest
from loraf_serve.request import chat, lanes
from loraf_serve.request.lanes import SHORT
from loraf_serve.request.prompts import PromptReader
from loraf_serve.request.validation import Validator
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import on_a_loop, serving


def messages(count: int, content: str = "x") -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    request.task_selection.base.SetInParent()
    request.messages.messages.extend([pb.Message(role="user", content=content)] * count)
    return request


def fields(error: pytest.ExceptionInfo) -> list[str]:
    return [problem.field for problem in error.value.problems]


@on_a_loop
async def test_too_many_messages_never_reach_a_thread(monkeypatch):
    validator = Validator(FakeBackend())
    monkeypatch.setattr(lanes.Lanes, "run", None)  # any use of it fails
    for request in (messages(limits.MAX_MESSAGES + 1), messages(2, "x" * (limits.MAX_MESSAGES_CHARACTERS // 2))):
        with pytest.raises(InvalidRequest) as error:
            await validator.read(request, Registry())
        assert fields(error) == ["messages.messages"]
    validator.close()


def test_the_largest_chat_is_read():
    backend = FakeBackend(max_model_len=20_000)
    backend.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    request = messages(limits.MAX_MESSAGES)
    # The tokenizer puts nothing around it.
    assert len(Validator(backend).read_now(request, Registry()).prompt_token_ids) == limits.MAX_MESSAGES


def test_calls_of_tools_are_counted_before_they_are_read():
    request = messages(1)
    request.messages.messages[0].tool_calls.extend([pb.ToolCall(name="f")] * (limits.MAX_TOOL_CALLS + 1))
    (problem,) = chat.size_problems(request)
    assert problem.field == "messages.messages" and "calls of tools" in problem.message


@on_a_loop
async def test_short_requests_do_not_wait_for_long_ones(monkeypatch):
    validator = Validator(FakeBackend(max_model_len=200_000))
    gate, started = threading.Event(), threading.Event()
    read = PromptReader.read

    def maybe_wait(self, request, templates):
        if len(request.prompt) > SHORT:
            started.set()
            assert gate.wait(20)
        return read(self, request, templates)

    monkeypatch.setattr(PromptReader, "read", maybe_wait)
    long = [
        asyncio.create_task(validator.read(request_of(pb.GenerateRequest, "x" * (SHORT + 1), base=True), Registry()))
        for _ in range(20)
    ]
    await asyncio.to_thread(started.wait, 20)
    for _ in range(3):
        short = request_of(pb.GenerateRequest, "x", base=True)
        assert (await validator.read(short, Registry())).prompt_token_ids
    assert not any(task.done() for task in long)
    gate.set()
    assert all(len(valid.prompt_token_ids) > SHORT for valid in await asyncio.gather(*long))
    validator.close()


def test_twenty_chats_of_300_000_messages_render_no_template(monkeypatch):
    """They are refused while another client is answered."""
    rendered = []
    text_of = chat.text_of

    def counting(tokenizer, messages, tools):
        rendered.append(len(messages.messages))
        return text_of(tokenizer, messages, tools)

    monkeypatch.setattr(chat, "text_of", counting)
    backend = FakeBackend()
    backend.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with serving(backend) as running:
        flood = [running.generation.Generate.future(messages(300_000), timeout=60) for _ in range(20)]
        for _ in range(5):
            assert running.client.generate(messages=[{"role": "user", "content": "hi"}], base=True).text
        codes = [call.code().name for call in flood]
    assert codes == ["INVALID_ARGUMENT"] * 20
    assert rendered == [1] * 5


def test_a_prompt_with_too_many_log_probabilities_is_refused():
    validator = Validator(FakeBackend(max_model_len=40_000))
    most = limits.MAX_PROMPT_LOGPROBS_ENTRIES // 3
    fits = request_of(pb.GenerateRequest, prompt_token_ids=[5] * most, base=True, prompt_logprobs=2)
    assert validator.read_now(fits, Registry()).sampling.prompt_logprobs == 2
    fits.prompt_token_ids.ids.append(5)
    with pytest.raises(InvalidRequest) as error:
        validator.read_now(fits, Registry())
    assert fields(error) == ["sampling.prompt_logprobs"]
