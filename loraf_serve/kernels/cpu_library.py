"""Loads the compiled library next to this file."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Imported before the library is opened, so that the library shares torch's OpenMP runtime and its threads.
import torch  # noqa: F401

PATH = Path(__file__).with_name("_cpu.so")
INTERFACE = 1  # of csrc/library.cpp and csrc/pack.cpp; a library with another version is rejected

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
class CpuLibrary:
    """The functions of csrc/. Calls release the GIL.

    Attributes:
        variants: name → number of each variant that this processor can run, from the slowest to the fastest.
        lacking: the variants that it cannot run.
    """

    variants: dict[str, int]
    lacking: tuple[str, ...]
    measure: Callable[..., int]
    pack: Callable[..., None]
    add_delta: Callable[..., int]


class NotUsable(Exception):
    """The library is missing or cannot be used. The message says why."""


@functools.cache
def load(path: Path = PATH) -> CpuLibrary:
    """Opens a compiled library.

    Raises:
        NotUsable: it is missing, cannot be loaded, or was built from other sources.
    """
    if not path.exists():
        raise NotUsable(f"{path.name} was not built: install a C++ compiler, then reinstall loraf")
    try:
        library = ctypes.CDLL(str(path))
        interface = library.loraf_kernels_interface()
    except (OSError, AttributeError) as error:
        raise NotUsable(f"{path.name} could not be loaded: {error}") from error
    if interface != INTERFACE:
        raise NotUsable(f"{path.name} was built from other sources: reinstall loraf")
    functions = {}
    for name, (arguments, result) in _SIGNATURES.items():
        function = functions[name] = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    names = [functions["loraf_kernels_name"](i).decode() for i in range(functions["loraf_kernels_variants"]())]
    runs = [bool(functions["loraf_kernels_runs"](i)) for i in range(len(names))]
    return CpuLibrary(
        {name: i for i, name in enumerate(names) if runs[i]},
        tuple(name for i, name in enumerate(names) if not runs[i]),
        *(functions[f"loraf_kernels_{name}"] for name in ("measure", "pack", "add_delta")),
    )


def why_not_native() -> str | None:
    """Returns why the compiled kernel cannot be used on this machine, or None if it can."""
    try:
        load()
    except NotUsable as error:
        return str(error)
    return None
