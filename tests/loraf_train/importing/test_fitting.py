"""The fit of a sparse B to a foreign ΔW, against brute force over dense matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraf.peft_import import Factors
from loraf_train.importing.fitting import Geometry, Lengths, fit, lengths

SEEDS = st.integers(0, 10**6)


def normal(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(shape))


def dense(flat: torch.Tensor, values: torch.Tensor, d_out: int, rank: int) -> np.ndarray:
    b = np.zeros(d_out * rank)
    b[flat.numpy()] = values.numpy()
    return b.reshape(d_out, rank)


def loss(delta: np.ndarray, scale: float, b: np.ndarray, a: np.ndarray) -> float:
    return float(np.linalg.norm(delta - scale * b @ a))


def best_values(delta: np.ndarray, scale: float, a: np.ndarray, support: tuple[int, ...]) -> np.ndarray:
    """Dense B with the least loss on these positions, row by row with NumPy's own least squares."""
    d_out, rank = len(delta), len(a)
    b = np.zeros((d_out, rank))
    for row in range(d_out):
        columns = [p % rank for p in support if p // rank == row]
        if columns:
            b[row, columns] = np.linalg.lstsq(scale * a[columns].T, delta[row], rcond=None)[0]
    return b


class Case:
    """A random small problem with taken positions."""

    def __init__(self, seed: int, orthogonal: bool = False, d_out: int = 3, rank: int = 3, d_in: int = 6):
        generator = np.random.default_rng(seed)
        a = normal(generator, rank, d_in)
        if orthogonal:  # rows of different lengths
            a = torch.linalg.qr(a.T).Q.T * torch.from_numpy(generator.uniform(0.2, 5, (rank, 1)))
        self.a, self.scale = a, float(generator.uniform(0.2, 4))
        self.factors = Factors(normal(generator, 2, d_in), normal(generator, d_out, 2), -1.5)
        self.free = torch.from_numpy(np.sort(generator.choice(d_out * rank, size=d_out * rank - 2, replace=False)))
        self.k = int(generator.integers(0, len(self.free) + 1))
        self.delta = self.factors.scale * (self.factors.b @ self.factors.a).numpy()
        self.shape = (d_out, rank)

    def fitted(self) -> tuple[torch.Tensor, torch.Tensor]:
        return fit(Geometry.of(self.a, self.factors.a), self.factors, self.scale, self.free, self.k)

    def loss_on(self, support: tuple[int, ...]) -> float:
        a = self.a.numpy()
        return loss(self.delta, self.scale, best_values(self.delta, self.scale, a, support), a)

    def least_loss(self) -> float:
        return min(self.loss_on(support) for support in itertools.combinations(self.free.tolist(), self.k))


@given(SEEDS)
def test_values_are_the_best_on_their_positions_which_are_free_and_k(seed):
    case = Case(seed)
    flat, values = case.fitted()
    assert len(flat) == len(set(flat.tolist())) == case.k and set(flat.tolist()) <= set(case.free.tolist())
    assert flat.tolist() == sorted(flat.tolist())
    expected = best_values(case.delta, case.scale, case.a.numpy(), tuple(flat.tolist()))
    np.testing.assert_allclose(dense(flat, values, *case.shape), expected, rtol=1e-7, atol=1e-9)


@given(SEEDS)
def test_with_orthogonal_rows_no_choice_of_positions_is_better(seed):
    case = Case(seed, orthogonal=True)
    flat, _ = case.fitted()
    assert case.loss_on(tuple(flat.tolist())) == pytest.approx(case.least_loss(), rel=1e-9, abs=1e-9)


@given(SEEDS)
def test_otherwise_the_choice_is_no_worse_than_either_simple_one(seed):
    case = Case(seed)
    found = case.loss_on(tuple(case.fitted()[0].tolist()))
    a = case.a.numpy()
    gram, target = a @ a.T, case.delta @ a.T / case.scale
    inverse = np.linalg.inv(gram)
    free = case.free.numpy()
    for size in (np.abs(target) / np.sqrt(np.diag(gram)), np.abs(target @ inverse) / np.sqrt(np.diag(inverse))):
        simple = np.sort(free[np.argsort(-size.reshape(-1)[free], kind="stable")[: case.k]])
        assert found <= case.loss_on(tuple(simple.tolist())) + 1e-9
    assert found >= case.least_loss() - 1e-9


@given(SEEDS)
def test_a_sparse_b_on_the_same_rows_is_found_again(seed):
    """A_f = M·A with ΔW = c·B·A for a B of k values: nothing is lost, whatever M is."""
    generator = np.random.default_rng(seed)
    rank, d_in, d_out, k = 4, 96, 5, 6
    a, mix = normal(generator, rank, d_in), normal(generator, rank, rank)
    b = torch.zeros(d_out * rank, dtype=torch.float64)
    # Values that stand well above what rows which are not quite orthogonal let seem to be elsewhere.
    signs = generator.choice([-1.0, 1.0], k)
    b[torch.from_numpy(generator.permutation(d_out * rank)[:k])] = torch.from_numpy(signs * generator.uniform(1, 2, k))
    b = b.view(d_out, rank)
    factors = Factors(mix @ a, b @ torch.linalg.inv(mix), 3.0)
    geometry = Geometry.of(a, factors.a)
    flat, values = fit(geometry, factors, 3.0, torch.arange(d_out * rank), k)
    found = torch.from_numpy(dense(flat, values, d_out, rank))
    torch.testing.assert_close(found, b, rtol=1e-6, atol=1e-6)
    assert lengths(geometry, factors, found, 3.0).error < 1e-6


@pytest.mark.parametrize("d_in", [6, 3, 2])  # in the last two, the stacked rows and A's own depend on each other
@given(seed=SEEDS)
def test_lengths_are_those_of_the_dense_matrices(d_in, seed):
    case = Case(seed, d_in=d_in)
    flat, values = case.fitted()
    b, a = dense(flat, values, *case.shape), case.a.numpy()
    found = lengths(Geometry.of(case.a, case.factors.a), case.factors, torch.from_numpy(b), case.scale)
    size = np.linalg.norm(case.delta)
    inside = case.delta @ np.linalg.pinv(a) @ a
    assert found.delta**0.5 == pytest.approx(size)
    assert found.error == pytest.approx(loss(case.delta, case.scale, b, a) / size, abs=1e-9)
    assert found.least_error == pytest.approx(np.linalg.norm(case.delta - inside) / size, abs=1e-7)
    assert found.error >= found.least_error - 1e-7


@given(SEEDS)
def test_more_rows_of_a_than_inputs_leave_no_value_unbounded(seed):
    """Then small systems are singular: the shortest solution, as NumPy's."""
    case = Case(seed, rank=5, d_in=2)
    flat, values = case.fitted()
    found = loss(case.delta, case.scale, dense(flat, values, *case.shape), case.a.numpy())
    assert found == pytest.approx(case.loss_on(tuple(flat.tolist())), rel=1e-5, abs=1e-6 * np.linalg.norm(case.delta))
    length = np.linalg.norm(case.a.numpy(), axis=1)  # shortest where every row of A counts alike
    expected = best_values(case.delta, case.scale, case.a.numpy() / length[:, None], tuple(flat.tolist()))
    np.testing.assert_allclose(dense(flat, values, *case.shape) * length, expected, rtol=1e-5, atol=1e-7)


def test_nothing_to_hold_and_sums():
    factors = Factors(torch.randn(2, 6), torch.zeros(3, 2), 1.0)
    geometry = Geometry.of(torch.randn(3, 6), factors.a)
    flat, values = fit(geometry, factors, 1.0, torch.tensor([1, 4, 6, 7]), 3)
    assert flat.tolist() == [1, 4, 6] and not values.any()
    kept = lengths(geometry, factors, torch.zeros(3, 3), 1.0)
    assert (kept.error, kept.least_error) == (0.0, 0.0)
    assert lengths(geometry, factors, torch.ones(3, 3), 1.0).error == float("inf")
    assert (Lengths(3.0, 1.0, 0.5) + Lengths(1.0, 0.0, 0.5)).error == pytest.approx(0.5)
