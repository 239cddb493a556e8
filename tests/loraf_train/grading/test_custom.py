"""A metric of the user's own: imported by its name, tried before training, and applied to every answer."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import GenerationConfig

from loraf.errors import ConfigError
from loraf.tasksets import TaskSet
from loraf_train.data.task_data import load_task
from loraf_train.grading.custom import MetricFault, find, graded, is_name
from loraf_train.scoring import evaluate
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig, RecordSource
from loraf_train.settings.loading import draft
from tests.loraf_train.command_line import run
from tests.standins import byte_tokenizer

LENGTHS = """
from collections.abc import Mapping

def grade(answer: str, record: Mapping) -> float:
    '''How near the answer's length is to what the record asks for.'''
    return max(0.0, 1 - abs(len(answer) - record["length"]) / 10)

class Grader:
    @staticmethod
    def grade(answer, record):
        return answer == record["prompt"]

text = "no function"
"""


def write(folder: Path, name: str = "grading.py", text: str = LENGTHS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


# --- finding it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grading.grade", "grading:grade"])
def test_a_function_in_a_file_next_to_the_tasks_yaml(tmp_path, name):
    assert find(name, write(tmp_path))("abc", {"length": 5}) == 0.8
    assert "grading" not in sys.modules and str(tmp_path) not in sys.path


@pytest.mark.parametrize("name", ["grading.Grader.grade", "grading:Grader.grade"])
def test_a_function_in_a_class(tmp_path, name):
    assert find(name, write(tmp_path))("abc", {"prompt": "abc"}) is True


@pytest.mark.parametrize("name", ["operator.eq", "operator:eq", "os.path.commonprefix.__call__"])
def test_a_function_of_any_importable_module(tmp_path, name):
    assert callable(find(name, tmp_path))


def test_a_file_takes_precedence_over_a_module_of_its_name_and_each_folder_has_its_own(tmp_path):
    one = write(tmp_path / "one", "json.py", "def grade(answer, record): return 1")
    two = write(tmp_path / "two", "json.py", "def grade(answer, record): return 0")
    assert [find("json.grade", folder)("", {}) for folder in (one, two, one)] == [1, 0, 1]
    assert sys.modules["json"] is json


def test_a_file_may_import_its_neighbours_and_is_run_once_until_it_changes(tmp_path):
    write(tmp_path, "neighbour_of_a_metric.py", "VALUE = 0.25")
    text = "from neighbour_of_a_metric import VALUE\nruns = []\ndef grade(answer, record): return VALUE"
    write(tmp_path, text=text)
    grade = find("grading.grade", tmp_path)
    assert grade("", {}) == 0.25 and find("grading.grade", tmp_path) is grade
    write(tmp_path, text="def grade(answer, record): return 0.5")
    assert find("grading.grade", tmp_path)("", {}) == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module.grade", "there is no module absent_module"),
        ("absent_module:grade", "there is no module absent_module"),
        ("json.absent.grade", "json.absent.grade does not exist"),
        ("grading.absent", "there is no absent in "),
        ("grading:Grader.absent", "there is no Grader.absent in "),
        ("grading.text", "grading.text is not a function but of type str"),
        ("one.grade", r"one.grade cannot be called with an answer and a record \(too many positional"),
        ("broken.grade", r"importing broken fails \(ZeroDivisionError: division by zero, broken.py line 2\)"),
        (
            "needy.grade",
            r"importing needy fails \(ModuleNotFoundError: No module named 'absent_module', needy.py line 1",
        ),
        ("ends.grade", r"importing ends fails \(SystemExit: 3, ends.py line 1\)"),
        ("wrong.grade", r"importing wrong fails \(AttributeError: module 'json' has no attribute 'absent', wrong.py"),
        ("typo.grade", r"importing typo fails \(SyntaxError"),
    ],
)
def test_an_unusable_function_is_reported_with_the_other_mistakes_of_the_file(tmp_path, name, message):
    write(tmp_path)
    write(tmp_path, "one.py", "def grade(answer): return 1")
    write(tmp_path, "broken.py", "x = 1\nx / 0")
    write(tmp_path, "needy.py", "import absent_module")
    write(tmp_path, "wrong.py", "import json\njson.absent")
    write(tmp_path, "ends.py", "raise SystemExit(3)")
    write(tmp_path, "typo.py", "def grade(:")
    write(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "b"}\n')
    content = {
        "model": "tiny",
        "output": "o",
        "seed": -1,
        "tasks": [{"name": "a", "metric": name, "data": {"train": "a.jsonl"}}],
    }
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
    _, problems = draft(tmp_path / "tasks.yaml")
    by_field = {problem.field: problem for problem in problems}
    assert set(by_field) == {"seed", "tasks[0].metric"}
    assert re.search(message, by_field["tasks[0].metric"].message)
    assert by_field["tasks[0].metric"].remedy


@pytest.mark.parametrize("name", ["gsm9k", "", ".grade", "a.", "a:b:c", "a b.c", "1.5", "a..b", "a:", "a/b.c"])
def test_texts_that_are_not_dotted_names(name):
    assert not is_name(name)


# --- what it returns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        (True, 1.0),
        (False, 0.0),
        (0.25, 0.25),
        (1, 1.0),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
    ],
)
def test_values_that_count_as_a_score(returned, score):
    value = graded(lambda answer, record: returned, "", {})
    assert type(value) is float and value == score


@pytest.mark.parametrize("returned", [None, "1", 1.5, -0.1, float("nan"), [1], 1j, torch.tensor([0.5, 0.5])])
def test_any_other_value_is_refused(returned):
    with pytest.raises(MetricFault):
        graded(lambda answer, record: returned, "", {})


def evaluation(folder: Path, grade, records: list[dict], name: str = "own.grade"):
    """Returns a task with one evaluation set, and its data."""
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = RecordSource(file=folder / "data.jsonl")
    data = DataConfig(train=(source,), eval={"e": {"file": source.file}})
    task = TaskConfig(name="t", alpha=1, sparsity=0.9, data=data, metric=name, grade=grade, max_new_tokens=3)
    return task, load_task(task, byte_tokenizer(), 0)


RECORDS = [{"prompt": f"{i}?", "completion": str(i), "length": i, "more": {"x": [i]}} for i in range(5)]


def test_every_answer_is_graded_with_its_own_record(tmp_path, monkeypatch):
    calls = []

    def grade(answer: str, record: Mapping) -> float:
        calls.append((answer, record["more"]["x"][0]))
        return record["length"] / 4

    task, data = evaluation(tmp_path, grade, RECORDS)
    assert calls == [("0", 0)]  # the first right answer, before anything is trained
    calls.clear()
    tokenizer = byte_tokenizer()
    answers = [tokenizer(f"answer {i}", add_special_tokens=False)["input_ids"] for i in range(5)]
    monkeypatch.setattr(evaluate, "generate_ids", lambda *arguments: answers)
    model = SimpleNamespace(generation_config=GenerationConfig())
    (score,) = evaluate.score(model, tokenizer, task, data, TaskSet())
    assert calls == [(f"answer {i}", i) for i in range(5)]
    assert score.score == sum(i / 4 for i in range(5)) / 5 and score.metric == "own.grade" and score.count == 5
    assert evaluate.higher_is_better(score.metric)


def test_a_function_that_fails_on_a_right_answer_fails_before_training(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.jsonl: record 1: the metric fails on this record \(KeyError: 'absent', test_custom"
    ):
        evaluation(tmp_path, lambda answer, record: record["absent"], RECORDS)
    with pytest.raises(
        ConfigError, match=r"record 1: the metric returns None for this record → return True, False or a"
    ):
        evaluation(tmp_path, lambda answer, record: None, RECORDS)


def test_records_on_which_a_metric_fails_are_named(tmp_path, monkeypatch):
    def grade(answer: str, record: Mapping) -> float:
        return record["length"] if answer != "bad" else 7 // (record["length"] - 3)

    task, data = evaluation(tmp_path, grade, RECORDS[:2] + RECORDS[3:4] + RECORDS[1:2])
    tokenizer = byte_tokenizer()
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ok", "ok", "bad", "bad")]
    monkeypatch.setattr(evaluate, "generate_ids", lambda *arguments: answers)
    model = SimpleNamespace(generation_config=GenerationConfig())
    with pytest.raises(ConfigError) as caught:
        evaluate.score(model, tokenizer, task, data, TaskSet())
    problems = caught.value.problems
    assert [(p.field, p.file) for p in problems] == [(f"record {n}", str(tmp_path / "data.jsonl")) for n in (3, 4)]
    assert "ZeroDivisionError" in problems[0].message and "returns -4" in problems[1].message


# --- commands ---------------------------------------------------------------------------------------------------


def test_a_metric_is_imported_to_score_a_checkpoint_but_not_to_read_it(copied, capsys):
    text = (copied / "tasks.yaml").read_text().replace("metric: choice", "metric: grading.grade")
    (copied / "tasks.yaml").write_text(text)
    write(copied, text="def grade(answer, record):\n    return record['q'] in ('x1?', 'y0?', 'y6?')")
    status, out, err = run(capsys, "eval", "tasks.yaml", "--tasks", "truth", "--json", "scores.json")
    assert status == 0, err
    scores = {
        s["evaluation"]: s for s in json.loads((copied / "scores.json").read_text())["scores"] if s["task"] == "truth"
    }
    assert set(scores) == {"one", "two", "mean"} and {s["metric"] for s in scores.values()} == {"grading.grade"}
    # eval_limit takes five of the nine records, by the seed.
    taken = sorted(random.Random(0).sample([(0, n) for n in range(9)], 5))
    right = sum(f"{'x' if n % 2 else 'y'}{n}?" in ("x1?", "y0?", "y6?") for _, n in taken)
    assert 0 < right < 5 and scores["one"]["score"] == right / 5

    status, out, err = run(capsys, "run", "tasks.yaml")
    assert status == 0 and "grading.grade" in (copied / "ckpt" / "loraf.json").read_text(), err
    (copied / "grading.py").write_text("raise RuntimeError('imported')")
    status, out, err = run(capsys, "inspect", "ckpt", "--verify")
    assert status == 0 and "grading.grade" in out, err
    status, out, err = run(capsys, "eval", "tasks.yaml", "--base")
    assert status == 2
    assert "tasks.yaml: tasks[1].metric: importing grading fails (RuntimeError: imported, grading.py line 1)" in err
