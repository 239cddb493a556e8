"""Conversations: every answer of the assistant is learned, after the same tokens that a server would put before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraf.errors import ConfigError
from loraf_train.data.examples import IGNORED, Example
from loraf_train.data.task_data import TaskData, load_task
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig, EvaluationSource, RecordSource
from loraf_train.settings.parts import TrainingConfig
from tests.loraf_train import small_tokenizers as small
from tests.loraf_train.data.test_examples import write_jsonl
from tests.standins import byte_tokenizer

TURNS = [
    {"role": "system", "content": "be {brief}"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "last one"},
    {"role": "user", "content": "not answered"},
]


def loaded(folder: Path, tokenizer, *conversations: list[dict], max_length: int = 512) -> TaskData:
    path = write_jsonl(folder / "rows.jsonl", [{"messages": turns} for turns in conversations])
    data = DataConfig(train=(RecordSource(file=path),), eval={"e": EvaluationSource(file=path)})
    training = TrainingConfig(max_length=max_length)
    return load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data, training=training), tokenizer, 0)


def rendered(tokenizer, turns: list[dict], opening: bool = True) -> list[int]:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=opening)["input_ids"]


def learned(tokenizer, example: Example) -> list[str]:
    """Texts of the parts with loss, in order."""
    parts: list[list[int]] = []
    before = IGNORED
    for label in example.labels():
        if label != IGNORED:
            if before == IGNORED:
                parts.append([])
            parts[-1].append(label)
        before = label
    return [tokenizer.decode(part) for part in parts]


def test_all_answers_of_a_conversation_are_learned_in_one_sequence(tmp_path):
    tokenizer = small.chatml_tokenizer()
    (example,) = loaded(tmp_path, tokenizer, TURNS).train
    assert learned(tokenizer, example) == ["first<|im_end|>", "last one<|im_end|>"]
    assert example.prompt_length == len(rendered(tokenizer, TURNS[:2]))
    whole = rendered(tokenizer, TURNS[:5], opening=False)
    assert example.input_ids == whole[:-1]  # up to the end of sequence; the template adds a line break


def test_the_loss_mask_equals_that_of_generation_markers(tmp_path):
    """The reference is transformers' own mask, from the same template with markers."""
    tokenizer = small.chatml_tokenizer()
    (example,) = loaded(tmp_path, tokenizer, TURNS).train
    marked = small.chatml_tokenizer()
    marked.chat_template = small.MARKED_CHATML
    reference = marked.apply_chat_template(TURNS[:5], return_assistant_tokens_mask=True, return_dict=True)
    assert reference["input_ids"][:-1] == example.input_ids
    assert [int(label != IGNORED) for label in example.labels()] == reference["assistant_masks"][:-1]


def test_a_bos_of_the_template_is_not_doubled_by_the_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()
    (example,) = loaded(tmp_path, tokenizer, TURNS).train
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[: example.prompt_length] == rendered(tokenizer, TURNS[:2])
    # This template ends turns with a line break: only the last answer has an end of sequence to learn.
    assert learned(tokenizer, example) == ["first", "last one</s>"]


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_a_template_that_trims_and_adds_spaces_is_followed(tmp_path, space):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = small.LLAMA2
    turns = [m | {"content": space + m["content"] + space} for m in TURNS[1:5]]
    (example,) = loaded(tmp_path, tokenizer, turns).train
    assert learned(tokenizer, example) == [" first </s>", " last one </s>"]
    assert example.input_ids == rendered(tokenizer, turns, opening=False)
    assert example.input_ids.count(tokenizer.bos_token_id) == 2  # this template begins every question with one


