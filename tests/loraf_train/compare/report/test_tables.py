"""Tables hold the measured numbers, name seeds and examples, and mark the best of a column."""

from __future__ import annotations

import dataclasses
import io
import math
import re

import pytest
from rich.console import Console

from loraf_train.compare.report import tables
from loraf_train.compare.results import BASE, SO_FAR, Results, Run, RunScore, ScoredTask
from loraf_train.compare.statistics import JUST_TRAINED, Statistics
from loraf_train.terminal.tables import PLAIN_WIDTH
from tests.loraf_train import compared


def read(text: str, title: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the Markdown table under the heading that begins with `title`."""
    part = text.split(f"\n## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    columns, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rule) == {"---"} and all(len(row) == len(columns) for row in rows)
    return columns, rows


def titles(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", cell)]


def plain(cell: str) -> str:
    return cell.strip("*")


def single_task_results(values: dict[str, list[float]], task: ScoredTask) -> Results:
    """Results of protocol single with one task. `values`: method → score of each seed."""
    runs = [
        Run(method, seed, False, (RunScore(task.name, SO_FAR, task.name, task.name, value, 10),), ())
        for method, scores in values.items()
        for seed, value in enumerate(scores)
    ]
    return Results("single", "tiny", 1000, (task,), tuple(runs))


# --- single -----------------------------------------------------------------------------------------------------


def test_table_1_holds_every_score_with_its_interval():
    results = compared.single(3)
    statistics = Statistics(results)
    columns, rows = read(tables.markdown(results), "Table 1")
    assert columns == [
        "method",
        "seeds",
        "trainable parameters",
        "share of the model's",
        "maths: gsm8k (gsm8k, 200 examples)",
        "nlu: boolq (choice, 100 examples)",
        "nlu: arc_easy (choice, 80 examples)",
        "code (exact_match, 50 examples)",
        "mean of the 4 sets (430 examples)",
    ]
    assert [row[0] for row in rows] == ["base model", *compared.METHODS]
    assert [row[1:4] for row in rows] == [
        ["–", "–", "–"],
        ["3", "7,000", "0.7 %"],
        ["3", "90,000", "9 %"],
        ["3", "1,000,000", "100 %"],
    ]
    places = [(task, name) for task in compared.TASKS for name in task.evaluations]
    for method, row in zip((None, *compared.METHODS), rows, strict=True):
        estimates = [statistics.of_set(method, task, name, task.name if method else BASE) for task, name in places]
        for estimate, cell in zip([*estimates, statistics.overall(method)], row[4:], strict=True):
            expected = [estimate.mean, *(estimate.interval or ())]
            assert numbers(cell) == pytest.approx(expected, abs=5.01e-4)


@pytest.mark.parametrize("seeds", [1, 3])
def test_only_the_best_of_each_column_is_bold(seeds):
    columns, rows = read(tables.markdown(compared.single(seeds)), "Table 1")
    for place in range(4, len(columns)):
        means = [numbers(row[place])[0] for row in rows]
        for row, mean in zip(rows, means, strict=True):
            assert row[place].startswith("**") == row[place].endswith("**") == (mean == max(means))
    assert not any(cell.startswith("**") for row in rows for cell in row[:4])


def test_ties_to_the_digits_shown_are_all_bold():
    task = ScoredTask("a", "exact_match", True, {"a": 10})
    _, rows = read(tables.markdown(single_task_results({"x": [0.8002], "y": [0.7999], "z": [0.798]}, task)), "Table 1")
    cells = [row[4] for row in rows]
    assert [cell.startswith("**0.800") for cell in cells] == [False, True, True, False]


def test_the_lowest_loss_is_best_and_a_diverged_one_never_is():
    task = ScoredTask("a", "loss", False, {"a": 10})
    text = tables.markdown(single_task_results({"x": [1.5, 1.7], "y": [2.0, 2.1], "z": [math.nan, 0.1]}, task))
    _, rows = read(text, "Table 1")
    cells = {row[0]: row[4] for row in rows}
    assert cells["x"].startswith("**1.6000 [") and not cells["y"].startswith("**") and cells["z"] == "nan"


def test_a_single_method_is_not_marked_as_best():
    task = ScoredTask("a", "exact_match", True, {"a": 10})
    text = tables.markdown(single_task_results({"x": [0.8]}, task))
    assert "**" not in text


def test_a_cell_names_its_seeds_and_examples_if_some_are_missing():
    results = compared.single(3, ("loraf",))
    *runs, last = results.runs
    scores = tuple(
        dataclasses.replace(s, count=20) if s.evaluation == "boolq" else s for s in last.scores if s.after != "code"
    )
    text = tables.markdown(dataclasses.replace(results, runs=(*runs, dataclasses.replace(last, scores=scores))))
    _, (_, row) = read(text, "Table 1")
    assert plain(row[7]).endswith("(2 seeds)") and plain(row[8]).endswith("(2 seeds)")
    assert plain(row[5]).endswith("(20 examples)")  # the smallest number


def test_losses_and_shares_have_no_mean():
    loss = ScoredTask("text", "loss", False, {"text": 5})
    text = tables.markdown(compared.single(2, tasks=(*compared.TASKS, loss)))
    columns, _ = read(text, "Table 1")
    assert not any("mean" in column for column in columns)
    assert "- no mean over the sets: shares and losses cannot be averaged" in text


@pytest.mark.parametrize(
    ("model", "name"), [("/home/me/models/small/", "small"), ("./small", "small"), ("org/small", "org/small")]
)
def test_the_path_of_a_local_model_is_not_shown(model, name):
    text = tables.markdown(dataclasses.replace(compared.single(1), model=model))
    assert (
        text.startswith(f"# Comparison on {name}\n") and f"## Table 1: each task trained alone, from {name}\n" in text
    )
    assert "/home" not in text


# --- sequence ---------------------------------------------------------------------------------------------------


def test_a_sequence_has_all_its_tables_in_order():
    headings = titles(tables.markdown(compared.sequence(2)))
    beginnings = ["What the first task keeps", "R of loraf", "R of lora", "R of full", "As-trained scores"]
    beginnings += ["The sequence in four numbers", "Drift of the base", "Cost of training", "Settings"]
    assert len(headings) == len(beginnings)
    assert all(title.startswith(beginning) for title, beginning in zip(headings, beginnings, strict=True))


def test_what_each_task_keeps():
    results = compared.sequence(3)
    statistics = Statistics(results)
    columns, rows = read(tables.markdown(results), "What the first task keeps (maths)")
    assert columns == [
        "task", "method", "seeds", "just trained", "at the end (maths+nlu+code on)", "change", "share kept",
    ]  # fmt: skip
    assert [row[0] for row in rows[::3]] == [
        "maths (gsm8k, 200 examples)",
        "nlu (choice, 180 examples)",
        "code (exact_match, 50 examples)",
    ]
    for row, (task, method) in zip(rows, [(t, m) for t in compared.TASKS for m in results.methods], strict=True):
        assert row[1:3] == [method, "3"]
        assert numbers(row[3])[0] == pytest.approx(statistics.of_task(method, task, task.name).mean, abs=5.01e-4)
        if task.name == "code":
            assert row[4:] == ["–", "–", "–"]
            continue
        assert numbers(row[4])[0] == pytest.approx(statistics.of_task(method, task, "code").mean, abs=5.01e-4)
        assert numbers(row[5])[0] == pytest.approx(statistics.change(method, task).mean, abs=5.01e-4)
        assert numbers(row[6])[0] == pytest.approx(100 * statistics.retained(method, task).mean, abs=0.0501)
        assert all(cell.startswith("**") == (method == "loraf") for cell in row[4:])  # by construction it keeps most


def test_r_has_a_row_for_the_base_and_for_each_task_with_its_set():
    results = compared.sequence(3)
    statistics, text = Statistics(results), tables.markdown(results)
    for method in results.methods:
        columns, rows = read(text, f"R of {method}:")
        assert columns[1:] == [
            "task set", "maths (gsm8k, 200 examples)", "nlu (choice, 180 examples)", "code (exact_match, 50 examples)",
        ]  # fmt: skip
        assert [row[:2] for row in rows] == [
            ["base model", "base"],
            ["after maths", "maths"],
            ["after nlu", "maths+nlu"],
            ["after code", "maths+nlu+code"],
        ]
        for row, after in zip(rows, ("", "maths", "nlu", "code"), strict=True):
            for cell, task in zip(row[2:], compared.TASKS, strict=True):
                estimate = statistics.of_task(method, task, after)
                assert numbers(cell) == pytest.approx([estimate.mean, *(estimate.interval or ())], abs=5.01e-4)


def test_as_trained_scores_have_their_own_table_that_names_kept_copies():
    results = compared.sequence(3)
    statistics, text = Statistics(results), tables.markdown(results)
    _, rows = read(text, "As-trained scores")
    assert [row[:3] for row in rows] == [
        ["loraf", "3", "none"],
        ["lora", "3", "one per task"],
        ["full", "3", "one per task"],
    ]
    for row in rows:
        for cell, task in zip(row[3:], compared.TASKS, strict=True):
            assert numbers(cell)[0] == pytest.approx(statistics.of_task(row[0], task, JUST_TRAINED).mean, abs=5.01e-4)
    assert "- lora, full: only with a copy of the trained parameters, kept after every task" in text
    assert "- loraf: from the single checkpoint at the end, without copies" in text


def test_without_as_trained_scores_there_is_no_such_table():
    results = compared.sequence(1)
    runs = [
        dataclasses.replace(run, scores=tuple(s for s in run.scores if s.acting == SO_FAR), drift=())
        for run in results.runs
    ]
    headings = titles(tables.markdown(dataclasses.replace(results, runs=tuple(runs))))
    assert not any(title.startswith(("As-trained", "Drift")) for title in headings) and len(headings) == 7


def test_the_four_numbers_with_their_divisor():
    results = compared.sequence(3)
    statistics, text = Statistics(results), tables.markdown(results)
    columns, rows = read(text, "The sequence in four numbers")
    assert columns[3:] == ["average accuracy", "backward transfer", "forgetting", "forward transfer"]
    for row in rows:
        assert row[1:3] == ["3", "430"]
        for cell, estimate in zip(row[3:], statistics.continual(row[0]).values(), strict=True):
            assert numbers(cell) == pytest.approx([estimate.mean, *estimate.interval], abs=5.01e-4)
    forgetting = [numbers(row[5])[0] for row in rows]
    assert [row[5].startswith("**") for row in rows] == [number == min(forgetting) for number in forgetting]
    assert "divided by T − 1 = 2" in text


def test_the_four_numbers_of_losses_say_that_signs_are_reversed():
    tasks = tuple(dataclasses.replace(task, metric="loss", higher_is_better=False) for task in compared.TASKS)
    text = tables.markdown(compared.sequence(2, tasks=tasks))
    columns, rows = read(text, "The sequence in four numbers")
    assert columns[3] == "average loss" and "(signs reversed: a lower loss is better)" in text
    assert all(plain(row[5]).startswith("+") for row in rows)  # what was forgotten is positive
    mixed = tables.markdown(compared.sequence(2, tasks=(compared.TASKS[0], tasks[1])))
    assert "- not computed: shares and losses cannot be averaged" in mixed


def test_drift_and_cost():
    text = tables.markdown(compared.sequence(2))
    columns, rows = read(text, "Drift of the base")
    assert columns[2:] == ["base model", "maths on", "maths+nlu on", "maths+nlu+code on"]
    assert all(row[2] == "2.5000" and row[5].strip("*").startswith("+") for row in rows)
    assert rows[0][5].startswith("**") and "- 1,000 tokens;" in text
    _, rows = read(text, "Settings")
    assert rows[0] == ["loraf", "maths", "rank 8, targets q_proj v_proj, training.learning_rate 0.001"]
    _, rows = read(text, "Cost of training")
    assert rows[0] == [
        "loraf", "maths", "2", "7,000", "0.7 %", "120", "30.0 s [30.0 s, 30.0 s]", "2.035 MB", "28 kB",
    ]  # fmt: skip
    assert rows[3][1:6] == ["all tasks", "2", "–", "–", "360"] and rows[3][8] == "84 kB"


# --- the terminal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("results", [compared.single(3), compared.sequence(3), compared.single(1)])
def test_the_terminal_shows_the_same_cells_with_the_best_in_bold(results):
    out = io.StringIO()
    tables.show(results, Console(file=out, width=PLAIN_WIDTH, force_terminal=True, color_system="standard"))
    shown = out.getvalue()
    written = tables.markdown(results)
    bold = {re.sub(r"\s+", " ", text).strip() for text in re.findall(r"\x1b\[1m(.*?)\x1b\[0m", shown)}
    flat = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    for title in titles(written):
        _, rows = read(written, title)
        for cell in (cell for row in rows for cell in row):
            assert plain(cell) in flat
            assert not cell.startswith("**") or plain(cell) in bold
    assert len(bold & {plain(c) for t in titles(written) for r in read(written, t)[1] for c in r if "**" in c}) > 3


def test_a_narrow_terminal_loses_no_digit():
    results = compared.single(1)
    out = io.StringIO()
    tables.show(results, Console(file=out, width=80))
    folded = re.split("─+", out.getvalue().split("task set:")[0])[1]
    _, rows = read(tables.markdown(results), "Table 1")
    digits = re.findall(r"\d", "".join(cell for row in rows for cell in row))
    assert len(digits) > 100 and sorted(re.findall(r"\d", folded)) == sorted(digits)
