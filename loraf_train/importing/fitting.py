"""Finds the sparse B on a frozen A that is nearest to a ΔW trained on another A.

    minimise ‖ΔW − c·B·A‖_F  over B with values at K of the free positions only;  c = α/r,  ΔW = s·B_f·A_f

With G = A·Aᵀ and C = ΔW·Aᵀ / c the loss is a sum over rows b_i of B: b_i·G·b_iᵀ − 2·b_i·c_iᵀ, plus a constant, times
c². So for a given support S of a row the best values solve the small system b_S · G[S, S] = C[i, S] (`refit`), and the
loss falls by C[i, S]·b_S. Finding the best K positions takes exponential time; `fit_normalised` starts from two
approximations:

    forward     the K largest |C_ij| / √G_jj: what one position alone would explain
    backward    the K largest |B*_ij| / √(G⁻¹)_jj, B* = C·G⁻¹: what leaving one out of the dense solution would cost

It improves each by hard thresholding pursuit: a gradient step, the K largest, refit, while the loss falls (Foucart,
«Hard thresholding pursuit: an algorithm for compressive sensing», SIAM J. Numer. Anal. 49, 2011), and takes the better
one. With orthogonal rows of A both starting points are optimal already, and the rows of a random A are nearly
orthogonal. Everything is float64, and ΔW is never formed: its norms come from a QR decomposition of A and A_f stacked
(`Geometry`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loraf.peft_import import Factors
from loraf_train.adapter.masks import top_k

_PURSUIT_STEPS = 20
_SINGULAR = 1e-6  # square root of the smallest pivot of a normalised Gram matrix that counts as regular
_ENTRIES_AT_ONCE = 1 << 23  # of the small systems that are solved in one batch


@dataclass(frozen=True)
class Geometry:
    """Inner products of the rows of A and A_f, from R of [Aᵀ A_fᵀ] = Q·R, which gives norms without cancellation.

    Attributes:
        r: (min(d_in, rank + rank_f), rank + rank_f) float64, upper triangular.
        rank: of A.
    """

    r: torch.Tensor
    rank: int

    @classmethod
    def of(cls, a: torch.Tensor, foreign: torch.Tensor) -> Geometry:
        """Args: a: (rank, d_in). foreign: A_f, (rank_f, d_in)."""
        return cls(torch.linalg.qr(torch.cat([a, foreign]).double().T, mode="r").R, len(a))

    @property
    def gram(self) -> torch.Tensor:
        """A·Aᵀ, (rank, rank)."""
        return self.r[:, : self.rank].T @ self.r[:, : self.rank]

    @property
    def cross(self) -> torch.Tensor:
        """A_f·Aᵀ, (rank_f, rank)."""
        return self.r[:, self.rank :].T @ self.r[:, : self.rank]


@dataclass(frozen=True)
class Lengths:
    """Squared Frobenius norms, of one module or summed over several. ΔŴ is the imported task's.

    Attributes:
        delta: ‖ΔW‖².
        lost: ‖ΔW − ΔŴ‖².
        outside: of the part of ΔW outside the row space of A, which no B on this A can represent.
    """

    delta: float = 0.0
    lost: float = 0.0
    outside: float = 0.0

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(self.delta + other.delta, self.lost + other.lost, self.outside + other.outside)

    @property
    def error(self) -> float:
        """‖ΔW − ΔŴ‖ / ‖ΔW‖. For ΔW = 0: 0 if ΔŴ is 0 too, else infinite."""
        return self._relative(self.lost)

    @property
    def least_error(self) -> float:
        """The error of the best dense B on this A."""
        return self._relative(self.outside)

    def _relative(self, square: float) -> float:
        if self.delta == 0:
            return 0.0 if square == 0 else float("inf")
        return math.sqrt(square / self.delta)


def lengths(geometry: Geometry, factors: Factors, b: torch.Tensor, scale: float) -> Lengths:
    """Measures how far scale·b·A is from ΔW. `b`: (d_out, rank), any float dtype."""
    delta = (factors.scale * factors.b.double()) @ geometry.r[:, geometry.rank :].T
    imported = (scale * b.double()) @ geometry.r[:, : geometry.rank].T
    outside = delta[:, geometry.rank :]
    return Lengths(*(float(part.square().sum()) for part in (delta, delta - imported, outside)))


def fit(
    geometry: Geometry, factors: Factors, scale: float, free: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects k positions for B and computes the best values there.

    Args:
        scale: c, by which the task's B·A is multiplied.
        free: positions that may be taken, ascending; at least k.

    Returns:
        Positions, (k,) int64, ascending; values, (k,) float64.
    """
    gram = geometry.gram
    target = (factors.scale / scale * factors.b.double()) @ geometry.cross
    # Rows of A scaled to length 1, so that values are comparable across columns.
    length = gram.diagonal().sqrt()
    length = torch.where(length > 0, length, 1.0)
    positions, values = fit_normalised(gram / torch.outer(length, length), target / length, free, k)
    return positions, values / length[positions % len(length)]


