"""Whether vLLM can serve a model with LoRA on this machine, checked without starting an engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from loraf.errors import one_line
from loraf_serve.vllm.engine import inexact, quantised
from loraf_serve.vllm.engine.environment import quiet


def can_serve(model_folder: Path) -> str | None:
    """Returns why vLLM cannot serve a model with LoRA, or None if it can.

    Imports vLLM, which takes seconds, and reads the model's config.

    Raises:
        ConfigError: no backend can serve it: its weights are quantised in a way that fails in vLLM.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    quiet()
    try:
        from vllm.model_executor.models import ModelRegistry, supports_lora
    except ImportError as error:  # built for another processor, or without one of its libraries
        return f"vLLM could not be imported ({error})"
    from loraf_serve.vllm import relied_on

    broken = relied_on.broken()
    if broken:
        return "loraf does not support this release of vLLM. No longer true: " + "; ".join(broken)
    architectures = _architectures(model_folder)
    known = [name for name in architectures if name in ModelRegistry.models]
    if not architectures:
        return "the model's config.json names no architecture"
    if not known:
        return f"vLLM has no model {' or '.join(architectures)}"
    try:
        model_class = ModelRegistry.models[known[0]].load_model_cls()
    except ImportError as error:  # many models need packages that vLLM does not
        return f"vLLM's {known[0]} cannot be imported ({one_line(error)})"
    if not supports_lora(model_class):
        return f"vLLM does not support LoRA for {known[0]}"
    quantised.require_supported(Path(model_folder))
    return inexact.why_inexact(Path(model_folder))


def can_serve_resident(model_folder: Path) -> str | None:
    """Returns why the resident backend cannot serve a model for which `can_serve` returned None, or None if it can."""
    from loraf_serve.vllm.resident import support

    return support.obstacle(_architectures(model_folder))


def _architectures(model_folder: Path) -> list[str]:
    return json.loads((Path(model_folder) / "config.json").read_text()).get("architectures") or []


def not_by_default() -> str | None:
    """Returns why `auto` skips the resident backend although it could serve, or None if it does not skip it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    return "on a GPU it is still too little tested to be the default (select it with --backend resident)"
