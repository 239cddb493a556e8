"""Means, intervals and the numbers of continual learning agree with scipy, with slow sums, and with sums by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from loraf_train.compare.results import AS_TRAINED, BASE, SO_FAR, Cost, Drift, Results, Run, RunScore, ScoredTask
from loraf_train.compare.statistics import JUST_TRAINED, Statistics, over_seeds
from loraf_train.scoring import continual
from tests.loraf_train import compared

A, B, C = (ScoredTask(name, "exact_match", True, {name: 10}) for name in "abc")
shares = st.floats(0, 1)


def sequence(*matrices: list[list[float]], tasks: tuple[ScoredTask, ...] = (A, B, C)) -> Statistics:
    """One method `m` with a seed for each matrix; its first row is the base model."""
    names = [BASE, *(task.name for task in tasks)]
    runs = []
    for seed, matrix in enumerate(matrices):
        scores = [
            RunScore(names[i], SO_FAR, task.name, task.name, value, 10)
            for i, row in enumerate(matrix)
            for task, value in zip(tasks, row, strict=True)
            if task.evaluations
        ]
        runs.append(Run("m", seed, False, tuple(scores), ()))
    return Statistics(Results("sequence", "tiny", 100, tasks, tuple(runs)))


# --- intervals --------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_the_interval_over_seeds_is_that_of_the_t_test(values):
    estimate = over_seeds(values, 7)
    assert estimate.mean == pytest.approx(np.mean(values))
    assert (estimate.seeds, estimate.count, estimate.values) == (len(values), 7, tuple(values))
    low, high = estimate.interval
    if np.ptp(values) > 1e-6:  # scipy gives NaN where all are equal
        reference = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((reference.low, reference.high), rel=1e-6, abs=1e-9)
    assert low <= estimate.mean + 1e-9 and high >= estimate.mean - 1e-9


def test_the_interval_over_seeds_by_hand():
    """The mean of 1, 2, 3 is 2, their deviation 1; Student's t for two degrees of freedom is 4.302652730."""
    half = 4.302652730 / math.sqrt(3)
    assert over_seeds([1.0, 2.0, 3.0], 1).interval == pytest.approx((2 - half, 2 + half), abs=1e-8)
    assert over_seeds([1.0, 2.0, 3.0], 1, 0.0, 3.5).interval == (0.0, 3.5)
    assert over_seeds([0.5, None], 1).interval is None
    assert over_seeds([None, None], 1) is None
    diverged = over_seeds([0.5, math.nan], 1, 0.0, 1.0)
    assert math.isnan(diverged.mean) and diverged.interval is None


def test_with_a_single_seed_the_interval_is_wilsons():
    results = compared.single(1)
    statistics = Statistics(results)
    for task in compared.TASKS:
        for name, count in task.evaluations.items():
            estimate = statistics.of_set("loraf", task, name, task.name)
            reference = scipy.stats.binomtest(round(estimate.mean * count), count).proportion_ci(method="wilson")
            assert estimate.interval == pytest.approx((reference.low, reference.high))
            assert (estimate.seeds, estimate.count) == (1, count)
    assert statistics.of_task("loraf", compared.TASKS[1], "nlu").interval is None  # a mean of two sets has no count
    loss = dataclasses.replace(A, metric="loss", higher_is_better=False)
    assert sequence([[0.4], [0.3]], tasks=(loss,)).of_task("m", loss, "a").interval is None


def test_with_a_single_seed_grades_keep_the_interval_that_was_measured_with_them():
    results = compared.single(1)
    runs = [
        dataclasses.replace(r, scores=tuple(dataclasses.replace(s, interval=(0.125, 0.75)) for s in r.scores))
        for r in results.runs
    ]
    task = compared.TASKS[0]
    statistics = Statistics(dataclasses.replace(results, runs=tuple(runs)))
    assert statistics.of_set("loraf", task, next(iter(task.evaluations)), task.name).interval == (0.125, 0.75)


# --- scores -----------------------------------------------------------------------------------------------------


def test_means_over_sets_and_seeds_agree_with_slow_sums():
    results = compared.single(3)
    statistics = Statistics(results)
    for method in results.methods:
        runs = [run for run in results.runs if run.method == method]
        by_seed = []
        for run in runs:
            after_own = [s for s in run.scores if s.after == s.task]
            by_seed.append(sum(s.score for s in after_own) / 4)
        overall = statistics.overall(method)
        assert overall.values == pytest.approx(by_seed) and overall.count == 200 + 100 + 80 + 50
        nlu = statistics.of_task(method, compared.TASKS[1], "nlu")
        values = [[s.score for s in run.scores if s.after == "nlu" and s.task == "nlu"] for run in runs]
        assert nlu.values == pytest.approx([sum(pair) / 2 for pair in values]) and nlu.count == 180


