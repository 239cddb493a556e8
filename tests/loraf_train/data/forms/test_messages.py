"""Records of conversations: every way in which they are written, and what cannot be learned refused by its key."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from loraf.errors import ConfigError
from loraf_train.data import task_data
from loraf_train.data.examples import EvaluationExample
from loraf_train.data.forms.chat import ChatForm
from loraf_train.data.forms.form import RecordFault
from loraf_train.data.task_data import TaskData, load_task
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig, EvaluationSource, RecordSource
from tests.loraf_train import chat_templates as templates
from tests.loraf_train import small_tokenizers as small
from tests.loraf_train.data.forms.test_chat import learned
from tests.loraf_train.data.test_examples import write_jsonl

USER, ANSWER = {"role": "user", "content": "hi?"}, {"role": "assistant", "content": "yes"}
MORE, LAST = {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def loaded(folder: Path, tokenizer, *records: dict, **options) -> TaskData:
    path = write_jsonl(folder / "rows.jsonl", list(records))
    data = DataConfig(train=(RecordSource(file=path),), eval={"e": EvaluationSource(file=path)})
    return load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), tokenizer, 0, **options)


def all_learned(tokenizer, data: TaskData) -> list[list[str]]:
    return [learned(tokenizer, example) for example in data.train]


def test_messages_in_prompt_and_completion_are_a_conversation(tmp_path):
    """TRL's form: the same sequence as with `messages`, but an answer in the prompt is not learned."""
    tokenizer = small.chatml_tokenizer()
    split = loaded(tmp_path, tokenizer, {"prompt": [USER, ANSWER, MORE], "completion": [LAST]})
    whole = loaded(tmp_path, tokenizer, {"messages": [USER, ANSWER, MORE, LAST]})
    assert split.train[0].input_ids == whole.train[0].input_ids
    assert all_learned(tokenizer, split) == [["no<|im_end|>"]]
    assert all_learned(tokenizer, whole) == [["yes<|im_end|>", "no<|im_end|>"]]
    assert split.evaluation == whole.evaluation
    assert split.templates == whole.templates
    several = loaded(tmp_path, tokenizer, {"prompt": [USER], "completion": [ANSWER, MORE, LAST]})
    assert several.train == whole.train


def test_null_keys_that_parquet_adds_are_left_out(tmp_path):
    tokenizer = templates.tokenizer_of(templates.LLAMA3, tmp_path)
    rows = [{"messages": [USER, ANSWER]}, {"messages": [MORE, {"role": "assistant", "tool_calls": [CALL]}]}]
    expected = loaded(tmp_path, tokenizer, *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = DataConfig(train=(RecordSource(file=tmp_path / "rows.parquet"),))
    found = load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), tokenizer, 0)
    assert found.train == expected.train
    assert all_learned(tokenizer, found)[1] == ['{"name": "f", "parameters": {"a": 1}}<|eot_id|>']


def test_null_keys_within_calls_are_left_out_as_well(tmp_path):
    """Parquet gives the arguments of all calls the keys of all."""
    tokenizer = templates.tokenizer_of(templates.QWEN2, tmp_path)
    calls = [{"function": {"name": "f", "arguments": {key: 1}}} for key in "ab"]
    rows = [{"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = DataConfig(train=(RecordSource(file=tmp_path / "rows.parquet"),))
    found = load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), tokenizer, 0)
    assert found.train == loaded(tmp_path, tokenizer, *rows).train


REFUSED = {
    "thoughts": ([USER, {**ANSWER, "reasoning_content": "hm"}], {}, "reasoning_content in message 2"),
    "calls": ([USER, {"role": "assistant", "tool_calls": [CALL]}], {}, "tool_calls in message 2"),
    "calls as context": (
        [USER, {**ANSWER, "weight": 0, "tool_calls": [CALL]}, MORE, LAST],
        {},
        "tool_calls in message 2",
    ),
    "old calls": ([USER, {**ANSWER, "function_call": {"name": "f"}}], {}, "function_call in message 2"),
    "images": ([{**USER, "images": ["a.png"]}, ANSWER], {}, "images in message 1"),
    "image part": (
        [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, ANSWER],
        {},
        "no text content in message 1 but image_url",
    ),
    "number": ([{"role": "user", "content": 7}, ANSWER], {}, "no text content in message 1 but int"),
    "tools": ([USER, ANSWER], {"tools": [TOOL]}, "has tools, which the chat template does not write"),
    "tools as text": ([USER, ANSWER], {"tools": "none"}, "tools that are not JSON"),
    "weight": ([USER, {**ANSWER, "weight": 0.5}], {}, "weight 0.5 in message 2"),
    "template": (
        [USER, ANSWER],
        {"chat_template_kwargs": {"chat_template": "x"}},
        "chat_template in chat_template_kwargs",
    ),
    "calls as text": ([USER, {**ANSWER, "tool_calls": "f()"}], {}, "no list of calls in tool_calls of message 2"),
}


