"""An example of which only text without loss fits into max_length is dropped; the report names record and setting."""

from __future__ import annotations

import random
from pathlib import Path

import yaml

from loraf_train.data.cutting import cut, first_learned, nothing_kept
from loraf_train.data.examples import IGNORED, Example, RecordText
from loraf_train.settings.data import RecordSource
from tests.loraf_train.command_line import run
from tests.loraf_train.data.test_examples import write_jsonl

SOURCE = RecordSource(file=Path("rows.jsonl"))


def cut_one_by_one(*examples: Example, max_length: int):
    texts = [RecordText([], "", SOURCE, number, {}) for number in range(1, len(examples) + 1)]
    return cut([[example] for example in examples], texts, max_length)


def test_what_is_kept_has_something_to_learn():
    """The slow reference: labels of the cut example."""
    rng = random.Random(0)
    for _ in range(500):
        length = rng.randrange(1, 12)
        prompt = rng.randrange(0, length + 1)
        places = sorted(rng.sample(range(prompt, length + 1), 2 * rng.randrange(0, (length - prompt + 1) // 2 + 1)))
        silent = tuple(zip(places[::2], places[1::2], strict=True))
        example = Example(list(range(length)), prompt, silent)
        learned = [i for i, label in enumerate(example.labels()) if label != IGNORED]
        assert first_learned(example) == (learned[0] if learned else length)
        for max_length in range(1, length + 2):
            parts = cut_one_by_one(example, max_length=max_length)
            expected = Example(example.input_ids[:max_length], prompt, silent)
            has_labels = any(label != IGNORED for label in expected.labels())
            if has_labels:
                assert (parts.kept, parts.dropped) == ([expected], [])
                assert parts.shortened == int(length > max_length)
            elif max_length <= length:
                assert parts.kept == [] and len(parts.dropped) == 1


def test_check_reports_records_of_which_nothing_to_learn_is_left(tmp_path, monkeypatch, capsys):
    """The first answer is not learned, and the second does not fit."""
    monkeypatch.chdir(tmp_path)
    turns = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "user", "content": "a much longer question"},
        {"role": "assistant", "content": "A2"},
    ]
    write_jsonl(tmp_path / "long.jsonl", [{"messages": turns}])
    write_jsonl(tmp_path / "both.jsonl", [{"messages": turns}, {"messages": [turns[0], turns[3]]}])
    tasks = [{"name": name, "data": {"train": f"{name}.jsonl"}} for name in ("long", "both")]
    content = {"model": "tiny", "output": "ckpt", "training": {"max_length": 24}, "tasks": tasks}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
    status, _, err = run(capsys, "check", "tasks.yaml")
    assert status == 2
    assert "long.jsonl: training.max_length: every prompt of task 'long' fills max_length 24" in err
    assert "to learn of record 1" in err and "nan" not in err
    assert "tasks[1].training.max_length: warning: max_length 24 cuts the end of 0 examples and drops 1 of which" in err
    assert "the first that it drops is record 1 of" in err and "both.jsonl" in err


def test_text_between_the_prompt_and_the_first_token_to_learn_counts():
    example = Example(list(range(9)), 2, ((2, 7),))
    parts = cut_one_by_one(example, max_length=5)
    problem = nothing_kept(parts.dropped, "t", 5)
    assert "what comes before the first token to learn of task 't' fills max_length 5" in problem.message
    assert problem.remedy.startswith("set max_length to at least 8,") and "record 1" in problem.remedy
    assert (problem.field, problem.file) == ("training.max_length", str(SOURCE.file))
    assert cut_one_by_one(example, max_length=8).kept
