"""One task's B in one module, in coordinate form: its mask and its values at once.

Coordinates are unique and sorted by row, then column. A position that training left at zero is stored all the same:
the coordinates are the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INDEX_DTYPES = (torch.uint8, torch.uint16, torch.int32)
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        d_out, rank = self.shape
        if not self.rows.shape == self.cols.shape == self.values.shape or self.rows.ndim != 1:
            return "rows, cols and values are not three vectors of one length"
        if self.rows.dtype != index_dtype(d_out) or self.cols.dtype != index_dtype(rank):
            return "coordinates are not in the smallest index dtype"
        if self.values.dtype not in VALUE_DTYPES:
            return f"values are {self.values.dtype}, not one of {', '.join(map(str, VALUE_DTYPES))}"
        for what, indices, size in (("row", self.rows, d_out), ("column", self.cols, rank)):
            wide = indices.to(torch.int64)
            if not bool(((wide >= 0) & (wide < size)).all()):
                return f"a {what} lies outside the matrix"
        flat = self.flat
        if not bool((flat[1:] > flat[:-1]).all()):
            return "coordinates are not unique and sorted by row, then column"
        if not bool(torch.isfinite(self.values).all()):
            return "a value is not finite"
        return None