@pytest.mark.parametrize(("messages", "more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_template_does_not_write_is_refused_by_its_key(tmp_path, messages, more, message):
    tokenizer = templates.tokenizer_of(templates.GEMMA, tmp_path)
    with pytest.raises(RecordFault) as caught:
        ChatForm(tokenizer).texts({"messages": messages, **more})
    assert message in caught.value.message
    assert caught.value.remedy
    with pytest.raises(ConfigError):
        loaded(tmp_path, tokenizer, {"messages": messages, **more})


def test_a_key_that_the_template_refuses_is_named(tmp_path):
    tokenizer = templates.tokenizer_of(templates.LLAMA3, tmp_path)
    record = {"messages": [USER, {**ANSWER, "tool_calls": [CALL, CALL]}]}
    with pytest.raises(
        RecordFault, match="tool_calls in message 2 that the chat template refuses.*only single"
    ) as caught:
        ChatForm(tokenizer).texts(record)
    assert "role" not in caught.value.remedy


def test_the_message_of_a_completion_is_named_as_such(tmp_path):
    tokenizer = templates.tokenizer_of(templates.GEMMA, tmp_path)
    with pytest.raises(RecordFault, match="thinking in message 1 of completion"):
        ChatForm(tokenizer).texts({"prompt": [USER], "completion": [{**ANSWER, "thinking": "hm"}]})
    with pytest.raises(RecordFault, match="no list of messages in completion"):
        ChatForm(tokenizer).texts({"prompt": [USER], "completion": "yes"})
    with pytest.raises(RecordFault, match="no answer of the assistant .* in completion"):
        ChatForm(tokenizer).texts({"prompt": [USER, ANSWER], "completion": [MORE]})


def test_keys_about_a_message_and_one_part_of_text_change_nothing(tmp_path):
    form = ChatForm(templates.tokenizer_of(templates.GEMMA, tmp_path))
    about = {"id": 7, "name": "ann", "timestamp": None, "score": float("nan"), "tool_calls": [], "refusal": None}
    parts = {**USER, "content": [{"type": "text", "text": "hi?"}]}
    expected = form.texts({"messages": [USER, ANSWER]})
    assert form.texts({"messages": [USER | about, ANSWER | about], "tools": []}) == expected
    assert form.texts({"messages": [parts, ANSWER]}) == expected


def test_text_beside_a_call_that_the_template_leaves_out_is_a_warning(tmp_path):
    tokenizer = templates.tokenizer_of(templates.LLAMA3, tmp_path)
    data = loaded(tmp_path, tokenizer, {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]})
    assert all_learned(tokenizer, data) == [['{"name": "f", "parameters": {"a": 1}}<|eot_id|>']]
    assert "content in message 2" in data.warnings[0].message


@pytest.mark.parametrize("kind", ["QWEN3", "R1"])
def test_the_right_answer_is_what_a_client_sees(tmp_path, kind):
    """Without thoughts and the end of the turn; an answer of the model is compared in the same way."""
    tokenizer = templates.tokenizer_of(getattr(templates, kind), tmp_path)
    record = {"messages": [USER, {"role": "assistant", "content": "<think>\none or two\n</think>\n\nfour"}]}
    (question,) = loaded(tmp_path, tokenizer, record).evaluation["e"].examples
    assert question.expected == "four"
    assert question.graded_text("perhaps one\n</think>\n\nfour") == "four"
    assert question.graded_text("four") == ("" if kind == "R1" else "four")  # there the thoughts have not ended
    assert "thinks" not in repr(question)  # digests of earlier releases are of this text
    called = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    (question,) = loaded(tmp_path, tokenizer, called).evaluation["e"].examples
    assert '{"a": 1}' in question.expected


def test_a_prompt_that_is_no_conversation_is_graded_whole():
    assert EvaluationExample(None, "x").graded_text("<think>a</think>b") == "<think>a</think>b"


def test_a_template_sees_the_same_date_all_day_and_on_every_other_day(tmp_path, monkeypatch):
    tokenizer = templates.tokenizer_of(templates.LLAMA3, tmp_path)
    record = {"messages": [USER, ANSWER]}
    day = date(2024, 2, 29)

    class Later(date):
        @classmethod
        def today(cls):
            return cls(2031, 1, 1)

    data = loaded(tmp_path, tokenizer, record, today=day)
    assert data.date == "2024-02-29"
    assert "Today Date: 29 Feb 2024" in data.templates.prompt
    monkeypatch.setattr(task_data, "date", Later)
    assert loaded(tmp_path, tokenizer, record, today=day).train == data.train
    assert loaded(tmp_path, tokenizer, record).date == "2031-01-01"
    assert loaded(tmp_path, small.chatml_tokenizer(), record).date == ""  # this template names none
    tokenizer.chat_template = "{{ strftime_now('%H:%M:%S') }}" + tokenizer.chat_template
    assert loaded(tmp_path, tokenizer, record, today=day).templates.prompt.startswith("00:00:00")
