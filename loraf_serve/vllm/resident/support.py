"""Whether resident workers can serve a model on this machine, checked without starting an engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from vllm.model_executor.models import ModelRegistry, supports_multimodal
from vllm.platforms import current_platform

from loraf_serve.vllm import relied_on


def obstacle(architectures: Sequence[str]) -> str | None:
    """Returns why they cannot, or None if they can.

    Args:
        architectures: of the model's config.
    """
    broken = relied_on.broken(relied_on.RESIDENT_FACTS)
    if broken:
        return "it does not support this release of vLLM. No longer true: " + "; ".join(broken)
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return f"its kernels run on CPUs and NVIDIA GPUs, not on {current_platform.device_name}"
    if current_platform.is_cuda() and importlib.util.find_spec("triton") is None:
        return "its GPU kernel needs Triton, which is not installed"
    architecture = next((name for name in architectures if name in ModelRegistry.models), None)
    if architecture is None:
        return f"vLLM has no model {' or '.join(architectures)} of its own"
    if supports_multimodal(ModelRegistry.models[architecture].load_model_cls()):
        return f"{architecture} is a multimodal model, and it serves text models only"
    return None
