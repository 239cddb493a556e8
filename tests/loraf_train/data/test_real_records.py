"""All real records, which lie next to this repository: they are read, formatted and packed without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loraf.base_model import resolve
from loraf_train.data.records import read
from loraf_train.data.task_data import load_all, load_task
from loraf_train.settings.config import RunConfig, TaskConfig
from loraf_train.settings.data import DataConfig, EvaluationSource, RecordSource
from loraf_train.settings.parts import TrainingConfig
from loraf_train.trainer.packing import PackingCollator
from tests.loraf_train.small_tokenizers import chatml_tokenizer, merging_tokenizer, sentencepiece_tokenizer
from tests.tools import needs

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=needs("real records"))
pytestmark = needs_data
COUNTS = {  # from the README of the records
    "gsm8k/train.jsonl": 7473,
    "gsm8k/test.jsonl": 1319,
    "nlu/boolq/train.json": 9427,
    "nlu/boolq/test.json": 3270,
    "nlu/arc_easy/train.json": 2251,
    "nlu/arc_easy/test.json": 2376,
    "nlu/arc_challenge/train.json": 1119,
    "nlu/arc_challenge/test.json": 1172,
    "nlu/openbookqa/train.json": 4957,
    "nlu/openbookqa/test.json": 500,
    "nlu/piqa/test.json": 1838,
    "nlu/social_i_qa/test.json": 1954,
}
CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "arc_easy": tuple(f"answer{i}" for i in range(1, 6)),
    "arc_challenge": tuple(f"answer{i}" for i in range(1, 6)),
    "openbookqa": tuple(f"answer{i}" for i in range(1, 5)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("tiny"))


@pytest.mark.parametrize("name", COUNTS)
def test_every_record_is_read(name):
    assert len(read(RecordSource(file=DATA / name))) == COUNTS[name]


def gsm8k(**training) -> TaskConfig:
    data = DataConfig(
        train=(RecordSource(file=DATA / "gsm8k/train.jsonl"),),
        eval={"gsm8k": EvaluationSource(file=DATA / "gsm8k/test.jsonl")},
        prompt="{question}\nThink step by step.\n",
        completion="{answer}",
    )
    settings = TrainingConfig(max_length=4096, **training)
    return TaskConfig(name="math", alpha=64, sparsity=0.9, metric="gsm8k", data=data, training=settings)


@pytest.fixture(scope="module")
def questions(tokenizer):
    """An eighth of the training records: the embedded model's tokenizer is slow on long texts."""
    task = gsm8k()
    data = task.data.model_copy(update={"limit": 960, "eval_limit": 64})
    return load_task(task.model_copy(update={"data": data}), tokenizer, 0)


def nlu(**data) -> TaskConfig:
    """The two shortest training files; their form is instruction, input, output."""
    sources = DataConfig(
        train=tuple(RecordSource(file=DATA / f"nlu/{name}/train.json") for name in ("arc_challenge", "openbookqa")),
        eval={n: EvaluationSource(file=DATA / f"nlu/{n}/test.json", choices=c) for n, c in CHOICES.items()},
        **data,
    )
    return TaskConfig(name="nlu", alpha=128, sparsity=0.9, metric="choice", data=sources)


@pytest.mark.parametrize("task", [gsm8k(), nlu()], ids=lambda task: task.name)
def test_every_record_has_its_texts_and_a_right_answer_that_the_metric_reads(task):
    """Without a tokenizer the records are checked only."""
    config = RunConfig(model="tiny", output=Path("unused"), tasks=(task,))
    assert load_all(config, None) == ({}, [])


def test_records_of_the_six_sets_as_tokens(tokenizer):
    data = load_task(nlu(limit=200, eval_limit=40), tokenizer, 0)
    assert data.records == len(data.train) + data.dropped == 200
    for name, evaluation in data.evaluation.items():
        assert len(evaluation.examples) == 40
        assert {example.expected for example in evaluation.examples} <= set(CHOICES[name])


def test_questions_of_gsm8k_as_tokens(questions):
    assert (len(questions.train), questions.cut, questions.dropped) == (960, 0, 0)
    numbers = [float(example.expected) for example in questions.evaluation["gsm8k"].examples]
    assert len(numbers) == 64


@pytest.mark.parametrize("make", [chatml_tokenizer, sentencepiece_tokenizer, merging_tokenizer])
def test_real_texts_survive_every_kind_of_tokenizer(make):
    tokenizer = make()
    task = gsm8k()
    task = task.model_copy(update={"data": task.data.model_copy(update={"limit": 300, "eval_limit": 1})})
    rows = {r["question"] + "\nThink step by step.\n" + r["answer"] for r in read(task.data.train[0])}
    for example in load_task(task, tokenizer, 0).train:
        text = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        assert text.removeprefix(" ") in rows  # SentencePiece adds a space before the whole text
        assert example.input_ids[-1] == tokenizer.eos_token_id


def test_packing_loses_no_token_of_real_steps(questions):
    examples = questions.train
    collate = PackingCollator(0, 2048)
    rows = 0
    for start in range(0, len(examples), 32):
        step = examples[start : start + 32]
        batch = collate(step)
        rows += len(batch["input_ids"])
        real = sum(len(e.input_ids) for e in step)
        learned = sum(label != -100 for e in step for label in e.labels())
        assert int((batch["labels"] != -100).sum()) == learned
        assert int((batch["position_ids"] == 0).sum()) >= len(step)
        assert real <= batch["input_ids"].numel() and batch["input_ids"].shape[1] <= 2048
    assert rows < len(examples) / 2
