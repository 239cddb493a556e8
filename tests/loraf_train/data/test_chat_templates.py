"""What is learned of an answer is what the chat template writes: the reference are transformers' generation markers.

For every template and every answer, the sequence up to the end of the answer has the token ids of the conversation up
to the end of that turn, and the loss is on those that the markers enclose.
"""

from __future__ import annotations

from datetime import date

import pytest

from loraf_train.data.examples import IGNORED, RecordText, tokenize
from loraf_train.data.forms.chat import ChatForm
from loraf_train.data.forms.form import RecordFault
from loraf_train.settings.data import RecordSource
from tests.loraf_train import chat_templates as templates

DAY = date(2024, 7, 26)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def call(arguments) -> dict:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}],
    }


USER, SECOND = {"role": "user", "content": " hi? "}, {"role": "user", "content": "and four"}
ANSWER, LAST = {"role": "assistant", "content": "Yes\n2"}, {"role": "assistant", "content": "four "}
RESULT = {"role": "tool", "content": "2"}
CONVERSATIONS = {
    "plain": {"messages": [USER, ANSWER, SECOND, LAST]},
    "one": {"messages": [USER, LAST]},
    "calls": {"messages": [USER, {**call({"a": 1}), "content": None}, RESULT, LAST, SECOND, LAST], "tools": TOOLS},
    "text and call": {"messages": [USER, {**call({"a": "é"}), "content": "Let me add."}, RESULT, LAST], "tools": TOOLS},
    "thoughts": {
        "messages": [USER, {**ANSWER, "reasoning_content": "hm"}, SECOND, {**LAST, "reasoning_content": "so"}]
    },
    "thoughts in content": {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"}]},
}
OF_MODEL = {
    "GEMMA": ["plain", "one"],
    "PHI3": ["plain", "one"],
    "QWEN2": ["plain", "one", "calls", "text and call", "thoughts in content"],
    "QWEN3": ["plain", "one", "calls", "text and call", "thoughts", "thoughts in content"],
    "LLAMA3": ["plain", "one", "calls"],
    "MISTRAL": ["plain", "one", "calls"],
    "HEADLESS": ["plain", "one"],
}
CASES = [(model, name) for model, names in OF_MODEL.items() for name in names]


def examples_of(tokenizer, record: dict) -> list:
    form = ChatForm(tokenizer, DAY)
    text = RecordText(form.texts(record), "", RecordSource(dataset="d"), 1, record)
    return tokenize([text], tokenizer, special_tokens=False, ends=form.ends)[0]


def learned_parts(example) -> list[tuple[int, int]]:
    """[begin, end) of every part with loss."""
    labels = [IGNORED, *example.labels(), IGNORED]
    changes = [i for i in range(len(labels) - 1) if (labels[i] == IGNORED) != (labels[i + 1] == IGNORED)]
    return list(zip(changes[::2], changes[1::2], strict=True))


def answers_of(tokenizer, record: dict) -> list[tuple[list[int], list[int]]]:
    """(ids before, ids of the answer) of everything that is learned."""
    found = []
    for example in examples_of(tokenizer, record):
        found += [(example.input_ids[:b], example.input_ids[b:e]) for b, e in learned_parts(example)]
    return found


def reference(marked, record: dict, index: int) -> tuple[list[int], list[int]]:
    """The same of one answer, by transformers."""
    out = marked.apply_chat_template(
        record["messages"][: index + 1],
        tools=record.get("tools"),
        return_assistant_tokens_mask=True,
        return_dict=True,
        strftime_now=DAY.strftime,
    )
    mask = out["assistant_masks"]
    end = len(mask) - mask[::-1].index(1)
    begin = end - [*mask[:end][::-1], 0].index(0)
    return out["input_ids"][:begin], out["input_ids"][begin:end]


@pytest.mark.parametrize(("model", "conversation"), CASES)
def test_every_answer_is_learned_as_the_template_writes_it(tmp_path, model, conversation):
    kind, record = getattr(templates, model), CONVERSATIONS[conversation]
    tokenizer, marked = templates.tokenizer_of(kind, tmp_path), templates.tokenizer_of(kind, marked=True)
    answers = [i for i, message in enumerate(record["messages"]) if message["role"] == "assistant"]
    expected = [reference(marked, record, i) for i in answers]
    assert answers_of(tokenizer, record) == expected
    for i, (before, _) in zip(answers, expected, strict=True):  # and the prompt is the one that a server gets
        prompt = tokenizer.apply_chat_template(
            record["messages"][:i], tools=record.get("tools"), add_generation_prompt=True, strftime_now=DAY.strftime
        )
        assert prompt["input_ids"] == before


def test_turns_of_a_model_with_its_own_end_token_share_a_sequence(tmp_path):
    for model in (templates.GEMMA, templates.PHI3, templates.QWEN2, templates.LLAMA3):
        (example,) = examples_of(templates.tokenizer_of(model, tmp_path), CONVERSATIONS["plain"])
        assert len(learned_parts(example)) == 2


def test_an_end_of_turn_at_which_nothing_stops_is_followed_by_an_end_of_sequence():
    """Without generation_config.json, only the end of sequence ends an answer."""
    tokenizer = templates.tokenizer_of(templates.GEMMA)
    learned = [tokenizer.decode(answer) for _, answer in answers_of(tokenizer, CONVERSATIONS["plain"])]
    assert learned == ["Yes\n2<end_of_turn>", "four<end_of_turn><eos>"]


def test_an_end_that_the_record_wrote_itself_is_not_doubled(tmp_path):
    record = {"messages": [USER, {"role": "assistant", "content": "four<|im_end|>"}]}
    tokenizer = templates.tokenizer_of(templates.QWEN2, tmp_path)
    ((_, answer),) = answers_of(tokenizer, record)
    assert tokenizer.decode(answer) == "four<|im_end|>"


@pytest.mark.parametrize(
    ("content", "learned"),
    [
        ("<think>\ntwo and two\n</think>\nfour", "two and two\n</think>\nfour<eos>"),
        ("<think>two</think>four", "two</think>four<eos>"),
        ("two\n</think>\n\nfour", "two\n</think>\n\nfour<eos>"),  # as such models answer after this prompt
        ("four", "\n</think>\n\nfour<eos>"),  # no thoughts, but they are open
    ],
)
def test_thoughts_that_the_prompt_has_opened_are_continued(content, learned):
    tokenizer = templates.tokenizer_of(templates.R1)
    ((prompt, answer),) = answers_of(tokenizer, {"messages": [USER, {"role": "assistant", "content": content}]})
    assert tokenizer.decode(prompt) == "<bos><|User|> hi? <|Assistant|><think>\n"
    assert tokenizer.decode(answer) == learned
    form = ChatForm(tokenizer)
    assert form.graded_text(learned) == "four"
    assert form.thinks(tokenizer.decode(prompt)) is True


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("model", ["QWEN2", "LLAMA3", "R1"])
def test_arguments_are_learned_as_json_however_they_are_written(tmp_path, model, content, arguments):
    """R1's template wants text and null, the others mappings: given text, they would write JSON within JSON."""
    tokenizer = templates.tokenizer_of(getattr(templates, model), tmp_path)
    record = {"messages": [USER, {**call(arguments), "content": content}]}
    ((_, answer),) = answers_of(tokenizer, record)
    assert (
        tokenizer.decode(answer)
        == {
            "QWEN2": '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
            "LLAMA3": '{"name": "add", "parameters": {"a": 1}}<|eot_id|>',
            "R1": '\n</think>\n\n<|tool_calls|>add\n{"a": 1}<eos>',
        }[model]
    )


def test_a_template_that_refuses_an_answer_at_the_end_is_followed_as_far_as_it_goes(tmp_path):
    tokenizer = templates.tokenizer_of(templates.GEMMA, tmp_path)
    refusal = (
        "{% if messages[-1].role == 'assistant' and not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    )
    tokenizer.chat_template = refusal + tokenizer.chat_template
    learned = [tokenizer.decode(answer) for _, answer in answers_of(tokenizer, CONVERSATIONS["plain"])]
    assert learned == ["Yes\n2<end_of_turn>", "four<end_of_turn>"]


def test_options_of_the_record_reach_the_template(tmp_path):
    tokenizer = templates.tokenizer_of(templates.QWEN2, tmp_path)
    tokenizer.chat_template += (
        "{% if add_generation_prompt and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    )
    record = {"messages": [USER, LAST], "chat_template_kwargs": {"enable_thinking": False}}
    ((prompt, answer),) = answers_of(tokenizer, record)
    assert tokenizer.decode(prompt).endswith("<think></think>")
    assert tokenizer.decode(answer) == "four <|im_end|>"


def test_thoughts_in_the_content_are_not_written_beside_those_of_the_template(tmp_path):
    """A template that reads them under their own key only, and one whose prompt has closed them."""
    record = {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"}]}
    tokenizer = templates.tokenizer_of(templates.QWEN3, tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("'</think>' in content", "false")
    ((_, answer),) = answers_of(tokenizer, record)
    assert tokenizer.decode(answer) == "<think>\nhm\n</think>\n\nfour<|im_end|>"
    closed = templates.tokenizer_of(templates.QWEN2, tmp_path)
    closed.chat_template = closed.chat_template.replace(
        "assistant\n' }}{% endif %}", "assistant\n<think></think>' }}{% endif %}"
    )
    with pytest.raises(RecordFault, match="thoughts in content in message 2"):
        ChatForm(closed).texts(record)


def test_an_answer_of_several_parts_is_learned_whole():
    """As gpt-oss writes thoughts: a message of their own, whose end is not the end of the turn, and left out later."""
    start, channel = "<|start|>assistant<|channel|>", "<|channel|>"
    model = templates.Model(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
        f"{{{{ '{start}analysis<|message|>' + m.thinking + '<|end|>' }}}}{{% endif %}}"
        f"{{{{ '{start}final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}}}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
    )
    tokenizer = templates.tokenizer_of(model)
    record = {"messages": [USER, {**ANSWER, "thinking": "hm"}, SECOND, LAST]}
    assert [tokenizer.decode(answer) for _, answer in answers_of(tokenizer, record)] == [
        f"{channel}analysis<|message|>hm<|end|>{start}final<|message|>Yes\n2<|return|>",
        f"{channel}final<|message|>four <|return|>",
    ]


@pytest.mark.parametrize(
    "loses",
    [
        ("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),  # gpt-oss writes the first call only
        ("c.function | tojson", "{'name': c.function.name} | tojson"),  # the name only
        ("c.function | tojson", "'' | tojson"),  # a mark, but nothing of the call
    ],
)
def test_calls_that_the_template_writes_in_part_are_refused(tmp_path, loses):
    tokenizer = templates.tokenizer_of(templates.QWEN2, tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace(*loses)
    twice = [*call({"a": 1})["tool_calls"], *call({"a": 2})["tool_calls"]]
    record = {"messages": [USER, {**call({}), "content": None, "tool_calls": twice}], "tools": TOOLS}
    with pytest.raises(RecordFault, match="tool_calls in message 2, which the chat template does not write"):
        ChatForm(tokenizer).texts(record)


def test_a_call_is_learned_after_a_prompt_that_ends_with_empty_thoughts(tmp_path):
    """As Gemma 4 writes them without thinking: in the prompt, but not in a finished turn."""
    tokenizer = templates.tokenizer_of(templates.QWEN2, tmp_path)
    opening = "{{ '<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        f"{opening}' }}}}{{% endif %}}", f"{opening}<|no thoughts|>' }}}}{{% endif %}}"
    )
    for content in (None, "Let me add."):
        ((prompt, answer),) = answers_of(tokenizer, {"messages": [USER, {**call({"a": 1}), "content": content}]})
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<|no thoughts|>")
        written = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
        assert tokenizer.decode(answer) == (content or "") + written


def test_a_short_content_that_stands_elsewhere_by_accident_is_missed(tmp_path):
    tokenizer = templates.tokenizer_of(templates.QWEN2, tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    record = {
        "messages": [{"role": "user", "content": "1 + 2"}, call({"a": 1}), {"role": "tool", "content": "2"}, ANSWER]
    }
    form = ChatForm(tokenizer)
    form.texts(record)
    assert "content in message 3" in form.losses[0][0]
