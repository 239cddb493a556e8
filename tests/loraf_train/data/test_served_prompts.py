"""Training, evaluation and serving see the same prompt, token by token, for each form and kind of tokenizer.

The references are the server's own prompt reader, and transformers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loraf_serve.request.prompts import PromptReader
from loraf_serve.v1 import generation_pb2 as pb
from loraf_train.data.task_data import TaskData, load_task
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig, EvaluationSource, RecordSource
from tests.loraf_train.data.test_examples import write_jsonl
from tests.loraf_train.small_tokenizers import chatml_tokenizer, merging_tokenizer, sentencepiece_tokenizer
from tests.standins import byte_tokenizer

TOKENIZERS = {
    "bytes": byte_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "merging": merging_tokenizer,
    "chatml": chatml_tokenizer,
    "chatml-bos": lambda: chatml_tokenizer(bos="<s>"),
}
ANSWERS = ["blue", " four", "\n\nfour and two ", "Two\nlines"]
# form → (fields of a record besides its answer, name of the answer, templates of the task, prompt of a client)
FORMS = {
    "templates": ({"q": "the sky?"}, "a", {"prompt": "Q: {q}\nA:", "completion": "{a}"}, "the sky?"),
    "space at the border": ({"q": "the sky?"}, "a", {"prompt": "Q: {q}\nA: ", "completion": "{a}"}, "the sky?"),
    "prompt": ({"prompt": "Q: {literal} and two?\nA:"}, "completion", {}, "Q: {literal} and two?\nA:"),
    "instruction": ({"instruction": "Add.", "input": ""}, "output", {}, "Add."),
    "input": ({"instruction": "Add.", "input": "four and two"}, "output", {}, "Add.\n\nfour and two"),
    "messages": ({"messages": [{"role": "user", "content": "{hi} four"}]}, None, {}, "{hi} four"),
}


def record(form: str, answer: str) -> dict:
    fields, name, _, _ = FORMS[form]
    if name is None:
        return {"messages": [*fields["messages"], {"role": "assistant", "content": answer}]}
    return fields | {name: answer}


def loaded(folder: Path, form: str, tokenizer) -> TaskData:
    path = write_jsonl(folder / "rows.jsonl", [record(form, answer) for answer in ANSWERS])
    data = DataConfig(train=(RecordSource(file=path),), eval={"e": EvaluationSource(file=path)}, **FORMS[form][2])
    return load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), tokenizer, 0)


def served(tokenizer, templates, **fields) -> list[int]:
    return list(PromptReader(tokenizer, 4096).read(pb.GenerateRequest(**fields), templates))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_evaluation_and_serving_see_the_same_prompt(tmp_path, kind, form):
    tokenizer = TOKENIZERS[kind]()
    data = loaded(tmp_path, form, tokenizer)
    sent = FORMS[form][3]
    expected = served(tokenizer, data.templates, prompt=sent)
    if form == "messages":
        chat = FORMS[form][0]["messages"]
        assert expected == served(tokenizer, None, messages=pb.Messages(messages=[pb.Message(**m) for m in chat]))
        assert expected == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    else:
        text = data.templates.prompt.format(**dict.fromkeys(("q", "prompt", "instruction"), sent))
        assert expected == served(tokenizer, None, prompt=text) == tokenizer(text)["input_ids"]
    assert len(data.train) == len(ANSWERS)
    for example, question in zip(data.train, data.evaluation["e"].examples, strict=True):
        assert example.input_ids[: example.prompt_length] == question.prompt_ids == expected
    beginnings = expected.count(tokenizer.bos_token_id) if tokenizer.bos_token else 0
    assert beginnings == (1 if tokenizer.bos_token and not (kind == "chatml-bos" and form == "messages") else 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_completion_continues_the_prompt_and_ends(tmp_path, kind, form):
    tokenizer = TOKENIZERS[kind]()
    for example, answer in zip(loaded(tmp_path, form, tokenizer).train, ANSWERS, strict=True):
        *completion, end = example.input_ids[example.prompt_length :]
        assert end == tokenizer.eos_token_id and end not in completion
        # Decoded after its prompt, as servers decode it, nothing comes between: no space of SentencePiece.
        before = tokenizer.decode(example.input_ids[: example.prompt_length])
        assert tokenizer.decode([*example.input_ids[: example.prompt_length], *completion]) == before + answer
        labels = example.labels()
        assert labels[example.prompt_length :] == [*completion, end]
        assert set(labels[: example.prompt_length]) == {-100}


@pytest.mark.parametrize("kind", ["sentencepiece", "merging"])
def test_no_token_spans_prompt_and_completion(tmp_path, kind):
    """Tokenized as one text, the two would share a token, which no server could begin an answer with."""
    tokenizer = TOKENIZERS[kind]()
    example = loaded(tmp_path, "space at the border", tokenizer).train[0]
    in_one = tokenizer("Q: the sky?\nA: blue")["input_ids"]
    assert in_one != example.input_ids[:-1]
    assert in_one[: example.prompt_length] != example.input_ids[: example.prompt_length]
    assert tokenizer.decode(in_one) == tokenizer.decode(example.input_ids[:-1])


def test_tokens_equal_those_of_the_whole_text_if_nothing_merges(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    example = loaded(tmp_path, "templates", tokenizer).train[3]
    assert example.input_ids[:-1] == tokenizer("Q: the sky?\nA:Two\nlines")["input_ids"]
    alone = tokenizer("Two\nlines", add_special_tokens=False)["input_ids"]
    assert example.input_ids[example.prompt_length : -1] != alone  # which begins with a space


def test_a_prompt_of_several_fields_is_served_as_plain_text(tmp_path):
    tokenizer = byte_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "x", "hint": "y", "a": "z"}])
    data = DataConfig(train=(RecordSource(file=path),), prompt="{hint}: {q}\n", completion="{a}")
    (example,) = load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), tokenizer, 0).train
    assert served(tokenizer, None, prompt="y: x\n") == example.input_ids[: example.prompt_length]


@pytest.mark.parametrize("text", ["<s>p", "p"])
def test_a_bos_in_the_text_is_trained_and_served_once(tmp_path, text):
    tokenizer = byte_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": text, "completion": "c"}])
    data = DataConfig(train=(RecordSource(file=path),))
    (example,) = load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), tokenizer, 0).train
    assert served(tokenizer, None, prompt=text) == example.input_ids[:2] == [1, tokenizer("p")["input_ids"][1]]


def test_an_end_that_the_tokenizer_appends_is_removed_from_prompts(tmp_path):
    from tokenizers import processors

    ending = byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    data = DataConfig(train=(RecordSource(file=path),))
    (example,) = load_task(TaskConfig(name="t", alpha=1.0, sparsity=0.5, data=data), ending, 0).train
    assert ending.decode(example.input_ids) == "<s>pc</s>"
    assert served(ending, None, prompt="p") == example.input_ids[:2]


def test_the_stored_template_of_conversations_includes_the_special_tokens(tmp_path):
    data = loaded(tmp_path, "messages", chatml_tokenizer(bos="<s>"))
    assert data.templates.special_tokens is False
    assert data.templates.prompt == "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
