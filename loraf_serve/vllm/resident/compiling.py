"""Keeps torch.compile on. On the CPU vLLM switches it off if LoRA is configured, because its own LoRA products cannot
be compiled there. The resident delta is one opaque operator and can.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEEP = "LORAF_KEEP_COMPILE"  # set for the processes of a resident engine


def keep_compile() -> None:
    """Hides the LoRA configuration from the CPU platform's configuration check, in this process, permanently."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    if not current_platform.is_cpu() or hasattr(platform.check_and_update_config, "stock"):
        return
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        if os.environ.get(KEEP) is None:
            stock(cls, vllm_config)
            return
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    check_and_update_config.stock = stock  # type: ignore[attr-defined]  # marks the function as ours
    platform.check_and_update_config = classmethod(check_and_update_config)