def fit_normalised(
    gram: torch.Tensor, target: torch.Tensor, free: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fit` for an A with rows of length 1.

    Args:
        gram: (rank, rank) with a diagonal of ones.
        target: (d_out, rank), C.
    """
    inverse = torch.linalg.pinv(gram, hermitian=True)
    cost = (target @ inverse) / inverse.diagonal().clamp_min(1e-300).sqrt()
    starts = (free[top_k(size.reshape(-1)[free], k)] for size in (target, cost))
    forward, backward = (_pursue(gram, target, free, start) for start in starts)
    return backward[:2] if backward[2] > forward[2] else forward[:2]


def _pursue(
    gram: torch.Tensor, target: torch.Tensor, free: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Hard thresholding pursuit from the given positions: returns positions, values and by how much the loss falls."""
    values = refit(gram, target, positions)
    gain = float(target.reshape(-1)[positions] @ values)
    for _ in range(_PURSUIT_STEPS):
        b = torch.zeros_like(target)
        b.view(-1)[positions] = values
        stepped = b + (target - b @ gram)
        next_positions = free[top_k(stepped.view(-1)[free], len(positions))]
        if torch.equal(next_positions, positions):
            break
        next_values = refit(gram, target, next_positions)
        next_gain = float(target.reshape(-1)[next_positions] @ next_values)
        if not next_gain > gain:
            break
        positions, values, gain = next_positions, next_values, next_gain
    return positions, values, gain


def refit(gram: torch.Tensor, target: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Computes the best values at given positions: for each row b_S · G[S, S] = C[i, S].

    Args:
        positions: (k,), ascending.

    Returns:
        (k,) float64.
    """
    rank = len(gram)
    rows, cols = positions // rank, positions % rank
    counts = torch.bincount(rows, minlength=len(target))
    starts = counts.cumsum(0) - counts
    values = torch.zeros(len(positions), dtype=torch.float64)
    for count in sorted(set(counts.tolist()) - {0}):  # rows with equally many positions are solved together
        for batch in (counts == count).nonzero().view(-1).split(max(1, _ENTRIES_AT_ONCE // count**2)):
            indices = starts[batch, None] + torch.arange(count)
            columns = cols[indices]
            systems = gram[columns[:, :, None], columns[:, None, :]]
            values[indices] = _solve(systems, target[batch[:, None], columns])
    return values


def _solve(systems: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves symmetric systems (n, m, m) for right sides (n, m); a singular one (rank above d_in) by least norm."""
    factor, info = torch.linalg.cholesky_ex(systems)
    singular = (info > 0) | ~(factor.diagonal(dim1=-2, dim2=-1).amin(-1) > _SINGULAR)
    factor[singular] = torch.eye(systems.shape[-1], dtype=factor.dtype)
    solutions = torch.cholesky_solve(right[..., None], factor)[..., 0]
    if bool(singular.any()):
        inverse = torch.linalg.pinv(systems[singular], hermitian=True)
        solutions[singular] = (inverse @ right[singular][..., None])[..., 0]
    return solutions
