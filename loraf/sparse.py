"""One task's B in one module, in coordinate form: its mask and its values at once.

Coordinates are unique and sorted by row, then column. A position that training left at zero is stored all the same:
the coordinates are the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraf import native

INDEX_DTYPES = (torch.uint8, torch.uint16, torch.int32)
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_VALUE_KINDS = {torch.float32: 0, torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}
# An exponent of all ones is an infinity or no number.
_EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_ROW, _COLUMN, _ORDER, _VALUE = 1, 2, 4, 8
_FAULTS = {  # the first that holds is told
    _ROW: "a row lies outside the matrix",
    _COLUMN: "a column lies outside the matrix",
    _ORDER: "coordinates are not unique and sorted by row, then column",
    _VALUE: "a value is not finite",
}


def index_dtype(size: int) -> torch.dtype:
    """The smallest of uint8, uint16, int32 that holds 0 … size − 1."""
    return torch.uint8 if size <= 1 << 8 else torch.uint16 if size <= 1 << 16 else torch.int32


@dataclass(frozen=True)
class SparseB:
    """K positions of a (d_out, rank) matrix.

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
    def from_flat(cls, flat: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> SparseB:
        """From flat positions (row · rank + column, int64, any order) and their values, both (K,)."""
        order = torch.argsort(flat)
        flat, values = flat[order].cpu(), values.detach()[order].cpu()
        d_out, rank = shape
        rows = (flat // rank).to(index_dtype(d_out))
        return cls(rows, (flat % rank).to(index_dtype(rank)), values.contiguous(), shape)

    @property
    def nbytes(self) -> int:
        """Bytes of coordinates and values."""
        return self.rows.nbytes + self.cols.nbytes + self.values.nbytes

    @property
    def flat(self) -> torch.Tensor:
        """(K,) int64: row · rank + column, ascending."""
        return self.rows.to(torch.int64) * self.shape[1] + self.cols.to(torch.int64)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(d_out, rank) with zeros outside the mask."""
        out = torch.zeros(self.shape, dtype=dtype)
        out.view(-1)[self.flat] = self.values.to(dtype)
        return out

    def fault(self) -> str | None:
        """What is wrong with the tensors, or None."""
        return examine([self])[0][0]

    def _misfit(self) -> str | None:
        """What is wrong with the tensors' shapes and dtypes, or None."""
        d_out, rank = self.shape
        if not self.rows.shape == self.cols.shape == self.values.shape or self.rows.ndim != 1:
            return "rows, cols and values are not three vectors of one length"
        if self.rows.dtype != index_dtype(d_out) or self.cols.dtype != index_dtype(rank):
            return "coordinates are not in the smallest index dtype"
        if self.values.dtype not in VALUE_DTYPES:
            return f"values are {self.values.dtype}, not one of {', '.join(map(str, VALUE_DTYPES))}"
        return None


def examine(masks: Sequence[SparseB]) -> tuple[list[str | None], bool]:
    """What is wrong with the masks of several tasks in one module.

    Args:
        masks: of one shape.

    Returns:
        For each mask what is wrong with it, or None; and whether two of them share a position, which has a meaning
        only if nothing is wrong with any.
    """
    found = [b._misfit() for b in masks]
    fitting = [i for i, misfit in enumerate(found) if misfit is None]
    library = native.library()
    usable = library is not None and bool(masks) and native.can_check(masks[0].shape)
    chosen = [masks[i] for i in fitting]
    bits, shared = _by_library(library, chosen) if usable else _by_numpy(chosen)
    for i, wrong in zip(fitting, bits, strict=True):
        found[i] = next((text for bit, text in _FAULTS.items() if wrong & bit), None)
    return found, shared


def _by_library(library: native.Library, masks: Sequence[SparseB]) -> tuple[list[int], bool]:
    if not masks:
        return [], False
    tensors = [(b.rows.cpu().contiguous(), b.cols.cpu().contiguous(), b.values.cpu().contiguous()) for b in masks]
    described = [
        native.Mask(rows.data_ptr(), cols.data_ptr(), values.data_ptr(), values.numel(), _VALUE_KINDS[values.dtype])
        for rows, cols, values in tensors
    ]
    index_bytes = (tensors[0][0].element_size(), tensors[0][1].element_size())
    return library.check_masks(described, index_bytes, masks[0].shape)


def _by_numpy(masks: Sequence[SparseB]) -> tuple[list[int], bool]:
    """The reference of `Library.check_masks`."""
    bits = [_wrong(b) for b in masks]
    if len(masks) < 2 or any(bits):
        return bits, False
    owned = np.zeros(masks[0].shape[0] * masks[0].shape[1], dtype=bool)
    for b in masks:
        owned[b.flat.cpu().numpy()] = True
    return bits, np.count_nonzero(owned) != sum(len(b.values) for b in masks)


def _wrong(b: SparseB) -> int:
    rows, cols = b.rows.cpu().numpy(), b.cols.cpu().numpy()
    if not len(rows):
        return 0
    d_out, rank = b.shape
    wrong = _ROW * bool(rows.min() < 0 or rows.max() >= d_out) + _COLUMN * bool(cols.min() < 0 or cols.max() >= rank)
    ascending = rows[1:] > rows[:-1]
    ascending |= (rows[1:] == rows[:-1]) & (cols[1:] > cols[:-1])
    exponent = _EXPONENTS[b.values.dtype]
    bits = b.values.detach().cpu().view(torch.int32 if b.values.dtype == torch.float32 else torch.int16).numpy()
    return wrong + _ORDER * (not ascending.all()) + _VALUE * bool(((bits & exponent) == exponent).any())
