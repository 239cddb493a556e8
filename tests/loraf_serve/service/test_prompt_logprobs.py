"""Log-probabilities of a prompt reach the client once: in the answer, or in the first message of a stream."""

from __future__ import annotations

import pytest

from tests.loraf_serve.asking import ask, ask_stream
from tests.loraf_serve.harness import serving


@pytest.fixture(scope="module")
def running():
    with serving() as running:
        yield running


def check(positions, prompt) -> None:
    assert not positions[0].HasField("chosen") and not positions[0].top
    assert [p.chosen.token_id for p in positions[1:]] == prompt[1:]
    assert [p.chosen.logprob for p in positions[1:]] == [-1.0, -2.0]
    assert all(len(p.top) == 2 for p in positions[1:])


def test_they_come_once(running):
    prompt = [5, 6, 7]
    fields = {"prompt_token_ids": prompt, "prompt_logprobs": 2, "n": 2, "max_tokens": 3}
    check(running.generation.Generate(ask(**fields), timeout=20).prompt_logprobs, prompt)
    first, *others = running.generation.StreamGenerate(ask_stream(**fields), timeout=20)
    check(first.prompt_logprobs, prompt)
    assert others and not any(message.prompt_logprobs for message in others)


def test_without_the_field_there_are_none(running):
    assert not running.generation.Generate(ask("x", logprobs=1), timeout=20).prompt_logprobs
    zero = running.generation.Generate(ask(prompt_token_ids=[5, 6], prompt_logprobs=0), timeout=20)
    assert len(zero.prompt_logprobs) == 2 and zero.prompt_logprobs[1].chosen.token_id == 6