def test_the_base_model_counts_once_and_is_taken_from_any_run():
    results = compared.sequence(3)
    bare = Statistics(results).of_set(None, compared.TASKS[0], "gsm8k")
    assert (bare.mean, bare.seeds) == (0.1, 1)
    assert bare.interval == Statistics(results).of_set("lora", compared.TASKS[0], "gsm8k").interval
    first, *rest = results.runs
    without = [
        dataclasses.replace(r, scores=tuple(s for s in r.scores if s.after != BASE), drift=r.drift[1:]) for r in rest
    ]
    sparse = Statistics(dataclasses.replace(results, runs=(first, *without)))
    for method in results.methods:
        assert sparse.continual(method) == Statistics(results).continual(method)
        assert sparse.drift(method, "code") == Statistics(results).drift(method, "code")


def test_a_base_model_that_differs_by_seed_is_averaged():
    statistics = sequence([[0.1], [0.5]], [[0.3], [0.5]], tasks=(A,))
    assert statistics.of_task(None, A).values == (0.1, 0.3)


def test_shares_and_losses_are_not_averaged():
    loss = ScoredTask("text", "loss", False, {"text": 5})
    statistics = Statistics(compared.single(2, tasks=(A, loss)))
    assert statistics.mixed and statistics.overall("loraf") is None
    assert statistics.of_set("loraf", loss, "text", "text").mean > 1
    mixed = Statistics(compared.sequence(2, tasks=(A, loss)))
    assert set(mixed.continual("loraf").values()) == {None}


def test_a_seed_without_a_score_does_not_count():
    statistics = sequence([[0.1, 0.1], [0.5, 0.2], [0.4, 0.6]], [[0.1, 0.1], [0.7, 0.2]], tasks=(A, B))
    assert statistics.of_task("m", A, "a").values == (0.5, 0.7)
    assert statistics.of_task("m", A, "b").values == (0.4,)
    assert statistics.continual("m")["average"].values == (0.5,)
    assert statistics.of_task("m", A, JUST_TRAINED) is None


def test_as_trained_scores_are_separate_from_those_with_all_tasks_so_far_on():
    results = compared.sequence(2)
    statistics, task = Statistics(results), compared.TASKS[0]
    values = [
        s.score
        for r in results.runs
        if r.method == "lora"
        for s in r.scores
        if s.acting == AS_TRAINED and s.task == "maths"
    ]
    assert statistics.of_task("lora", task, JUST_TRAINED).values == tuple(values)
    assert statistics.of_task("lora", task, "code").mean < 0.5 < statistics.of_task("lora", task, JUST_TRAINED).mean


# --- sequences --------------------------------------------------------------------------------------------------


def test_the_four_numbers_by_hand():
    r = [
        [0.1, 0.2, 0.0],
        [0.9, 0.3, 0.1],
        [1.0, 0.8, 0.2],  # the second task helps the first
        [0.6, 0.7, 0.5],
    ]
    numbers = sequence(r).continual("m")
    assert numbers["average"].mean == pytest.approx((0.6 + 0.7 + 0.5) / 3)
    assert numbers["backward_transfer"].mean == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert numbers["forgetting"].mean == pytest.approx(((1.0 - 0.6) + (0.8 - 0.7)) / 2)
    assert numbers["forward_transfer"].mean == pytest.approx(((0.3 - 0.2) + (0.2 - 0.0)) / 2)
    assert all(estimate.count == 30 and estimate.interval is None for estimate in numbers.values())
    assert sequence(r).retained("m", A).mean == pytest.approx(0.6 / 0.9)
    assert sequence(r).change("m", B).mean == pytest.approx(0.7 - 0.8)


@given(
    st.integers(2, 5).flatmap(
        lambda t: st.lists(st.lists(shares, min_size=t, max_size=t), min_size=t + 1, max_size=t + 1)
    )
)
def test_the_four_numbers_agree_with_numpy(rows):
    r, last = np.array(rows), len(rows) - 1
    diagonal = np.array([r[j, j - 1] for j in range(1, last + 1)])
    best = np.array([r[j:last, j - 1].max() for j in range(1, last)])
    before = np.array([r[j - 1, j - 1] - r[0, j - 1] for j in range(2, last + 1)])
    cells = {(i, j): rows[i][j - 1] for i in range(last + 1) for j in range(1, last + 1)}
    numbers = continual.numbers(cells, range(1, last + 1), last)
    assert numbers.average == pytest.approx(r[-1].mean())
    assert numbers.backward_transfer == pytest.approx((r[-1, :-1] - diagonal[:-1]).sum() / (last - 1), abs=1e-12)
    assert numbers.forgetting == pytest.approx((best - r[-1, :-1]).sum() / (last - 1), abs=1e-12)
    assert numbers.forward_transfer == pytest.approx(before.sum() / (last - 1), abs=1e-12)
    # The best earlier score is at least the first.
    assert numbers.forgetting >= -numbers.backward_transfer - 1e-12

    losses = {cell: 3 - value for cell, value in cells.items()}  # a loss that mirrors the shares
    turned = continual.numbers(losses, range(1, last + 1), last, higher_is_better=False)
    assert turned.average == pytest.approx(3 - numbers.average)
    for name in ("backward_transfer", "forgetting", "forward_transfer"):
        assert getattr(turned, name) == pytest.approx(getattr(numbers, name), abs=1e-12)