def test_a_template_that_removes_thoughts_gives_a_sequence_for_each_answer(tmp_path):
    tokenizer = small.chatml_tokenizer()
    tokenizer.chat_template = small.THOUGHTFUL
    turns = [m | {"content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in TURNS]
    examples = loaded(tmp_path, tokenizer, turns).train
    assert [learned(tokenizer, e) for e in examples] == [
        ["<think>hm</think>first<|im_end|>"],
        ["<think>hm</think>last one<|im_end|>"],
    ]
    for example, before in zip(examples, (turns[:2], turns[:4]), strict=True):
        assert example.input_ids[: example.prompt_length] == rendered(tokenizer, before)


def test_tokens_that_merge_across_a_turn_give_a_sequence_for_each_answer(tmp_path):
    tokenizer = small.merging_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}[m.role] + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    turns = [
        {"role": "user", "content": "the sky?"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "two and two?"},
        {"role": "assistant", "content": "four"},
    ]
    examples = loaded(tmp_path, tokenizer, turns).train
    assert [learned(tokenizer, e) for e in examples] == [[" blue</s>"], [" four</s>"]]
    for example, before in zip(examples, (turns[:1], turns[:3]), strict=True):
        assert example.input_ids[: example.prompt_length] == rendered(tokenizer, before)


def test_answers_of_weight_zero_are_only_context(tmp_path):
    tokenizer = small.chatml_tokenizer()
    turns = [*TURNS[:2], TURNS[2] | {"weight": 0}, TURNS[3], TURNS[4] | {"weight": 1}]
    (example,) = loaded(tmp_path, tokenizer, turns).train
    assert learned(tokenizer, example) == ["last one<|im_end|>"]
    assert example.input_ids[: example.prompt_length] == rendered(tokenizer, TURNS[:4])
    with pytest.raises(ConfigError, match="record 1: has no answer of the assistant"):
        loaded(tmp_path, tokenizer, [*TURNS[:2], TURNS[2] | {"weight": 0}])


def test_only_the_last_answer_is_scored(tmp_path):
    tokenizer = small.chatml_tokenizer()
    (question,) = loaded(tmp_path, tokenizer, TURNS).evaluation["e"].examples
    assert question.prompt_ids == rendered(tokenizer, TURNS[:4])
    assert question.expected == "last one"
    assert learned(tokenizer, question.example) == ["last one<|im_end|>"]


def test_a_cut_conversation_keeps_its_loss_mask(tmp_path):
    """Wherever it is cut: in an answer, in a question, or between them."""
    tokenizer = small.chatml_tokenizer()
    (whole,) = loaded(tmp_path, tokenizer, TURNS).train
    length = len(whole.input_ids)
    for cut in range(whole.prompt_length + 1, length + 2):
        data = loaded(tmp_path, tokenizer, TURNS, max_length=cut)
        assert data.train[0].labels() == whole.labels()[:cut]
        assert (data.cut, data.dropped) == (int(cut < length), 0)
    with pytest.raises(ConfigError, match="fills max_length"):
        loaded(tmp_path, tokenizer, TURNS, max_length=whole.prompt_length)


def test_conversations_are_read_from_parquet(tmp_path):
    """Parquet gives messages as lists of mappings, with None where a key is missing."""
    import pandas

    tokenizer = small.chatml_tokenizer()
    rows = [{"messages": TURNS[:3]}, {"messages": [TURNS[1], TURNS[2] | {"weight": 1}]}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    data = DataConfig(train=(RecordSource(file=tmp_path / "rows.parquet"),))
    examples = load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), tokenizer, 0).train
    assert [learned(tokenizer, e) for e in examples] == [["first<|im_end|>"], ["first<|im_end|>"]]
    assert examples == loaded(tmp_path, tokenizer, *(row["messages"] for row in rows)).train


def test_a_template_that_requires_a_system_turn_is_stored_as_the_plain_prompt(tmp_path):
    tokenizer = small.chatml_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}" + small.CHATML
    )
    data = loaded(tmp_path, tokenizer, TURNS)
    assert data.templates.prompt == "{prompt}"
    assert learned(tokenizer, data.train[0]) == ["first<|im_end|>", "last one<|im_end|>"]
