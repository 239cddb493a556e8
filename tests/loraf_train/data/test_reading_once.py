"""Each source of records is read once by a command, and by nothing before it, whatever the recipe decides from it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from loraf import base_model
from loraf_train.compare.general import general_text
from loraf_train.data import records
from loraf_train.settings.data import RecordSource
from loraf_train.settings.loading import load
from tests.loraf_train.command_line import run


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """Name of a file → how often it was read."""
    counts: Counter[str] = Counter()

    def counted(file: Path, faults):
        counts[file.name] += 1
        return read_lines(file, faults)

    read_lines = records._READERS[".jsonl"]
    monkeypatch.setitem(records._READERS, ".jsonl", counted)
    return counts


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A tasks.yaml with two tasks, whose training and evaluation records are in files of their own."""
    monkeypatch.chdir(tmp_path)
    maths = [{"question": f"{i}+1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(3)]
    truths = [{"instruction": f"is {i} even?", "answer": "true" if i % 2 == 0 else "false"} for i in range(3)]
    tasks = []
    for name, rows in (("maths", maths), ("truths", truths)):
        for part in ("first", "second", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}-{part}.jsonl").write_text(lines)
        data = {"train": [f"{name}-first.jsonl", f"{name}-second.jsonl"], "eval": f"{name}-test.jsonl"}
        tasks.append({"name": name, "data": data, "max_new_tokens": 1})
    content = {
        "model": "tiny",
        "output": "ckpt",
        "adapter": {"rank": 4, "sparsity": 0.5, "target_modules": ["q_proj"]},
        "calibration": {"steps": 1},
        "training": {"max_steps": 1, "batch_size": 2, "max_length": 256},
        "tasks": tasks,
    }
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "tasks.yaml"


ALL_ONCE = {f"{name}-{part}.jsonl": 1 for name in ("maths", "truths") for part in ("first", "second", "test")}


@pytest.mark.parametrize("recipe", ["lori", "paper"])
def test_loading_the_settings_reads_no_records(file, reads, recipe):
    overrides = [f"recipe={recipe}", *(["tasks.maths.data.prompt='{question}'"] if recipe == "paper" else [])]
    assert [task.metric for task in load(file, overrides).tasks] == [None, None]
    assert reads == {}


def test_check_reads_each_source_once(file, reads, capsys):
    status, out, err = run(capsys, "check", str(file), "--set", "recipe=lori")
    assert status == 0, err
    assert "3 examples, gsm8k" in out and "3 examples, choice, choices true, false" in out
    assert reads == ALL_ONCE


def test_run_reads_each_source_once_and_scores_by_the_metrics_of_the_records(file, reads, capsys):
    status, _, err = run(capsys, "run", str(file), "--set", "recipe=lori")
    assert status == 0, err
    assert reads == ALL_ONCE
    manifest = json.loads((file.parent / "ckpt" / "loraf.json").read_text())
    metrics = {task["name"]: {score["metric"] for score in task["scores"]} for task in manifest["tasks"]}
    assert metrics == {"maths": {"gsm8k"}, "truths": {"choice"}}


def test_mistakes_of_settings_and_records_are_reported_together(file, reads, capsys):
    """The file's own mistakes do not keep the records from being checked, still once each."""
    (file.parent / "maths-second.jsonl").write_text('{"question": "?", "answer": "none"}\n')
    status, _, err = run(capsys, "check", str(file), "--set", "recipe=lori", "--set", "seed=-1")
    assert status == 2
    assert "seed: -1 is out of range" in err
    assert "maths-second.jsonl: record 1: has no #### in its answer" in err
    assert reads == ALL_ONCE


def test_choices_missing_from_the_file_are_reported_with_mistakes_of_records(file, reads, capsys):
    (file.parent / "maths-first.jsonl").write_text("{\n")
    status, _, err = run(capsys, "check", str(file), "--set", "tasks.truths.metric=choice")
    assert status == 2
    assert "tasks[1].data.eval: the metric choice needs choices" in err
    assert "maths-first.jsonl: line 1: is not JSON" in err
    assert reads == ALL_ONCE


@pytest.mark.parametrize("record", [{"text": "some words"}, {"prompt": "a", "completion": "b"}], ids=["text", "pair"])
def test_general_text_of_a_comparison_is_read_once(tmp_path, reads, record):
    (tmp_path / "general.jsonl").write_text(json.dumps(record))
    tokenizer = AutoTokenizer.from_pretrained(base_model.resolve("tiny"))
    general_text(RecordSource(file=tmp_path / "general.jsonl"), tokenizer, 64)
    assert reads == {"general.jsonl": 1}
