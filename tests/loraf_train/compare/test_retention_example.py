"""The comparison of retention on `tiny`: its data, its files, and all methods for a few steps in both orders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from loraf_train.compare import results
from loraf_train.settings.comparison import METHODS
from loraf_train.settings.loading import load
from tests.loraf_train.command_line import run

EXAMPLE = Path(__file__).parents[3] / "examples" / "retention"
FILES = ("two", "four", "eight")


def make_data():
    spec = importlib.util.spec_from_file_location("retention_data", EXAMPLE / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retention")
    make_data().main(["--out", str(folder / "data")])
    for name in FILES:
        shutil.copy(EXAMPLE / f"{name}.yaml", folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_the_files_say_what_the_table_needs(folder, name):
    config = load(folder / f"{name}.yaml")
    assert set(config.compare.methods) == set(METHODS)
    names = [task.name for task in config.tasks]
    assert len(names) == {"two": 2, "four": 4, "eight": 8}[name] and names == list(make_data().TASKS)[: len(names)]
    orders = [config.compare.order(seed, names) for seed in config.compare.seeds]
    seeds = len(orders)
    assert seeds == {"two": 10, "four": 5, "eight": 3}[name]
    assert len(set(orders)) == (2 if name == "two" else seeds)
    for method in ("loraf", "loraf-paper", "random-mask"):
        assert sum(1 - task.sparsity for task in config.of_method(method).tasks) <= 1
    assert 100 not in config.compare.seeds  # rates were chosen with it


def test_no_prompt_of_a_task_occurs_twice(folder):
    module = make_data()
    for task in module.TASKS:
        records = {
            split: [json.loads(line) for line in (folder / "data" / f"{task}.{split}.jsonl").read_text().splitlines()]
            for split in module.compare.SPLITS
        }
        assert {split: len(part) for split, part in records.items()} == {"train": 4800, "dev": 200, "eval": 250}
        prompts = [record["prompt"] for part in records.values() for record in part]
        assert len(set(prompts)) == len(prompts)


def test_the_answers(folder):
    answers = {
        task: [json.loads(line) for line in (folder / "data" / f"{task}.eval.jsonl").read_text().splitlines()]
        for task in make_data().TASKS
    }

    for task, place, answer in (
        ("outer", 3, lambda w: f"{w[0]} and {w[-1]}"),
        ("article", 2, lambda w: ("an " if w[0] in "aeiou" else "a ") + w),
        ("stretch", 1, lambda w: w + w[-1] + w[-1]),
        ("plural", 3, lambda w: {"y": w[:-1] + "ies"}.get(w[-1], w + ("es" if w[-1] in "sxz" else "s"))),
        ("shout", 1, lambda w: w.upper() + "!"),
    ):
        assert all(record["completion"] == answer(record["prompt"].split()[place]) for record in answers[task])
    for record in answers["initials"]:
        first, second = record["prompt"].removeprefix("Initials: ").split(", ")
        assert record["completion"] == f"{first[0].upper()}.{second[0].upper()}."


@pytest.mark.slow
def test_all_methods_for_a_few_steps_in_both_orders(folder, capsys):
    (folder / "data" / "general.jsonl").write_text('{"prompt": "Copy: ab\\n", "completion": "ab"}\n')
    options = ["--protocol", "sequence", "--methods", ",".join(METHODS), "--seeds", "0,1", "--eval-limit", "4"]
    options += [f"--set={key}" for key in ("training.max_steps=2", "training.batch_size=4", "calibration.steps=1")]
    options += [f"--set=tasks.{task}.data.limit=100" for task in ("pig-latin", "count")]
    status, out, err = run(capsys, "compare", str(folder / "two.yaml"), *options, "--out", str(folder / "out"))
    assert status == 0, err
    measured = results.read(folder / "out" / "results.json")
    assert measured.methods == METHODS and len(measured.runs) == 2 * len(METHODS)
    assert {run.seed: run.order for run in measured.runs} == {0: ("pig-latin", "count"), 1: ("count", "pig-latin")}
    assert set(measured.numbers) == set(METHODS)
    assert all(len(numbers["average"]["values"]) == 2 for numbers in measured.numbers.values())
    for measured_run in measured.runs:
        changes = [(change.task, change.after) for change in measured_run.changes]
        assert changes == ([measured_run.order] if measured_run.method == "loraf" else [])
    report = (folder / "out" / "report.md").read_text()
    assert "## What the first task keeps, and the later ones" in report and "## Beside LoRA" in report
    assert (folder / "out" / "kept.svg").exists()

    status, out, err = run(capsys, "compare", str(folder / "two.yaml"), *options, "--out", str(folder / "out"))
    assert status == 0 and out.count("measured before") == 1 + 2 * len(METHODS) and "training step" not in out