def test_a_missing_cell_affects_only_the_numbers_that_need_it():
    cells = {(i, j): 0.5 for i in range(4) for j in range(1, 4)}

    def lacking(*cell: tuple[int, int]) -> set[str]:
        numbers = continual.numbers({c: v for c, v in cells.items() if c not in cell}, (1, 2, 3), 3)
        return {name for name, value in dataclasses.asdict(numbers).items() if value is None}

    assert lacking() == set()
    assert lacking((0, 1)) == lacking((1, 3)) == set()  # no number looks there
    assert lacking((0, 2)) == {"forward_transfer"}
    assert lacking((2, 1)) == {"forgetting"}
    assert lacking((2, 2)) == {"forgetting", "backward_transfer"}
    assert lacking((3, 3)) == {"average"}
    assert set(dataclasses.asdict(continual.numbers({(0, 1): 1, (1, 1): 1}, (1,), 1)).values()) == {None}


def test_a_task_without_evaluation_sets_only_counts_in_the_order():
    silent = ScoredTask("b", "exact_match", True, {})
    r = [[0.1, 0, 0.0], [0.9, 0, 0.1], [0.8, 0, 0.3], [0.7, 0, 0.5]]
    numbers = sequence(r, tasks=(A, silent, C)).continual("m")
    assert numbers["average"].mean == pytest.approx((0.7 + 0.5) / 2)
    assert numbers["forgetting"].mean == pytest.approx(0.9 - 0.7)
    assert numbers["forward_transfer"].mean == pytest.approx(0.3 - 0.0)


def test_each_number_is_computed_for_every_seed_and_then_averaged():
    one = [[0.0, 0.0], [0.8, 0.1], [0.4, 0.9]]
    two = [[0.0, 0.0], [0.6, 0.3], [0.5, 0.7]]
    forgetting = sequence(one, two, tasks=(A, B)).continual("m")["forgetting"]
    assert forgetting.values == pytest.approx((0.4, 0.1)) and forgetting.mean == pytest.approx(0.25)
    reference = scipy.stats.ttest_1samp([0.4, 0.1], 0).confidence_interval(0.95)
    assert forgetting.interval == pytest.approx((reference.low, reference.high))


def test_a_score_of_zero_or_a_loss_has_no_retained_share():
    zero = [[0.0, 0.0], [0.0, 0.0], [0.2, 0.9]]
    some = [[0.0, 0.0], [0.5, 0.0], [0.2, 0.9]]
    assert sequence(zero, tasks=(A, B)).retained("m", A) is None
    assert sequence(zero, some, tasks=(A, B)).retained("m", A).values == pytest.approx((0.4,))
    losses = tuple(dataclasses.replace(task, metric="loss", higher_is_better=False) for task in (A, B))
    statistics = sequence([[3.0, 3.0], [1.0, 3.0], [2.0, 1.0]], tasks=losses)
    assert statistics.retained("m", losses[0]) is None
    assert statistics.change("m", losses[0]).mean == -1.0  # the loss rose by one
    assert statistics.continual("m")["forgetting"].mean == 1.0


# --- the base, and costs ------------------------------------------------------------------------------------------


def test_drift_is_the_difference_to_the_base_of_the_same_seed():
    runs = [
        Run("m", seed, False, (), (), (Drift(BASE, base, 50), Drift("a", base + rise, 50)))
        for seed, base, rise in ((0, 2.0, 0.5), (1, 3.0, 0.1))
    ]
    statistics = Statistics(Results("sequence", "tiny", 100, (A, B), tuple(runs)))
    assert statistics.drift("m", "a").values == pytest.approx((0.5, 0.1)) and statistics.drift("m", "a").count == 50
    assert statistics.base_loss().values == (2.0, 3.0)
    assert statistics.drift("m", "b") is None


def test_costs_are_summed_over_tasks_and_averaged_over_seeds():
    runs = [
        Run("m", seed, False, (), (Cost("a", 5, 10, 1.0 + seed, 100 + seed, 7), Cost("b", 6, 20, 2.0, peak, 8)))
        for seed, peak in ((0, 90), (1, 200))
    ]
    statistics = Statistics(Results("sequence", "tiny", 100, (A, B), tuple(runs)))
    all_tasks = statistics.spent("m")
    assert (all_tasks.trainable, all_tasks.steps, all_tasks.file_bytes) == ((5, 6), 30, 15)
    assert all_tasks.seconds.values == (3.0, 4.0) and all_tasks.peak_bytes == 200
    assert statistics.spent("m", "a").seconds.values == (1.0, 2.0) and statistics.spent("m", "a").peak_bytes == 101
    unknown = dataclasses.replace(runs[0], costs=(dataclasses.replace(runs[0].costs[0], peak_bytes=None),))
    partial = Statistics(dataclasses.replace(statistics.results, runs=(unknown,)))
    assert partial.spent("m", "a").peak_bytes is None and partial.spent("m") is None
