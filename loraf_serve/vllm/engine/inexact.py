"""Base models that vLLM 0.32 computes wrongly, without any adapter. Its engine starts and reports nothing.

Found by `benchmarks/architectures.py` with tiny models in float32 on an x86 CPU. The errors are relative to the largest
logit. test_inexact.py fails when vLLM has mended one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# vLLM drops the lm_head of these model types and computes logits with the embedding, on every platform. Error: 1.4.
_EMBEDDING_IS_HEAD = ("cohere", "cohere2", "cohere2_moe")
# Has latent attention, but gives its rotary embeddings to the CPU's kernel in the layout that the kernel takes.
_ROTATES_RIGHTLY = ("minicpm3",)


def why_inexact(model_folder: Path) -> str | None:
    """Returns why vLLM's answers for a base model are not transformers' answers, or None if no reason is known."""
    from vllm.platforms import current_platform

    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    model_type = config.get("model_type")
    if model_type in _EMBEDDING_IS_HEAD and config.get("tie_word_embeddings") is False:
        return (
            f"vLLM 0.32 answers wrongly for {model_type} models with an output head of their own "
            "(tie_word_embeddings: false): it uses the embedding instead"
        )
    latent = config.get("kv_lora_rank") and model_type not in _ROTATES_RIGHTLY
    if current_platform.is_cpu() and latent and _rotary_type(config) == "default":
        # The kernel takes (tokens, heads * size) and is given (tokens, heads, size), which it reads as one head.
        # YaRN has no kernel: it is computed in torch. Error: 0.43 (DeepSeek V3).
        return (
            f"on a CPU vLLM 0.32 answers wrongly for {model_type} models whose rotary embeddings are not scaled "
            "(by YaRN): it does not rotate every head"
        )
    return None


def _rotary_type(config: dict[str, Any]) -> str:
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rotary.get("rope_type") or rotary.get("type") or "default"
