"""`recipe: lori`: its templates, metric and choices fill in what the file leaves out, and only that.

Real records are read from `../shared/data` next to the repository, or from the folder that LORAF_TEST_DATA names. If
they are missing, the tests that need them are skipped, and only the committed records are used.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from loraf.errors import ConfigError
from loraf_train.data.forms import lori
from loraf_train.data.forms.forms import INSTRUCTION_PROMPT
from loraf_train.data.task_data import load_all, load_task
from loraf_train.grading.builtin import is_right
from loraf_train.settings.loading import draft, load
from tests.loraf_train.command_line import run
from tests.standins import byte_tokenizer
from tests.tools import needs

ROOT = Path(__file__).parents[4]
FEW = ROOT / "tests" / "fixtures" / "records"
WHOLE = Path(os.environ.get("LORAF_TEST_DATA", ROOT.parent / "shared" / "data"))
ALL = [
    FEW,
    pytest.param(
        WHOLE,
        marks=pytest.mark.skipif(not (WHOLE / "gsm8k").is_dir(), reason=needs("real records")),
    ),
]
CHOICES = {"boolq": 2, "piqa": 2, "social_i_qa": 5, "arc_easy": 5, "arc_challenge": 5, "openbookqa": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(folder: Path, *tasks: dict, recipe: str = "lori") -> Path:
    content = {"model": "tiny", "output": "ckpt", "recipe": recipe, "tasks": list(tasks)}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    return folder / "tasks.yaml"


def maths(records: Path = FEW, **data) -> dict:
    source = {"train": str(records / "gsm8k/train.jsonl"), "eval": {"gsm8k": str(records / "gsm8k/test.jsonl")}}
    return {"name": "maths", "data": source | data}


def nlu(records: Path = FEW, **data) -> dict:
    tests = {name: records / "nlu" / name / "test.json" for name in CHOICES}
    trains = [file.with_name("train.json") for file in tests.values()]
    source = {
        "train": [str(file) for file in trains if file.is_file()],
        "eval": {name: str(file) for name, file in tests.items() if file.is_file()},
    }
    return {"name": "nlu", "data": source | data}


def texts(examples, tokenizer) -> list[tuple[str, str]]:
    """Decodes (prompt, completion), without the end of sequence."""
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    completions = [example.input_ids[example.prompt_length :] for example in examples]
    decoded = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, completions))
    return list(zip(*decoded, strict=True))


@pytest.mark.parametrize("records", ALL, ids=["few", "all"])
def test_gsm8k(tmp_path, tokenizer, records):
    (task,) = load(write(tmp_path, maths(records))).tasks
    data = load_task(
        task.model_copy(update={"training": task.training.model_copy(update={"max_length": 9999})}), tokenizer, 0
    )
    assert (data.metric, task.recipe) == ("gsm8k", "lori")
    raw = [json.loads(line) for line in (records / "gsm8k/train.jsonl").read_text().splitlines()]
    assert len(data.train) == len(raw)
    for record, (prompt, completion) in zip(raw, texts(data.train, tokenizer), strict=True):
        first, second, last = prompt.removeprefix(record["question"]).split("\n")
        assert prompt.startswith(record["question"]) and first == last == ""
        assert "step by step" in second and "final answer" in second
        worked, number = record["answer"].split("####")
        assert completion == f"{worked}The final answer is: {number.strip()}" and "####" not in completion
    rows = [json.loads(line) for line in (records / "gsm8k/test.jsonl").read_text().splitlines()]
    questions = data.evaluation["gsm8k"].examples
    assert len(questions) == len(rows)  # none is left out
    for record, question in zip(rows, questions, strict=True):
        number = record["answer"].split("####")[1].strip()
        assert float(question.expected) == float(number.replace(",", ""))
        assert is_right("gsm8k", f"1 + 1 = 2\nThe final answer is: {number}", question.expected)
    assert data.templates.prompt == lori.MATHS_PROMPT and data.templates.completion == "{answer}"


@pytest.mark.parametrize("records", ALL, ids=["few", "all"])
@pytest.mark.slow
def test_language_understanding(tmp_path, tokenizer, records):
    entry = nlu(records)
    (task,) = load(write(tmp_path, entry)).tasks
    data = load_task(
        task.model_copy(update={"training": task.training.model_copy(update={"max_length": 9999})}), tokenizer, 0
    )
    assert data.metric == "choice"
    raw = [record for file in entry["data"]["train"] for record in json.loads(Path(file).read_text())]
    assert len(data.train) == len(raw) > 10
    for record, (prompt, completion) in zip(raw, texts(data.train, tokenizer), strict=True):
        assert prompt == INSTRUCTION_PROMPT.format(instruction=record["instruction"])
        assert completion == f"the correct answer is {record['answer']}" == record["output"]
    assert set(data.evaluation) == {"boolq", "arc_easy", "arc_challenge", "openbookqa"} | (
        {"piqa", "social_i_qa"} if records == WHOLE else set()
    )
    pattern = re.compile("true|false|solution[12]|answer[1-5]")
    for name, evaluation in data.evaluation.items():
        rows = json.loads(Path(entry["data"]["eval"][name]).read_text())
        assert len(evaluation.examples) == len(rows) and len(evaluation.choices) == CHOICES[name]
        for record, question in zip(rows, evaluation.examples, strict=True):
            assert question.expected == record["answer"] == pattern.search(record["output"])[0]
            assert is_right("choice", f"{record['output']}. true or answer9", question.expected, evaluation.choices)
    assert data.templates.completion == "the correct answer is {answer}"


def test_templates_of_the_file_take_precedence(tmp_path, tokenizer):
    def templates(entry: dict):
        (task,) = load(write(tmp_path, entry)).tasks
        data = load_task(task, tokenizer, 0)
        return data.templates.prompt, data.templates.completion, texts(data.train, tokenizer)[0][1]

    prompt, completion, text = templates(maths(prompt="Q: {question}\nA: "))
    assert (prompt, completion) == ("Q: {question}\nA: ", "{answer}") and "The final answer is:" in text
    prompt, completion, text = templates(maths(completion=" {answer}"))
    assert (prompt, completion) == (lori.MATHS_PROMPT, " {answer}") and "####" in text
    prompt, completion, text = templates(maths(prompt="{question}", completion="{answer}"))
    assert prompt == "{question}" and "####" in text
    assert templates(nlu(prompt="{instruction}\n"))[:2] == ("{instruction}\n", "the correct answer is {answer}")
    assert templates(nlu(completion="{output}!"))[:2] == (INSTRUCTION_PROMPT, "{output}!")
    assert templates(nlu(prompt="{instruction}", completion="{output}"))[:2] == ("{instruction}", "{output}")


def test_metric_and_choices_of_the_file_take_precedence(tmp_path, tokenizer):
    entry = nlu()
    entry["data"]["eval"] = {"boolq": {"file": str(FEW / "nlu/boolq/test.json"), "choices": ["true", "false", "maybe"]}}
    (task,) = load(write(tmp_path, entry)).tasks
    assert load_task(task, tokenizer, 0).evaluation["boolq"].choices == ("true", "false", "maybe")
    (task,) = load(write(tmp_path, maths() | {"metric": "loss"})).tasks
    assert (task.metric, load_task(task, tokenizer, 0).metric) == ("loss", "loss")


def test_records_of_other_kinds_are_read_as_without_the_recipe(tmp_path, tokenizer):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "instructed.json").write_text('[{"instruction": "Add.", "input": "1 1", "output": "2"}]')
    tasks = [{"name": name.split(".")[0], "data": {"train": name}} for name in ("own.jsonl", "instructed.json")]
    for recipe in ("lori", "paper"):
        own, instructed = load(write(tmp_path, *tasks, recipe=recipe)).tasks
        data = [load_task(task, tokenizer, 0) for task in (own, instructed)]
        assert [d.metric for d in data] == ["exact_match", "exact_match"]
        assert texts(data[0].train, tokenizer) == [("a", "b")]
        (text,) = texts(data[1].train, tokenizer)
        assert text == (INSTRUCTION_PROMPT.format(instruction="Add.\n\n1 1"), "2")


def test_without_the_recipe_nothing_is_filled_in(tmp_path, tokenizer):
    (task,) = load(write(tmp_path, nlu(), recipe="paper")).tasks
    data = load_task(task, tokenizer, 0)
    assert (data.metric, task.recipe) == ("exact_match", "paper")
    assert data.templates.completion == "{output}"
    _, problems = draft(write(tmp_path, nlu() | {"metric": "choice"}, recipe="paper"))
    assert problems and all("needs choices" in problem.message for problem in problems)


def test_records_that_do_not_fit_the_recipe_are_named(tmp_path, tokenizer):
    records = [{"question": "1+1?", "answer": "2\n#### 2"}, {"question": "2+2?", "answer": "4"}]
    (tmp_path / "maths.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (task,) = load(write(tmp_path, {"name": "maths", "data": {"train": "maths.jsonl"}})).tasks
    with pytest.raises(ConfigError, match=r"maths.jsonl: record 2: has no #### in its answer → fix"):
        load_task(task, tokenizer, 0)
    choices = [{"instruction": "a?", "answer": True}, {"instruction": "b?", "answer": "answer1"}]
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    (task,) = load(write(tmp_path, {"name": "c", "data": {"train": "choices.json", "eval": "choices.json"}})).tasks
    with pytest.raises(ConfigError, match=r"choices.json: record 2: has no right answer"):
        load_task(task, tokenizer, 0)


def test_an_unreadable_source_is_reported_once(tmp_path, tokenizer):
    (tmp_path / "broken.jsonl").write_text("{\n")
    config, problems = draft(write(tmp_path, {"name": "a", "data": {"train": "broken.jsonl"}}))
    assert problems == []
    for tokenizer_or_none in (tokenizer, None):
        _, problems = load_all(config, tokenizer_or_none)
        (problem,) = problems
        assert problem.field == "line 1" and "is not JSON" in problem.message
    with pytest.raises(ConfigError, match="line 1: is not JSON"):
        load_task(config.tasks[0], tokenizer, 0)


def test_the_templates_are_stored_and_a_change_of_recipe_is_refused(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = maths() | {"training": {"max_steps": 1, "batch_size": 2}, "calibration": {"steps": 1}}
    entry["data"]["eval_limit"] = 1
    write(tmp_path, entry)
    settings = ("--set", f"model={trained[0] / 'base'}", "--set", "adapter.rank=8", "--no-eval")
    status, _, err = run(capsys, "run", "tasks.yaml", *settings)
    assert status == 0, err
    (task,) = json.loads((tmp_path / "ckpt" / "loraf.json").read_text())["tasks"]
    assert task["templates"]["prompt"] == lori.MATHS_PROMPT and task["training"]["settings"]["recipe"] == "lori"
    status, _, err = run(capsys, "run", "tasks.yaml", *settings)
    assert status == 0, err
    data = {"prompt": lori.MATHS_PROMPT}
    write(tmp_path, entry | {"data": entry["data"] | data, "metric": "gsm8k"}, recipe="paper")
    status, _, err = run(capsys, "run", "tasks.yaml", *settings)
    assert status == 2 and "recipe: task 'maths' was trained with 'lori', but the file says 'paper'" in err
