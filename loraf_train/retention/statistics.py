"""How a finished task's logits depend on B: what is stored beside the task, and the change that follows from it.

For every target module, with z = A·x the adapter's inner activation and g the gradient of a random probe of the logits
with respect to the module's output (see `gather`):

    G = Σ g·gᵀ / completion tokens       (d_out, d_out), stored as its leading directions and the rest of its diagonal
    C = Σ ‖g‖²·z·zᵀ / Σ ‖g‖²             (rank, rank), stored as a triangular factor

A change D of the module's scaled B, (d_out, rank), then changes the logits of the task's completions by the mean square

    P(D) = tr(G · D · C · Dᵀ)

to first order, and if g·gᵀ and z·zᵀ are independent given ‖g‖² (a Kronecker-factored curvature: Martens and Grosse
2015; as a penalty for continual learning: Ritter and others 2018). The changes through different modules are taken as
independent, so their P add up. docs/explanation/retention.md shows what each of these leaves out, measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from loraf.errors import CorruptCheckpoint, Problem
from loraf.files import strict_safetensors

_PARTS = ("directions", "scales", "rest", "factor")
_LARGEST_INT8 = 127
_REMEDY = "gather the task's statistics again (`loraf-train protect`), or restore the checkpoint from a copy"


@dataclass(frozen=True)
class ModuleStatistics:
    """Statistics of one module; all float32.

    Attributes:
        directions: U, (d_out, k): leading eigenvectors of G, each times the root of its eigenvalue.
        rest: (d_out,): the diagonal of G − U·Uᵀ, not negative. G is taken as U·Uᵀ + diag(rest).
        factor: L, (rank, rank), lower triangular: C = L·Lᵀ.
    """

    directions: torch.Tensor
    rest: torch.Tensor
    factor: torch.Tensor

    def to(self, device: torch.device) -> ModuleStatistics:
        return ModuleStatistics(self.directions.to(device), self.rest.to(device), self.factor.to(device))

    def weighted(self, d: torch.Tensor) -> torch.Tensor:
        """Returns G·D·C, (d_out, rank): half the gradient of P. `d`: D, (d_out, rank)."""
        m = (d @ self.factor) @ self.factor.t()
        return torch.addmm(m * self.rest[:, None], self.directions, self.directions.t() @ m)


Statistics = Mapping[str, ModuleStatistics]  # module → its statistics


def mean_square_change(statistics: Statistics, deltas: Mapping[str, torch.Tensor]) -> float:
    """Returns P: the mean squared change of a logit that the statistics predict.

    Args:
        deltas: module → D, the change of its scaled B, (d_out, rank) float32.
    """
    return sum(float((statistics[name].weighted(d) * d).sum()) for name, d in deltas.items())


def encode(statistics: Statistics) -> bytes:
    """Encodes statistics as a safetensors file.

    Per module: `directions` int8 (d_out, k) with `scales` float32 (k,), `rest` bfloat16 (d_out,), and of `factor` the
    lower triangle, row by row, bfloat16.
    """
    names = sorted(statistics)
    tensors = {name: _stored(statistics[name]) for name in names}
    order = [(part, name) for part in ("scales", "rest", "factor", "directions") for name in names]  # falling item size
    return strict_safetensors.encode((f"{name}.{part}", tensors[name][part]) for part, name in order)


def rounded(statistics: Statistics) -> dict[str, ModuleStatistics]:
    """Returns the statistics as they are read back from a file."""
    return {name: _from_stored(_stored(of_module), len(of_module.factor)) for name, of_module in statistics.items()}


def _stored(of_module: ModuleStatistics) -> dict[str, torch.Tensor]:
    directions, rank = of_module.directions.float().cpu(), len(of_module.factor)
    largest = directions.abs().amax(0) if directions.numel() else torch.zeros(directions.shape[1])
    scales = largest / _LARGEST_INT8
    units = directions / scales.clamp(min=torch.finfo(torch.float32).tiny)
    rows, columns = torch.tril_indices(rank, rank)
    return {
        "directions": units.round().to(torch.int8).contiguous(),
        "scales": scales.contiguous(),
        "rest": of_module.rest.cpu().to(torch.bfloat16).contiguous(),
        "factor": of_module.factor.cpu()[rows, columns].to(torch.bfloat16).contiguous(),
    }


def _from_stored(parts: Mapping[str, torch.Tensor], rank: int) -> ModuleStatistics:
    factor = torch.zeros(rank, rank)
    rows, columns = torch.tril_indices(rank, rank)
    factor[rows, columns] = parts["factor"].float()
    return ModuleStatistics(parts["directions"].float() * parts["scales"], parts["rest"].float(), factor)


def decode(data: bytes, shapes: Mapping[str, tuple[int, int]], file: str) -> dict[str, ModuleStatistics]:
    """Reads what `encode` wrote.

    Args:
        shapes: module → (d_out, rank).
        file: its path, for messages.

    Raises:
        CorruptCheckpoint: the bytes are not statistics of these modules; lists every fault.
    """
    try:
        tensors = strict_safetensors.parse(memoryview(bytearray(data)))  # torch wants memory that it could write
    except ValueError as error:
        raise CorruptCheckpoint(Problem(f"is not a file of statistics ({error})", file=file, remedy=_REMEDY)) from None
    expected = {f"{name}.{part}" for name in shapes for part in _PARTS}
    if tensors.keys() != expected:
        differing = ", ".join(sorted(tensors.keys() ^ expected)[:4])
        problem = Problem(
            f"its tensors are not those of the checkpoint's modules ({differing})", file=file, remedy=_REMEDY
        )
        raise CorruptCheckpoint(problem)
    problems = [Problem(fault, name, file, _REMEDY) for name, fault in _faults(tensors, shapes)]
    if problems:
        raise CorruptCheckpoint(problems)
    if not any(bool(tensors[f"{name}.{part}"].any()) for name in shapes for part in ("scales", "rest")):
        raise CorruptCheckpoint(Problem("is all zero, so it would protect nothing", file=file, remedy=_REMEDY))
    return {
        name: _from_stored({part: tensors[f"{name}.{part}"] for part in _PARTS}, rank)
        for name, (_, rank) in shapes.items()
    }


def _faults(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yields (tensor, what is wrong with it)."""
    for name, (d_out, rank) in shapes.items():
        k = tensors[f"{name}.scales"].numel()
        wanted = {
            "directions": (torch.int8, [d_out, k]),
            "scales": (torch.float32, [k]),
            "rest": (torch.bfloat16, [d_out]),
            "factor": (torch.bfloat16, [rank * (rank + 1) // 2]),
        }
        for part, (dtype, shape) in wanted.items():
            tensor = tensors[f"{name}.{part}"]
            if tensor.dtype != dtype or list(tensor.shape) != shape:
                yield f"{name}.{part}", f"is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}"
            elif dtype != torch.int8 and not bool(torch.isfinite(tensor).all()):
                yield f"{name}.{part}", "holds numbers that are not finite"
            elif part in ("scales", "rest") and bool((tensor < 0).any()):
                yield f"{name}.{part}", "holds negative numbers"
