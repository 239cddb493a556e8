"""Selection of positions against brute force on tensors full of ties, and the check that every task has room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraf.checkpoint import Checkpoint
from loraf.manifest import BaseModel, positions_per_matrix
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.masks import PlannedTask, feasible, fitting_sparsity, shortage, top_k
from tests.standins import random_values

TIES = st.lists(st.integers(-3, 3), min_size=1, max_size=60)


@given(TIES, st.data())
def test_top_k_is_the_k_largest_with_ties_to_the_lower_index(values, data):
    k = data.draw(st.integers(0, len(values)))
    ranked = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    selected = top_k(torch.tensor(values, dtype=torch.float32) * 0.1, k)
    assert selected.tolist() == sorted(ranked[:k])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.data())
def test_top_k_of_any_floats(values, data):
    k = data.draw(st.integers(0, len(values)))
    ranked = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    assert top_k(torch.tensor(values), k).tolist() == sorted(ranked[:k])


def test_top_k_of_zeros_is_the_lowest_indices():
    assert top_k(torch.tensor([0.0, -0.0, 0.0, 0.0]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("values", "k"), [([1.0, float("nan")], 1), ([1.0, float("inf")], 1), ([1.0], 2), ([1.0], -1)])
def test_top_k_refuses_k_out_of_range_and_values_that_are_not_finite(values, k):
    with pytest.raises(ValueError):
        top_k(torch.tensor(values), k)


@given(st.integers(1, 7), st.integers(1, 5), st.data())
def test_feasible_positions_are_those_that_no_task_owns(d_out, rank, data):
    owners = data.draw(st.lists(st.integers(0, 3), min_size=d_out * rank, max_size=d_out * rank))  # 0: nobody
    taken = []
    for owner in (1, 2, 3):
        owned = torch.tensor([i for i, o in enumerate(owners) if o == owner], dtype=torch.int64)
        taken.append(SparseB.from_positions(owned, torch.ones(len(owned)), (d_out, rank)))
    assert feasible((d_out, rank), taken).tolist() == [i for i, o in enumerate(owners) if o == 0]


@given(st.lists(st.integers(-2, 2), min_size=30, max_size=30), st.data())
def test_tasks_selected_one_after_another_share_no_position(change, data):
    """Top K of the feasible positions, task after task, as in calibration; brute force keeps a set of owned ones."""
    taken: list[SparseB] = []
    owned: set[int] = set()
    for _ in range(3):
        k = data.draw(st.integers(1, 10))
        candidates = feasible((6, 5), taken)
        selected = candidates[top_k(torch.tensor(change, dtype=torch.float32)[candidates], k)]
        ranked = sorted((i for i in range(30) if i not in owned), key=lambda i: (-abs(change[i]), i))
        assert selected.tolist() == sorted(ranked[:k])
        owned |= set(selected.tolist())
        taken.append(SparseB.from_positions(selected, torch.zeros(k), (6, 5)))


SHAPES = {"a": (40, 16), "b": (24, 16)}
RANK = 10


def planned(*sparsities: float) -> list[PlannedTask]:
    return [PlannedTask(f"t{i}", s, f"tasks[{i}].sparsity", "tasks.yaml") for i, s in enumerate(sparsities)]


def test_ten_tasks_of_sparsity_0_9_fit_and_eleven_do_not():
    assert shortage(SHAPES, RANK, planned(*[0.9] * 10)) == []
    (problem,) = shortage(SHAPES, RANK, planned(*[0.9] * 11))
    assert problem.field == "tasks[10].sparsity" and problem.file == "tasks.yaml"
    assert "'t10' needs 40 positions in a (and 1 more module), but only 0 of 400 are left there" in problem.message
    assert "sparsity of" not in problem.remedy and "new checkpoint" in problem.remedy


def test_the_message_names_task_module_positions_left_and_a_sparsity_that_fits():
    (problem,) = shortage(SHAPES, RANK, planned(0.4, 0.5, 0.75))
    assert "'t1' needs 200 positions in a (and 1 more module), but only 160 of 400 are left there" in problem.message
    assert problem.remedy.startswith("a sparsity of 0.6 would fit")
    assert shortage(SHAPES, RANK, planned(0.4, 0.6)) == []


def test_after_a_task_that_does_not_fit_only_others_that_do_not_are_reported():
    problems = shortage(SHAPES, RANK, planned(0.4, 0.5, 0.75, 0.8))
    assert [p.field for p in problems] == ["tasks[1].sparsity", "tasks[3].sparsity"]


def test_a_task_without_a_single_position_is_refused():
    (problem,) = shortage(SHAPES, RANK, planned(0.996))
    assert "leaves no position in b" in problem.message
    assert problem.remedy == "use a sparsity of 0.995833 or less"  # b has 240 positions
    assert shortage(SHAPES, RANK, planned(0.995833)) == []
    assert shortage(SHAPES, RANK, planned(0.995834)) != []
    (problem,) = shortage({"a": (1, 4)}, 1, planned(0.5))
    assert problem.remedy == "use a larger rank"


def test_positions_of_tasks_in_the_checkpoint_count_as_taken(tmp_path):
    checkpoint = Checkpoint.create(tmp_path, BaseModel("m", "A", "f"), RANK, SHAPES, 0)
    for name, b in random_values(SHAPES, RANK, ["x", "y"], 0.6, seed=0).items():
        checkpoint.add_task(name, b, alpha=1.0, sparsity=0.6)
    assert shortage(SHAPES, RANK, planned(0.8), checkpoint.manifest) == []
    (problem,) = shortage(SHAPES, RANK, planned(0.79), checkpoint.manifest)
    assert "needs 84 positions in a (and 1 more module), but only 80 of 400 are left" in problem.message
    assert "0.8 would fit" in problem.remedy and "`loraf-train remove`" in problem.remedy


@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 12), st.data())
def test_the_proposed_sparsity_is_the_lowest_that_fits_in_hundredths(rows_a, rows_b, rank, data):
    shapes = {"a": (rows_a, 4), "b": (rows_b, 4)}
    left = {name: data.draw(st.integers(0, shape[0] * rank - 1)) for name, shape in shapes.items()}

    def fits(sparsity: float) -> bool:
        return all(
            1 <= positions_per_matrix(sparsity, d_out, rank) <= left[name] for name, (d_out, _) in shapes.items()
        )

    tried = (i / 10**decimals for decimals in (2, 3) for i in range(1, 10**decimals))
    lowest = next((sparsity for sparsity in tried if fits(sparsity)), None)
    proposed = fitting_sparsity(shapes, rank, left)
    if lowest is not None:
        assert float(proposed) == lowest
    else:
        assert proposed is None or fits(float(proposed))
