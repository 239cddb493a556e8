"""Sequences in different orders: numbers by place and by task, against values computed by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from loraf.errors import ConfigError
from loraf_train.compare.by_place import ByPlace
from loraf_train.compare.report import pictures, tables
from loraf_train.compare.report.numbers import numbers
from loraf_train.compare.results import (
    ALONE,
    BASE,
    PAIR,
    SO_FAR,
    Change,
    Cost,
    Drift,
    Results,
    Run,
    RunScore,
    ScoredTask,
    read,
    write,
)
from loraf_train.compare.statistics import AT_THE_END, Statistics
from tests.loraf_train import compared
from tests.loraf_train.compare.report.test_tables import read as read_table
from tests.loraf_train.compare.report.test_tables import titles

A, B = (ScoredTask(name, "exact_match", True, {name: 10}) for name in "ab")


def run_of(method: str, seed: int, order: str, r: list[list[float]], drift: tuple[float, ...] = ()) -> Run:
    """`r`: a row for the base and for each trained task; columns are the tasks in the order of training."""
    scores = [
        RunScore(after, SO_FAR, task, task, value, 10)
        for after, row in zip((BASE, *order), r, strict=True)
        for task, value in zip(order, row, strict=True)
        if not math.isnan(value)
    ]
    losses = tuple(Drift(after, loss, 50) for after, loss in zip((BASE, *order), drift, strict=False))
    costs = tuple(Cost(task, 5, 10, 1.0, None, 7) for task in order)
    return Run(method, seed, True, tuple(scores), costs, losses, order=tuple(order))


def results() -> Results:
    """Seed 0 trains a, then b; seed 1 the other way round."""
    none = math.nan
    runs = [
        run_of("m", 0, "ab", [[0.0, 0.1], [0.8, 0.2], [0.6, 0.7]], (2.0, 2.1, 2.5)),
        run_of("m", 1, "ba", [[0.1, 0.0], [1.0, 0.3], [0.5, 0.9]], (2.0, 2.3, 2.9)),
        run_of("separate", 0, "ab", [[0.0, 0.1], [1.0, none], [1.0, 0.8]]),
        run_of("separate", 1, "ba", [[0.1, 0.0], [1.0, none], [1.0, 0.9]]),
    ]
    return Results("sequence", "tiny", 100, (A, B), tuple(runs))


def test_numbers_by_place_by_hand():
    by_place = ByPlace(Statistics(results()))
    assert by_place.score("m", 1, 0).values == (0.0, 0.1)  # the base, on the task trained first
    assert by_place.score("m", 1, 1).values == (0.8, 1.0)
    assert by_place.score("m", 2, 1).values == (0.2, 0.3)
    assert by_place.score("m", 1, 2).values == (0.6, 0.5)
    assert by_place.change("m", 1).values == pytest.approx((-0.2, -0.5))
    assert by_place.retained("m", 1).values == pytest.approx((0.75, 0.5))
    assert by_place.retained("m", 2) is None  # it was trained last
    assert by_place.beside_alone("m", 1).values == pytest.approx((0.8 - 1.0, 1.0 - 1.0))
    assert by_place.beside_alone("m", 2).values == pytest.approx((0.7 - 0.8, 0.9 - 0.9))
    assert by_place.share_of_alone("m", 1).values == pytest.approx((0.6, 0.5))
    assert by_place.drift("m", 2).values == pytest.approx((0.5, 0.9))
    assert by_place.count == 10


def test_the_four_numbers_follow_the_order_of_each_run():
    continual = Statistics(results()).continual("m")
    assert continual["average"].values == pytest.approx(((0.6 + 0.7) / 2, (0.5 + 0.9) / 2))
    assert continual["backward_transfer"].values == pytest.approx((-0.2, -0.5))
    assert continual["forgetting"].values == pytest.approx((0.2, 0.5))
    assert continual["forward_transfer"].values == pytest.approx((0.1, 0.3))
    apart = Statistics(results()).continual("separate")
    assert apart["average"].values == pytest.approx((0.9, 0.95))
    assert apart["forgetting"].values == (0.0, 0.0) and apart["forward_transfer"] is None


def test_numbers_by_task_take_each_seeds_own_order():
    statistics = Statistics(results())
    assert statistics.varied and statistics.tasks == (A, B)
    assert statistics.of_task("m", A, "a").values == (0.8, 0.9)  # just trained
    assert statistics.of_task("m", A, AT_THE_END).values == (0.6, 0.9)
    assert statistics.change("m", A).values == pytest.approx((-0.2,))  # seed 1 trained it last
    assert statistics.retained("m", B).values == pytest.approx((0.5,))


def test_one_order_that_is_not_the_files_decides_the_tables():
    (_, second, *_) = results().runs
    turned = dataclasses.replace(results(), runs=(second,))
    assert Statistics(turned).tasks == (B, A) and not Statistics(turned).varied
    text = tables.markdown(turned)
    assert any(title.startswith("What the first task keeps (b)") for title in titles(text))
    _, rows = read_table(text, "R of m")
    assert [row[:2] for row in rows] == [["base model", "base"], ["after b", "b"], ["after a", "b+a"]]


def test_the_tables_of_different_orders():
    text = tables.markdown(results())
    assert "- orders of training: a → b (seeds 0); b → a (seeds 1)" in text
    _, rows = read_table(text, "What the first task keeps, and the later ones")
    assert [row[:2] for row in rows] == [["1st", "m"], ["1st", "separate"], ["2nd", "m"], ["2nd", "separate"]]
    assert [cell.strip("*").split(" [")[0] for cell in rows[0][3:]] == ["0.900", "0.550", "-0.350", "62.5 %"]
    columns, rows = read_table(text, "Beside LoRA trained on the task alone")
    assert columns[2:4] == ["1st task just trained", "2nd task just trained"]
    assert [cell.split(" [")[0] for cell in rows[0]] == ["m", "2", "-0.100", "-0.050", "55.0 %", "93.8 %"]
    _, rows = read_table(text, "R of m")
    assert [row[0] for row in rows] == ["base model", "after the 1st", "after the 2nd"]
    columns, rows = read_table(text, "Drift of the base")
    assert columns[3:] == ["1 task on", "2 tasks on"]
    assert [cell.strip("*").split(" [")[0] for cell in rows[0][3:]] == ["+0.2000", "+0.7000"]


def test_the_pictures_of_different_orders(tmp_path):
    names = {path.name for path in pictures.draw(results(), tmp_path)}
    assert names == {"kept.png", "kept.svg", "matrix.png", "matrix.svg"}
    assert "what the task trained first keeps" in (tmp_path / "kept.svg").read_text()
    assert "after the 2nd" in (tmp_path / "matrix.svg").read_text()


def test_the_numbers_are_stored_with_the_results(tmp_path):
    computed = numbers(results())
    assert computed["m"]["share_kept"][0]["values"] == pytest.approx([0.75, 0.5])
    assert computed["m"]["share_kept"][1] is None
    assert computed["m"]["forgetting"]["mean"] == pytest.approx(0.35)
    assert computed["m"]["drift"][1]["mean"] == pytest.approx(0.7)
    whole = dataclasses.replace(results(), numbers=computed)
    write(tmp_path / "results.json", whole)
    assert read(tmp_path / "results.json") == whole
    assert numbers(compared.single(1)) == {}


def test_tasks_alone_in_pairs_and_their_changes_have_tables():
    tasks = (A, B, ScoredTask("c", "exact_match", True, {"c": 10}))
    scores = [RunScore("c", ALONE, name, name, 0.5, 10) for name in "abc"]
    pairs = [(one, other) for one in "abc" for other in "abc" if one != other]
    scores += [RunScore("c", PAIR, one, one, 0.25, 10, None, other) for one, other in pairs]
    changes = (Change("a", "b", 0.1, 0.125), Change("a", "c", 0.2, 0.25), Change("b", "c", 0.05, 0.0625))
    run = Run("loraf", 0, False, tuple(scores), (), changes=changes)
    text = tables.markdown(Results("sequence", "tiny", 100, tasks, (run,)))
    columns, rows = read_table(text, "Each task with part of the tasks on, at the end: loraf")
    assert columns == ["task", "its own values alone", "with a", "with b", "with c", "all tasks"]
    assert rows[0][1:] == ["0.500", "–", "0.250", "0.250", "–"]
    _, rows = read_table(text, "Change of earlier tasks' logits")
    assert rows == [
        ["loraf", "a", "b", "1", "0.1000", "0.1250"],
        ["loraf", "a", "c", "1", "0.2000", "0.2500"],
        ["loraf", "b", "c", "1", "0.0500", "0.0625"],
    ]


def test_joint_has_one_cost_for_all_tasks():
    scores = tuple(RunScore("b", SO_FAR, name, name, 0.9, 10) for name in "ab")
    joint = Run("joint", 0, False, scores, (Cost("b", 5, 20, 3.0, None, 7),), order=("a", "b"))
    text = tables.markdown(dataclasses.replace(results(), runs=(*results().runs, joint)))
    _, rows = read_table(text, "Cost of training")
    (row,) = [row for row in rows if row[0] == "joint"]
    assert row[1] == "all tasks" and row[5:7] == ["20", "3.0 s"]
    assert Statistics(dataclasses.replace(results(), runs=(joint,))).continual("joint")["average"].mean == 0.9


@pytest.mark.parametrize(
    ("run", "field"),
    [
        (Run("m", 0, False, (), (), order=("a", "a")), "runs[0].order"),
        (Run("m", 0, False, (RunScore("b", PAIR, "a", "a", 0.5, 1, None, "x"),), ()), "runs[0].scores[0].partner"),
        (Run("m", 0, False, (RunScore("b", ALONE, "a", "a", 0.5, 1, None, "b"),), ()), "runs[0].scores[0].partner"),
        (Run("m", 0, False, (), (), changes=(Change("x", "b", 0.1, 0.1),)), "runs[0].changes[0].task"),
        (Run("m", 0, False, (), (), changes=(Change("a", "x", 0.1, 0.1),)), "runs[0].changes[0].after"),
        (Run("m", 0, False, (), (), changes=(Change("a", "b", 0.1, 0.1),) * 2), "runs[0].changes[1]"),
    ],
)
def test_an_order_a_pair_or_a_change_that_cannot_be_is_refused(tmp_path, run, field):
    write(tmp_path / "results.json", Results("sequence", "tiny", 100, (A, B), (run,)))
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "results.json")
    assert [problem.field for problem in caught.value.problems] == [field]
