"""Fitting a sparse B to a foreign ΔW, against brute force over dense matrices."""

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


def dense(positions: torch.Tensor, values: torch.Tensor, d_out: int, rank: int) -> np.ndarray:
    b = np.zeros(d_out * rank)
    b[positions.numpy()] = values.numpy()
    return b.reshape(d_out, rank)


def loss(delta: np.ndarray, scale: float, b: np.ndarray, a: np.ndarray) -> float:
    return float(np.linalg.norm(delta - scale * b @ a))


def best_values(delta: np.ndarray, scale: float, a: np.ndarray, support: tuple[int, ...]) -> np.ndarray:
    """Dense B with the lowest loss on these positions, row by row with NumPy's least squares."""
    d_out, rank = len(delta), len(a)
    b = np.zeros((d_out, rank))
    for row in range(d_out):
        columns = [p % rank for p in support if p // rank == row]
        if columns:
            b[row, columns] = np.linalg.lstsq(scale * a[columns].T, delta[row], rcond=None)[0]
    return b


class Case:
    """A random small problem in which some positions are taken."""

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
def test_k_free_positions_get_the_values_with_the_lowest_loss(seed):
    case = Case(seed)
    positions, values = case.fitted()
    assert len(positions) == len(set(positions.tolist())) == case.k and set(positions.tolist()) <= set(
        case.free.tolist()
    )
    assert positions.tolist() == sorted(positions.tolist())
    expected = best_values(case.delta, case.scale, case.a.numpy(), tuple(positions.tolist()))
    np.testing.assert_allclose(dense(positions, values, *case.shape), expected, rtol=1e-7, atol=1e-9)


@given(SEEDS)
def test_with_orthogonal_rows_the_positions_are_optimal(seed):
    case = Case(seed, orthogonal=True)
    positions, _ = case.fitted()
    assert case.loss_on(tuple(positions.tolist())) == pytest.approx(case.least_loss(), rel=1e-9, abs=1e-9)


@given(SEEDS)
def test_with_other_rows_the_positions_are_no_worse_than_either_starting_point(seed):
    case = Case(seed)
    fitted_loss = case.loss_on(tuple(case.fitted()[0].tolist()))
    a = case.a.numpy()
    gram, target = a @ a.T, case.delta @ a.T / case.scale
    inverse = np.linalg.inv(gram)
    free = case.free.numpy()
    for size in (np.abs(target) / np.sqrt(np.diag(gram)), np.abs(target @ inverse) / np.sqrt(np.diag(inverse))):
        simple = np.sort(free[np.argsort(-size.reshape(-1)[free], kind="stable")[: case.k]])
        assert fitted_loss <= case.loss_on(tuple(simple.tolist())) + 1e-9
    assert fitted_loss >= case.least_loss() - 1e-9


@given(SEEDS)
def test_a_sparse_b_on_the_same_row_space_is_recovered(seed):
    """A_f = M·A with ΔW = c·B·A for a B of k values: the fit is exact for every M."""
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
    positions, values = fit(geometry, factors, 3.0, torch.arange(d_out * rank), k)
    recovered = torch.from_numpy(dense(positions, values, d_out, rank))
    torch.testing.assert_close(recovered, b, rtol=1e-6, atol=1e-6)
    assert lengths(geometry, factors, recovered, 3.0).error < 1e-6


@pytest.mark.parametrize("d_in", [6, 3, 2])  # in the last two, the stacked rows and A's own depend on each other
@given(seed=SEEDS)
def test_lengths_equal_the_norms_of_the_dense_matrices(d_in, seed):
    case = Case(seed, d_in=d_in)
    positions, values = case.fitted()
    b, a = dense(positions, values, *case.shape), case.a.numpy()
    measured = lengths(Geometry.of(case.a, case.factors.a), case.factors, torch.from_numpy(b), case.scale)
    size = np.linalg.norm(case.delta)
    inside = case.delta @ np.linalg.pinv(a) @ a
    assert measured.delta**0.5 == pytest.approx(size)
    assert measured.error == pytest.approx(loss(case.delta, case.scale, b, a) / size, abs=1e-9)
    assert measured.least_error == pytest.approx(np.linalg.norm(case.delta - inside) / size, abs=1e-7)
    assert measured.error >= measured.least_error - 1e-7


@given(SEEDS)
def test_values_stay_bounded_if_a_has_more_rows_than_columns(seed):
    """The small systems are singular then: the solution has the least norm, as NumPy's."""
    case = Case(seed, rank=5, d_in=2)
    positions, values = case.fitted()
    fitted_loss = loss(case.delta, case.scale, dense(positions, values, *case.shape), case.a.numpy())
    assert fitted_loss == pytest.approx(
        case.loss_on(tuple(positions.tolist())), rel=1e-5, abs=1e-6 * np.linalg.norm(case.delta)
    )
    length = np.linalg.norm(case.a.numpy(), axis=1)  # shortest where every row of A counts alike
    expected = best_values(case.delta, case.scale, case.a.numpy() / length[:, None], tuple(positions.tolist()))
    np.testing.assert_allclose(dense(positions, values, *case.shape) * length, expected, rtol=1e-5, atol=1e-7)


def test_errors_of_a_zero_delta_and_of_sums():
    factors = Factors(torch.randn(2, 6), torch.zeros(3, 2), 1.0)
    geometry = Geometry.of(torch.randn(3, 6), factors.a)
    positions, values = fit(geometry, factors, 1.0, torch.tensor([1, 4, 6, 7]), 3)
    assert positions.tolist() == [1, 4, 6] and not values.any()
    kept = lengths(geometry, factors, torch.zeros(3, 3), 1.0)
    assert (kept.error, kept.least_error) == (0.0, 0.0)
    assert lengths(geometry, factors, torch.ones(3, 3), 1.0).error == float("inf")
    assert (Lengths(3.0, 1.0, 0.5) + Lengths(1.0, 0.0, 0.5)).error == pytest.approx(0.5)
