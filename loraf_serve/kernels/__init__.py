"""Kernels that add an adapter's delta to a layer's output, with any mixture of task weights in one batch.

Three kernels share a small interface (`Part`, `BatchWeights`, `Operand`): `reference` defines the result, `torch` needs
only torch, `native` is one compiled call per layer. The fourth, `triton_kernel`, is for GPUs. Import it explicitly: it
needs Triton, and its layers are declared before any adapter is loaded. This room knows no engine.
"""

from loraf_serve.kernels.choose import KERNELS, fastest, prepare
from loraf_serve.kernels.cpu_library import why_not_native
from loraf_serve.kernels.operand import BatchWeights, Operand, Part

__all__ = ["KERNELS", "BatchWeights", "Operand", "Part", "fastest", "prepare", "why_not_native"]
