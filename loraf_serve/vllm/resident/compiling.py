"""Keeps torch.compile on: vLLM switches it off on the CPU as soon as LoRA is configured.

It does so because its own LoRA products cannot be compiled there. The resident delta is one opaque operator.
"""

from __future__ import annotations

import os

KEEP = "LORAF_KEEP_COMPILE"  # set for the processes of a resident engine


def keep_compile() -> None:
    """Hides the LoRA configuration from the CPU platform's look at the configuration, in this process, for good."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not current_platform.is_cpu() or hasattr(platform.check_and_update_config, "stock"):
        return
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config) -> None:
        if os.environ.get(KEEP) is None:
            return stock(cls, vllm_config)
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    check_and_update_config.stock = stock
    platform.check_and_update_config = classmethod(check_and_update_config)
