"""Kernels that add an adapter's delta to a layer's output, any weights of any tasks mixed in one batch.

A small interface (`Part`, `Rows`, `Operand`) with three kernels behind it: `reference` says what is meant, `torch`
needs nothing but torch, `native` is one compiled call a layer. `triton_kernel` is a fourth, for GPUs; it is imported by
who needs it, as it takes Triton and wants to know its layers beforehand. No engine is known here.
"""

from loraf_serve.kernels.choose import KERNELS, fastest, prepare
from loraf_serve.kernels.cpu_library import why_not_native
from loraf_serve.kernels.operand import Operand, Part, Rows

__all__ = ["KERNELS", "Operand", "Part", "Rows", "fastest", "prepare", "why_not_native"]
