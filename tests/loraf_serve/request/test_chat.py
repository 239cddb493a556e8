"""A chat whose last message is the assistant's: the answer continues it, under the one header that it has."""

from __future__ import annotations

import pytest

from loraf_serve.adapters.registry import Registry
from loraf_serve.client import request_of
from loraf_serve.errors import InvalidRequest
from loraf_serve.request.validation import Validator
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.fake_backend import FakeBackend

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
# As Mistral's: an assistant's turn has no header, and there is no generation prompt.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
USER, OPEN = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is "}


def prompt_of(template: str, *messages: dict[str, str]) -> str:
    backend = FakeBackend()
    backend.tokenizer.chat_template = template
    request = request_of(pb.GenerateRequest, messages=list(messages), base=True)
    return backend.tokenizer.decode(Validator(backend).read_now(request, Registry()).prompt_token_ids)


@pytest.mark.parametrize(
    ("template", "continued"),
    [
        (CHATML, "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is "),
        (TRIMMED, "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is"),
        (BRACKETS, "[INST] 2 + 2? [/INST] It is "),
    ],
)
def test_the_last_message_of_the_assistant_stays_open(template, continued):
    assert prompt_of(template, USER, OPEN) == continued


def test_it_is_the_prompt_of_transformers_own_chat_pipeline():
    """Which continues such a message by default."""
    from transformers.pipelines.text_generation import Chat, TextGenerationPipeline

    tokenizer = FakeBackend().tokenizer
    tokenizer.chat_template = CHATML
    pipeline = TextGenerationPipeline.__new__(TextGenerationPipeline)
    pipeline.tokenizer = tokenizer
    for messages in ([USER], [USER, OPEN], [USER, OPEN, USER]):
        theirs = pipeline.preprocess(Chat(messages))["input_ids"][0]
        assert prompt_of(CHATML, *messages) == tokenizer.decode(theirs)


def test_an_earlier_message_of_the_assistant_is_closed_and_the_answer_is_a_new_one():
    prompt = prompt_of(CHATML, USER, OPEN, USER)
    assert "It is <|im_end|>" in prompt and prompt.endswith("<|im_start|>assistant\n")


def test_an_empty_last_message_opens_the_answer():
    assert prompt_of(CHATML, USER, OPEN | {"content": ""}) == prompt_of(CHATML, USER)


def test_a_template_that_cannot_show_the_last_message_refuses_it_with_a_remedy():
    only_users = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="end with a message of the user") as error:
        prompt_of(only_users, USER, OPEN)
    assert [problem.field for problem in error.value.problems] == ["messages"]
