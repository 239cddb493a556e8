"""Kernels by name, and the choice among them."""

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
    """The kernel that `auto` means on this machine."""
    return "torch" if why_not_native() else "native"


def prepare(parts: Sequence[Part], kernel: str = "auto") -> Operand:
    """Packs the parts of one layer for a kernel. Heavy work is done without Python's lock; any thread may call.

    Raises:
        ValueError: parts that do not fit together, an unknown kernel, or one that this machine cannot run.
    """
    name = fastest() if kernel == "auto" else kernel
    if name not in KERNELS:
        raise ValueError(f"no kernel {name!r}; there are auto, {', '.join(KERNELS)}")
    return KERNELS[name](parts)
