"""The compiled library beside this file, or why it cannot be used."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

# Imported first on purpose: the library then shares the OpenMP runtime that torch brings, and with it its threads.
import torch  # noqa: F401

PATH = Path(__file__).with_name("_cpu.so")
INTERFACE = 1  # of csrc/library.cpp and csrc/pack.cpp; a library built from other sources is not called

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "loraf_kernels_variants": ([], _INT),
    "loraf_kernels_name": ([_INT], ctypes.c_char_p),
    "loraf_kernels_runs": ([_INT], _INT),
    "loraf_kernels_measure": ([_POINTER, _POINTER], _LONG),
    "loraf_kernels_pack": ([_POINTER, _POINTER, _POINTER], None),
    "loraf_kernels_add_delta": ([_INT, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG], _INT),
}


@dataclass(frozen=True)
class Library:
    """The functions of csrc/, called without Python's lock.

    Attributes:
        variants: name → number, of those that this processor runs, from the slowest to the fastest.
        lacking: the variants that it does not run.
    """

    variants: dict[str, int]
    lacking: tuple[str, ...]
    measure: ctypes._CFuncPtr
    pack: ctypes._CFuncPtr
    add_delta: ctypes._CFuncPtr


class NotUsable(Exception):
    """The library is not there or not the right one; the text says which."""


@functools.cache
def load(path: Path = PATH) -> Library:
    """Opens a built library.

    Raises:
        NotUsable: with the reason.
    """
    if not path.exists():
        raise NotUsable(f"{path.name} was not built: install again with a C++ compiler at hand")
    try:
        opened = ctypes.CDLL(str(path))
        interface = opened.loraf_kernels_interface()
    except (OSError, AttributeError) as error:
        raise NotUsable(f"{path.name} cannot be loaded: {error}") from error
    if interface != INTERFACE:
        raise NotUsable(f"{path.name} was built from other sources: install again")
    functions = {}
    for name, (arguments, result) in _SIGNATURES.items():
        function = functions[name] = getattr(opened, name)
        function.argtypes, function.restype = arguments, result
    names = [functions["loraf_kernels_name"](i).decode() for i in range(functions["loraf_kernels_variants"]())]
    runs = [bool(functions["loraf_kernels_runs"](i)) for i in range(len(names))]
    return Library(
        {name: i for i, name in enumerate(names) if runs[i]},
        tuple(name for i, name in enumerate(names) if not runs[i]),
        *(functions[f"loraf_kernels_{name}"] for name in ("measure", "pack", "add_delta")),
    )


def why_not_native() -> str | None:
    """Why the compiled kernel cannot be used here, or None."""
    try:
        load()
    except NotUsable as error:
        return str(error)
    return None
