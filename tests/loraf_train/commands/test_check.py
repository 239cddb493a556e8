"""`loraf-train check`: each mistake is reported with file, field and remedy, alone and together with all others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.loraf_train.command_line import TASKS, digests, run
from tests.loraf_train.small_tokenizers import chatml_tokenizer
from tests.standins import make_model

HEAD = TASKS[: TASKS.index("tasks:")]
PLAIN = {"prompt": "ab=", "completion": "AB"}


def another_base(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    make_model("llama", folder / "base", seed=1)


def no_end(folder: Path) -> None:
    path = folder / "base/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))


def new_output(folder: Path) -> None:
    shutil.rmtree(folder / "ckpt")


def rows(folder: Path, name: str, *records: dict) -> None:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def task(name: str, **parts) -> str:
    return f"  - {json.dumps({'name': name, 'data': {'train': 'upper.jsonl'}} | parts)}\n"


def data(train: str, **parts) -> dict:
    return {"data": {"train": train, **parts}}


# kind → (function that prepares the folder, text of the tasks, patterns of the lines of the report).
# Paths are relative to the file; K of a task is 40 % of a matrix.
MISTAKES = {
    "missing columns": (
        lambda f: (new_output(f), rows(f, "bad.jsonl", PLAIN, {"prompt": "p"}, {"text": "x"})),
        task("a", **data("bad.jsonl", prompt="{prompt}", completion="{completion}")),
        [
            r"bad\.jsonl: record 2: has no field 'completion' \(it has: prompt\) → name only fields of the record",
            r"bad\.jsonl: record 3: has no field 'prompt', 'completion' \(it has: text\) → ",
        ],
    ),
    "no known columns": (
        lambda f: (new_output(f), rows(f, "bad.jsonl", {"text": "x"})),
        task("a", **data("bad.jsonl")),
        [r"bad\.jsonl: record 1: has none of the known forms \(it has: text\) → set templates over its fields in data"],
    ),
    "empty data": (
        lambda f: (new_output(f), rows(f, "empty.jsonl")),
        task("a", **data("empty.jsonl")),
        [r"empty\.jsonl: has no records → name a file with records"],
    ),
    "every prompt too long": (
        new_output,
        task("a", training={"max_length": 4}),
        [r"upper\.jsonl: training\.max_length: every prompt of task 'a' fills max_length 4: all 7 .* → .* at least 5"],
    ),
    "a template with an unknown field": (
        new_output,
        task("a", **data("upper.jsonl", prompt="{question}\n", completion="{completion}")),
        [r"upper\.jsonl: record 1: has no field 'question' \(it has: prompt, completion\) \(and 6 more .*→ name"],
    ),
    "a tokenizer without an end": (
        lambda f: (new_output(f), no_end(f)),
        task("a"),
        [r"base: eos_token: the tokenizer has no end-of-sequence token.* → set \"eos_token\" in .*tokenizer_config"],
    ),
    "two tasks of one name": (
        new_output,
        task("a") + task("a"),
        [r"tasks\.yaml: tasks\[1\]\.name: another task is named 'a' too → give each task its own name"],
    ),
    "not enough capacity": (
        new_output,
        task("a") + task("b") + task("c"),
        [r"tasks\.yaml: tasks\[2\]\.sparsity: task 'c' needs \d+ positions in .* → a sparsity of 0\.8 would fit"],
    ),
    "an output of another base": (
        another_base,
        task("upper", data={"train": "upper.jsonl", "eval": "upper.jsonl"}),
        [r"ckpt: base_model\.fingerprint: .* has other weights .* → set model to .*, or name another output folder"],
    ),
    "a tracker that is not installed": (
        new_output,
        task("a", training={"report_to": ["wandb"]}),
        [r"tasks\.yaml: training\.report_to: wandb needs the package 'wandb'.* → `pip install wandb`, or leave"],
    ),
}


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    """As if wandb were not installed."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))


def report(capsys, folder: Path, tasks: str) -> list[str]:
    """Runs `check` on a file with mistakes, and returns the lines of its report."""
    (folder / "tasks.yaml").write_text(HEAD + "tasks:\n" + tasks)
    before = digests(folder)
    status, out, err = run(capsys, "check", "tasks.yaml")
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert digests(folder) == before
    return err.strip().splitlines()


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_single_mistake_is_reported_with_file_field_and_remedy_and_nothing_else(copied, capsys, kind):
    prepare, tasks, patterns = MISTAKES[kind]
    prepare(copied)
    lines = report(capsys, copied, tasks)
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.search(pattern, line), (pattern, line)


