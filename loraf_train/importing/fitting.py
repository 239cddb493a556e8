"""The nearest sparse B on a frozen A for a ΔW that was trained on another one.

    minimise ‖ΔW − c·B·A‖_F  over B with values at K of the free positions only;  c = α/r,  ΔW = s·B_f·A_f

With G = A·Aᵀ and C = ΔW·Aᵀ / c the loss is a sum over rows b_i of B: b_i·G·b_iᵀ − 2·b_i·c_iᵀ, plus a constant, times
c². So for a given support S of a row the best values solve the small system b_S · G[S, S] = C[i, S] (`refit`), and the
loss falls by C[i, S]·b_S. Which K positions are best is a search that grows exponentially; it is approached from two
sides (`choose`):

    forward     the K largest |C_ij| / √G_jj: what one position alone would explain
    backward    the K largest |B*_ij| / √(G⁻¹)_jj, B* = C·G⁻¹: what leaving one out of the dense solution would cost

and from each by hard thresholding pursuit: a gradient step, the K largest, refit, as long as the loss falls (Foucart,
«Hard thresholding pursuit: an algorithm for compressive sensing», SIAM J. Numer. Anal. 49, 2011). With orthogonal rows
of A both starts are the optimum already, and those of a random A are nearly orthogonal. Everything is float64, and ΔW
is never formed: its norms come from a QR decomposition of A and A_f stacked (`Geometry`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraf.peft_import import Factors
from loraf_train.adapter.masks import top_k

_PURSUIT_STEPS = 20
_SINGULAR = 1e-6  # a pivot of a normalised Gram matrix, square root
_NUMBERS_AT_ONCE = 1 << 23  # of the small systems that are solved together


@dataclass(frozen=True)
class Geometry:
    """Inner products of the rows of A and A_f, from R of [Aᵀ A_fᵀ] = Q·R: lengths without cancellation.

    Attributes:
        r: (min(d_in, rank + rank_f), rank + rank_f) float64, upper triangular.
        rank: of A.
    """

    r: torch.Tensor
    rank: int

    @classmethod
    def of(cls, a: torch.Tensor, foreign: torch.Tensor) -> Geometry:
        """`a`: (rank, d_in), `foreign`: (rank_f, d_in)."""
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
    """Squares of Frobenius norms, of one module or summed over several.

    Attributes:
        delta: ‖ΔW‖².
        lost: ‖ΔW − ΔŴ‖².
        outside: of ΔW outside the row space of A: what no B on this A could hold.
    """

    delta: float = 0.0
    lost: float = 0.0
    outside: float = 0.0

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(self.delta + other.delta, self.lost + other.lost, self.outside + other.outside)

    @property
    def error(self) -> float:
        """‖ΔW − ΔŴ‖ / ‖ΔW‖; 0 for ΔW = 0 that is kept, infinite for one that is not."""
        return self._relative(self.lost)

    @property
    def least_error(self) -> float:
        """What a dense B on this A would reach."""
        return self._relative(self.outside)

    def _relative(self, square: float) -> float:
        if self.delta == 0:
            return 0.0 if square == 0 else float("inf")
        return (square / self.delta) ** 0.5


def lengths(geometry: Geometry, factors: Factors, b: torch.Tensor, scale: float) -> Lengths:
    """How far scale·b·A is from ΔW. `b`: (d_out, rank), any float dtype."""
    delta = (factors.scale * factors.b.double()) @ geometry.r[:, geometry.rank :].T
    kept = (scale * b.double()) @ geometry.r[:, : geometry.rank].T
    outside = delta[:, geometry.rank :]
    return Lengths(*(float(part.square().sum()) for part in (delta, delta - kept, outside)))


def fit(
    geometry: Geometry, factors: Factors, scale: float, free: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where B has values, and the best values there.

    Args:
        scale: c, by which the task's B·A is multiplied.
        free: positions that may be taken (row · rank + column), ascending; at least k.

    Returns:
        (k,) int64, ascending; (k,) float64.
    """
    gram = geometry.gram
    target = (factors.scale / scale * factors.b.double()) @ geometry.cross
    # Rows of A of length 1 instead of theirs: then sizes can be compared across columns.
    length = gram.diagonal().sqrt()
    length = torch.where(length > 0, length, 1.0)
    flat, values = choose(gram / torch.outer(length, length), target / length, free, k)
    return flat, values / length[flat % len(length)]


def choose(gram: torch.Tensor, target: torch.Tensor, free: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`fit` for a normalised A.

    Args:
        gram: (rank, rank) with a diagonal of ones.
        target: (d_out, rank), C.
    """
    inverse = torch.linalg.pinv(gram, hermitian=True)
    least = inverse.diagonal().clamp_min(1e-300).sqrt()
    best, most = None, -1.0
    for size in (target, (target @ inverse) / least):
        found, gain = _pursue(gram, target, free, free[top_k(size.reshape(-1)[free], k)])
        if gain > most:
            best, most = found, gain
    return best


def _pursue(
    gram: torch.Tensor, target: torch.Tensor, free: torch.Tensor, flat: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """Hard thresholding pursuit from the support `flat`: the support and values with the largest gain, and the gain."""
    values = refit(gram, target, flat)
    gain = float(target.reshape(-1)[flat] @ values)
    for _ in range(_PURSUIT_STEPS):
        b = torch.zeros_like(target)
        b.view(-1)[flat] = values
        stepped = b + (target - b @ gram)
        next_flat = free[top_k(stepped.view(-1)[free], len(flat))]
        if torch.equal(next_flat, flat):
            break
        next_values = refit(gram, target, next_flat)
        next_gain = float(target.reshape(-1)[next_flat] @ next_values)
        if not next_gain > gain:
            break
        flat, values, gain = next_flat, next_values, next_gain
    return (flat, values), gain


def refit(gram: torch.Tensor, target: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The best values at given positions: for each row b_S · G[S, S] = C[i, S].

    Args:
        flat: positions, ascending, (k,).

    Returns:
        (k,) float64.
    """
    rank = len(gram)
    rows, cols = flat // rank, flat % rank
    counts = torch.bincount(rows, minlength=len(target))
    starts = counts.cumsum(0) - counts
    values = torch.zeros(len(flat), dtype=torch.float64)
    for count in counts.unique().tolist():  # rows with equally many positions are solved together
        if count == 0:
            continue
        for some in (counts == count).nonzero().view(-1).split(max(1, _NUMBERS_AT_ONCE // count**2)):
            at = starts[some, None] + torch.arange(count)
            columns = cols[at]
            system = gram[columns[:, :, None], columns[:, None, :]]
            values[at] = _solve(system, target[some[:, None], columns])
    return values


def _solve(systems: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solutions of symmetric systems (n, m, m) for (n, m): the shortest where one is singular (rank above d_in)."""
    factor, info = torch.linalg.cholesky_ex(systems)
    singular = (info > 0) | ~(factor.diagonal(dim1=-2, dim2=-1).amin(-1) > _SINGULAR)
    factor[singular] = torch.eye(systems.shape[-1], dtype=factor.dtype)
    found = torch.cholesky_solve(right[..., None], factor)[..., 0]
    if bool(singular.any()):
        inverse = torch.linalg.pinv(systems[singular], hermitian=True)
        found[singular] = (inverse @ right[singular][..., None])[..., 0]
    return found
