"""One task's B in one module, in coordinate form.

The coordinates are unique and sorted by row, then column. They are the task's mask: positions whose value is zero are
stored too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraf.matrices import native

INDEX_DTYPES = (torch.uint8, torch.uint16, torch.int32)
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_VALUE_KINDS = {torch.float32: 0, torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}
# All exponent bits set: infinity or NaN.
_EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_DENSE = 1 << 22  # entries of a matrix for which a byte each costs nothing
_BYTES_PER_VALUE = 64  # the most memory, beyond that, which a check for shared positions may take
_ROW, _COLUMN, _ORDER, _VALUE = 1, 2, 4, 8
_FAULTS = {  # only the first that applies is reported
    _ROW: "a row lies outside the matrix",
    _COLUMN: "a column lies outside the matrix",
    _ORDER: "coordinates are not unique and sorted by row, then column",
    _VALUE: "a value is not finite",
}


def index_dtype(size: int) -> torch.dtype:
    """Returns the smallest of uint8, uint16 and int32 that holds 0 … size − 1."""
    return torch.uint8 if size <= 1 << 8 else torch.uint16 if size <= 1 << 16 else torch.int32


@dataclass(frozen=True)
class SparseB:
    """A (d_out, rank) matrix with K values, and zeros elsewhere.

    Attributes:
        rows, cols: (K,) in the smallest index dtype, sorted by row, then column.
        values: (K,) in the stored dtype.
        shape: (d_out, rank).
    """

    rows: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_positions(cls, positions: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> SparseB:
        """Builds the matrix from positions (row · rank + column, int64, in any order) and their values, both (K,)."""
        order = torch.argsort(positions)
        positions, values = positions[order].cpu(), values.detach()[order].cpu()
        d_out, rank = shape
        rows = (positions // rank).to(index_dtype(d_out))
        return cls(rows, (positions % rank).to(index_dtype(rank)), values.contiguous(), shape)

    @property
    def nbytes(self) -> int:
        """Size of the coordinates and values in bytes."""
        return self.rows.nbytes + self.cols.nbytes + self.values.nbytes

    @property
    def positions(self) -> torch.Tensor:
        """(K,) int64: row · rank + column, ascending."""
        return self.rows.to(torch.int64) * self.shape[1] + self.cols.to(torch.int64)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the dense matrix, (d_out, rank), with zeros outside the mask."""
        out = torch.zeros(self.shape, dtype=dtype)
        out.view(-1)[self.positions] = self.values.to(dtype)
        return out

    def fault(self) -> str | None:
        """Returns what is wrong with the tensors, or None."""
        return examine([self])[0][0]

    def _misfit(self) -> str | None:
        """Returns what is wrong with the tensors' shapes and dtypes, or None."""
        d_out, rank = self.shape
        if not self.rows.shape == self.cols.shape == self.values.shape or self.rows.ndim != 1:
            return "rows, cols and values are not three vectors of one length"
        if self.rows.dtype != index_dtype(d_out) or self.cols.dtype != index_dtype(rank):
            return "coordinates are not in the smallest index dtype"
        if self.values.dtype not in VALUE_DTYPES:
            return f"values are {self.values.dtype}, not one of {', '.join(map(str, VALUE_DTYPES))}"
        return None


def examine(matrices: Sequence[SparseB]) -> tuple[list[str | None], bool]:
    """Checks the matrices of several tasks in one module.

    Args:
        matrices: all of the same shape.

    Returns:
        For each matrix what is wrong with it, or None; and whether two of them share a position, which is meaningful
        only if nothing is wrong.
    """
    faults = [b._misfit() for b in matrices]
    well_formed = [i for i, misfit in enumerate(faults) if misfit is None]
    library = native.library()
    sound = [matrices[i] for i in well_formed]
    if library is None or not matrices or not native.can_check(matrices[0].shape):
        bits, shared = _by_numpy(sound)
    elif _is_dense(sound):
        bits, shared = _by_library(library, sound)
    else:
        bits = [_by_library(library, [b])[0][0] for b in sound]
        shared = not any(bits) and _share_by_sorting(sound)
    for i, fault_bits in zip(well_formed, bits, strict=True):
        faults[i] = next((text for bit, text in _FAULTS.items() if fault_bits & bit), None)
    return faults, shared


def _is_dense(matrices: Sequence[SparseB]) -> bool:
    """Whether memory for every entry of the matrix is in proportion to the values that there are.

    A file of a few bytes may state a matrix of gigabytes.
    """
    if not matrices:
        return True
    d_out, rank = matrices[0].shape
    return d_out * rank <= max(_DENSE, _BYTES_PER_VALUE * sum(len(b.values) for b in matrices))


def _share_by_sorting(matrices: Sequence[SparseB]) -> bool:
    """Whether two matrices share a position. Takes memory for the values only."""
    positions = np.sort(np.concatenate([b.positions.cpu().numpy() for b in matrices]))
    return bool((positions[1:] == positions[:-1]).any())


def _by_library(library: native.NativeLibrary, matrices: Sequence[SparseB]) -> tuple[list[int], bool]:
    if not matrices:
        return [], False
    tensors = [(b.rows.cpu().contiguous(), b.cols.cpu().contiguous(), b.values.cpu().contiguous()) for b in matrices]
    masks = [
        native.Mask(rows.data_ptr(), cols.data_ptr(), values.data_ptr(), values.numel(), _VALUE_KINDS[values.dtype])
        for rows, cols, values in tensors
    ]
    index_bytes = (tensors[0][0].element_size(), tensors[0][1].element_size())
    return library.check_masks(masks, index_bytes, matrices[0].shape)


def _by_numpy(matrices: Sequence[SparseB]) -> tuple[list[int], bool]:
    """The reference for `NativeLibrary.check_masks`."""
    bits = [_fault_bits(b) for b in matrices]
    if len(matrices) < 2 or any(bits):
        return bits, False
    if not _is_dense(matrices):
        return bits, _share_by_sorting(matrices)
    owned = np.zeros(matrices[0].shape[0] * matrices[0].shape[1], dtype=bool)
    for b in matrices:
        owned[b.positions.cpu().numpy()] = True
    return bits, np.count_nonzero(owned) != sum(len(b.values) for b in matrices)


def _fault_bits(b: SparseB) -> int:
    rows, cols = b.rows.cpu().numpy(), b.cols.cpu().numpy()
    if not len(rows):
        return 0
    d_out, rank = b.shape
    outside = _ROW * bool(rows.min() < 0 or rows.max() >= d_out) + _COLUMN * bool(cols.min() < 0 or cols.max() >= rank)
    ascending = rows[1:] > rows[:-1]
    ascending |= (rows[1:] == rows[:-1]) & (cols[1:] > cols[:-1])
    exponent = _EXPONENTS[b.values.dtype]
    bits = b.values.detach().cpu().view(torch.int32 if b.values.dtype == torch.float32 else torch.int16).numpy()
    return outside + _ORDER * (not ascending.all()) + _VALUE * bool(((bits & exponent) == exponent).any())
