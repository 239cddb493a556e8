"""Kernels by name, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loraf_serve.kernels.cpu_kernel import NativeOperand
from loraf_serve.kernels.cpu_library import why_not_native
from loraf_serve.kernels.operand import Operand, Part
from loraf_serve.kernels.reference import ReferenceOperand
from loraf_serve.kernels.torch_kernel import TorchOperand

KERNELS: Mapping[str, Callable[[Sequence[Part]], Operand]] = {
    "reference": ReferenceOperand,
    "torch": TorchOperand,
    "native": NativeOperand,
}


def fastest() -> str:
    """Returns the name of the kernel that `auto` selects on this machine."""
    return "torch" if why_not_native() else "native"


def prepare(parts: Sequence[Part], kernel: str = "auto") -> Operand:
    """Packs the parts of one layer for a kernel. Releases the GIL for the heavy work; thread-safe.

    Raises:
        ValueError: the parts do not fit together, or the kernel is unknown or cannot run on this machine.
    """
    name = fastest() if kernel == "auto" else kernel
    if name not in KERNELS:
        raise ValueError(f"there is no kernel {name!r}; choose from: auto, {', '.join(KERNELS)}")
    return KERNELS[name](parts)
