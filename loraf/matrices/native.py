"""The optional compiled library of loraf/matrices/csrc: the same results as NumPy, several times as fast.

It is an ordinary shared library next to this file, `_native*.so`, called through ctypes, which releases the GIL.
Everything works without it; `why_not` explains why it is not used. LORAF_NATIVE=0 in the environment disables it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

INTERFACE = 1  # of loraf/matrices/csrc/version.cpp
SWITCH = "LORAF_NATIVE"
VARIANTS = ("plain", "AVX2", "AVX-512")
BFLOAT16, FLOAT16 = 1, 2  # dtypes that A is rounded to, and of a mask's values; 0 is float32
_LARGEST = 1 << 31  # rows, or columns, of a matrix whose masks can be checked


class Unusable(Exception):
    """The reason why a library cannot be used."""


class Mask(ctypes.Structure):
    """One task's mask and values in one module: addresses of contiguous arrays of `count` entries."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("value_kind", ctypes.c_int64),
    ]


class NativeLibrary:
    """The functions of a compiled library.

    Args:
        path: the shared library.
        variant: index of the best of VARIANTS that may be used. The processor may support less.

    Attributes:
        variant: the one of VARIANTS that is used.

    Raises:
        Unusable: the library cannot be loaded here, or was built from other sources.
    """

    def __init__(self, path: Path, variant: int = len(VARIANTS) - 1):
        self.path = path
        self._variant = variant
        if sys.byteorder != "little":
            raise Unusable("the processor is big-endian")
        try:
            loaded = ctypes.CDLL(str(path))
            interface = loaded.loraf_native_interface()
            self.variant = VARIANTS[min(variant, loaded.loraf_native_isa())]
            self._projection, self._check_masks = loaded.loraf_projection, loaded.loraf_check_masks
        except (OSError, AttributeError) as error:
            raise Unusable(f"{path.name} cannot be loaded ({error})") from None
        if interface != INTERFACE:
            raise Unusable(f"{path.name} was built from other sources (interface {interface}, not {INTERFACE})")
        address, word, integer, large = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_int64
        self._projection.argtypes = [
            address,
            ctypes.c_float,
            word,
            word,
            *[large] * 4,
            address,
            address,
            *[integer] * 2,
        ]
        self._projection.restype = None
        masks = ctypes.POINTER(Mask)
        self._check_masks.argtypes = [masks, large, integer, integer, word, word, address, address, integer]
        self._check_masks.restype = integer

    def projection(
        self,
        table: np.ndarray,
        scale: np.float32,
        key: tuple[int, int],
        rows: tuple[int, int],
        columns: tuple[int, int],
        out32: int | None,
        out16: int | None = None,
        kind: int = 0,
    ) -> None:
        """Computes a part of A, see `loraf.matrices.projection`.

        Args:
            table: the 65,536 quantiles.
            scale: the standard deviation.
            key: see `projection.module_key`.
            rows, columns: first and last + 1.
            out32: address for (rows, columns) float32, or None.
            out16: address for the same numbers rounded to `kind`, or None.
            kind: BFLOAT16 or FLOAT16; 0 if `out16` is None.
        """
        self._projection(table.ctypes.data, scale, *key, *rows, *columns, out32, out16, kind, self._variant)

    def check_masks(
        self, masks: Sequence[Mask], index_bytes: tuple[int, int], shape: tuple[int, int]
    ) -> tuple[list[int], bool]:
        """Checks several tasks' masks of one matrix.

        Args:
            index_bytes: size of a row index and of a column index: 1, 2 or 4.
            shape: of the matrix, see `can_check`.

        Returns:
            For each mask the sum of 1 (a row lies outside), 2 (a column lies outside), 4 (not unique and sorted) and
            8 (a value is not finite), where 4 is meaningful only without 1 and 2; and whether two masks share a
            position, which is meaningful only if nothing else is wrong.
        """
        owned = np.empty(shape[0] * shape[1], dtype=np.uint8) if len(masks) > 1 else None
        faults = np.zeros(len(masks), dtype=np.uint32)
        address = None if owned is None else owned.ctypes.data
        array = (Mask * len(masks))(*masks)
        overlap = self._check_masks(array, len(masks), *index_bytes, *shape, address, faults.ctypes.data, self._variant)
        return faults.tolist(), bool(overlap)


def can_check(shape: tuple[int, int]) -> bool:
    """Whether `NativeLibrary.check_masks` can number the positions of a matrix of this shape in 32 bits."""
    return 0 < shape[0] <= _LARGEST and 0 < shape[1] <= _LARGEST and shape[0] * shape[1] <= 1 << 32


def library() -> NativeLibrary | None:
    """Returns the library, or None if NumPy must be used."""
    return _load()[0]


def why_not() -> str | None:
    """Returns the reason why the library is not used, or None if it is."""
    return _load()[1]


@cache
def _load() -> tuple[NativeLibrary | None, str | None]:
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0 disables it"
    files = sorted(Path(__file__).parent.glob("_native*.so"), key=lambda file: file.stat().st_mtime, reverse=True)
    reasons = []
    for file in files:
        try:
            return NativeLibrary(file), None
        except Unusable as error:
            reasons.append(str(error))
    return None, "; ".join(reasons) or "it was not built, because there was no compiler when loraf was installed"
