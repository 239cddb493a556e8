"""Can vLLM serve a model with LoRA on this machine, and how? Answered without starting an engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from loraf_serve.vllm.engine.environment import quiet


def can_serve(model_folder: Path) -> str | None:
    """Why vLLM cannot serve a model with LoRA; None if it can.

    Imports vLLM (seconds), reads the model's config, starts nothing.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    quiet()
    try:
        from vllm.model_executor.models import ModelRegistry, supports_lora
    except ImportError as error:  # an installation for another processor, or one that misses a library
        return f"vLLM cannot be imported ({error})"
    from loraf_serve.vllm import relied_on

    broken = relied_on.broken()
    if broken:
        return "this release of vLLM is not the one that loraf was made for: " + "; ".join(broken)
    architectures = json.loads((Path(model_folder) / "config.json").read_text()).get("architectures") or []
    known = [name for name in architectures if name in ModelRegistry.models]
    if not known:
        return f"vLLM has no model {' or '.join(architectures) or 'without a named architecture'}"
    if not supports_lora(ModelRegistry.models[known[0]].load_model_cls()):
        return f"vLLM has no LoRA for {known[0]}"
    return None


def can_serve_resident(model_folder: Path) -> str | None:
    """Why the resident backend cannot serve a model that `can_serve`; None if it can."""
    from vllm.model_executor.models import ModelRegistry, supports_multimodal
    from vllm.platforms import current_platform

    from loraf_serve.vllm import relied_on

    broken = relied_on.broken(relied_on.resident_facts)
    if broken:
        return "this release of vLLM is not the one that it was made for: " + "; ".join(broken)
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return f"its kernels are for CPUs and NVIDIA GPUs, this is {current_platform.device_name}"
    if current_platform.is_cuda() and importlib.util.find_spec("triton") is None:
        return "its kernel for GPUs needs Triton, which is not installed"
    architectures = json.loads((Path(model_folder) / "config.json").read_text()).get("architectures") or []
    (known, *_) = [name for name in architectures if name in ModelRegistry.models]
    if supports_multimodal(ModelRegistry.models[known].load_model_cls()):
        return f"{known} takes more than text"
    return None


def not_by_default() -> str | None:
    """Why `auto` leaves out the resident backend where it could serve; None if it does not."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    return "on a GPU it has been run too little to be taken unasked (--backend resident takes it)"