def test_all_mistakes_of_a_file_are_in_one_report(copied, capsys):
    """The output folder holds two tasks that were trained for another base; 20 % of each matrix is free."""
    another_base(copied)
    no_end(copied)
    rows(copied, "bad.jsonl", {"prompt": "p"})
    rows(copied, "empty.jsonl")
    rows(copied, "long.jsonl", PLAIN, PLAIN | {"prompt": "ab" * 9}, PLAIN | {"completion": "AB" * 9}, PLAIN)
    tasks = TASKS[TASKS.index("tasks:\n") + len("tasks:\n") :] + "".join(
        [
            task("columns", **data("bad.jsonl", prompt="{prompt}", completion="{completion}"), sparsity=0.99),
            task("empty", **data("empty.jsonl"), sparsity=0.99),
            task("template", **data("upper.jsonl", prompt="{question}", completion="{completion}"), sparsity=0.99),
            task("long", **data("long.jsonl"), training={"max_length": 8}, sparsity=0.99),
            task("full", **data("upper.jsonl"), training={"max_length": 3}, sparsity=0.99),
            task("long", **data("upper.jsonl"), training={"report_to": "wandb"}, sparsity=0.99),
            task("large", sparsity=0.5),
            task("odd", training={"epoch": 1}, sparsity=0.99),
        ]
    )
    lines = report(capsys, copied, tasks)
    assert [line.partition(" ")[0] for line in lines[:1]] == ["loraf-train:"]
    patterns = [
        r"tasks\.yaml: tasks\[7\]\.name: another task is named 'long' too → give each task its own name",
        r"tasks\.yaml: tasks\[9\]\.training\.epoch: is not a known key → did you mean 'epochs'\?",
        r"base: eos_token: the tokenizer has no end-of-sequence token.* → set \"eos_token\"",
        r"bad\.jsonl: record 1: has no field 'completion' \(it has: prompt\) → name only fields",
        r"empty\.jsonl: has no records → name a file with records",
        r"upper\.jsonl: record 1: has no field 'question' \(it has: prompt, completion\) \(and 6 more .* → name only",
        r"upper\.jsonl: training\.max_length: every prompt of task 'full' fills max_length 3: all 7 examples .* → ",
        r"tasks\.yaml: training\.report_to: wandb needs the package 'wandb'.* → `pip install wandb`",
        r"ckpt: base_model\.fingerprint: .* has other weights .* → set model to .*, or name another output folder",
        r"tasks\.yaml: tasks\[8\]\.sparsity: task 'large' needs \d+ positions in .* → a sparsity of ",
        r"tasks\.yaml: tasks\[5\]\.training\.max_length: warning: max_length 8 cuts the end of 1 examples and drops 1 "
        r".* \(4 in all\); the first that it drops is record \d of .*long\.jsonl → set it to 22 to keep all",
    ]
    for pattern in patterns:
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, (pattern, lines)
    for line in lines:
        assert " → " in line
    # There are no other lines.
    known = [line for line in lines if any(re.search(pattern, line) for pattern in patterns)]
    assert known == lines


def test_check_and_run_count_the_examples_that_max_length_cuts(copied, capsys):
    rows(copied, "long.jsonl", PLAIN, PLAIN | {"prompt": "ab" * 9}, PLAIN | {"completion": "AB" * 9}, PLAIN)
    new_output(copied)
    (copied / "tasks.yaml").write_text(
        HEAD + "tasks:\n" + task("long", **data("long.jsonl"), training={"max_length": 8, "max_steps": 1})
    )
    for command in ("check", "run"):
        status, out, _ = run(capsys, command, "tasks.yaml")
        assert status == 0
        (line,) = (line for line in out.splitlines() if line.startswith("warning"))
        assert "tasks[0].training.max_length" in line
        assert "cuts the end of 1 examples and drops 1" in line and "(4 in all); the first that it drops is" in line
        assert re.search(r"record 2 of \S*long\.jsonl → set it to 23", line)
    new_output(copied)
    status, out, _ = run(capsys, "check", "tasks.yaml", "--set", "tasks.long.training.max_length=23")
    assert status == 0 and "warning" not in out


def test_an_evaluation_prompt_longer_than_the_context_is_reported(copied, capsys):
    rows(copied, "asked.jsonl", PLAIN | {"prompt": "x" * 2000})
    new_output(copied)
    (copied / "tasks.yaml").write_text(HEAD + "tasks:\n" + task("a", **data("upper.jsonl", eval="asked.jsonl")))
    status, out, _ = run(capsys, "check", "tasks.yaml")
    assert status == 0
    assert "eval.asked: the prompt of example 1 has 2001 tokens, but the model's context is 1024" in out


def test_check_shows_the_loss_mask_of_a_conversation_and_the_rows_of_packing(copied, capsys):
    new_output(copied)
    chatml_tokenizer().save_pretrained(copied / "base")
    turns = [("user", "hi"), ("assistant", "first"), ("user", "and?"), ("assistant", "last")]
    rows(copied, "chat.jsonl", *[{"messages": [{"role": r, "content": c} for r, c in turns]}] * 3)
    training = {"packing": True, "max_length": 140}
    (copied / "tasks.yaml").write_text(HEAD + "tasks:\n" + task("a", **data("chat.jsonl"), training=training))
    status, out, err = run(capsys, "check", "tasks.yaml")
    assert (status, err) == (0, "")
    assert "<|im_start|>assistant\n⟦first<|im_end|>⟧\n<|im_start|>user\nand?<|im_end|>\n" in out
    assert "<|im_start|>assistant\n⟦last<|im_end|>⟧" in out
    length = int(re.search(r"3 records, 3 examples of (\d+) to", out).group(1))
    assert 47 < length <= 70  # so that two fit into a row
    assert "packing: 3 examples would fill 2 rows of 140 tokens" in out
