"""Base models that vLLM computes wrongly are refused, and only as long as it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loraf.errors import ConfigError
from loraf_serve import choose_backend
from loraf_serve.vllm.engine import inexact
from loraf_serve.vllm.engine.support import can_serve

LATENT = {"model_type": "deepseek_v3", "kv_lora_rank": 512}
YARN = LATENT | {"rope_parameters": {"rope_type": "yarn", "factor": 40.0}}
UNTIED = {"model_type": "cohere2", "tie_word_embeddings": False}


def model(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "cpu", "reason"),
    [
        (UNTIED, True, "cohere2 models with an output head"),
        (UNTIED, False, "cohere2 models with an output head"),
        ({"model_type": "aya_vision", "text_config": UNTIED}, False, "cohere2 models with an output head"),
        ({"model_type": "cohere", "tie_word_embeddings": True}, True, None),
        ({"model_type": "cohere"}, True, None),  # transformers' default
        ({"model_type": "cohere2", "sliding_window": 16}, True, None),  # right within the window
        ({"model_type": "gemma2", "sliding_window": 16, "max_position_embeddings": 17}, False, None),
        ({"model_type": "llama", "tie_word_embeddings": False}, True, None),
        (LATENT, True, "deepseek_v3 models whose rotary"),
        (LATENT | {"rope_scaling": None}, True, "deepseek_v3 models whose rotary"),
        (LATENT | {"rope_parameters": {"rope_type": "default"}}, True, "deepseek_v3 models whose rotary"),
        ({"model_type": "kimi_vl", "text_config": LATENT}, True, "deepseek_v3 models whose rotary"),
        (LATENT, False, None),
        (YARN, True, None),
        (LATENT | {"rope_scaling": {"type": "yarn", "factor": 40}}, True, None),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, True, None),
    ],
)
def test_exactly_the_models_that_vllm_computes_wrongly_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict, cpu: bool, reason: str | None
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    found = inexact.why_inexact(model(tmp_path, **config))
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("option", ["auto", "resident", "slots"])
def test_auto_takes_merged_and_the_others_refuse(tmp_path: Path, option: str) -> None:
    folder = model(tmp_path, architectures=["Cohere2ForCausalLM"], **UNTIED)
    reason = can_serve(folder)
    assert reason is not None
    if option == "auto":
        choice = choose_backend.choose(option, folder, (), 8, print)
        assert choice.backend.name == "merged" and choice.reason == reason
        return
    with pytest.raises(ConfigError) as error:
        choose_backend.choose(option, folder, (), 8, print)
    (problem,) = error.value.problems
    assert reason in problem.message and "--backend merged" in (problem.remedy or "")


def test_vllm_still_drops_coheres_output_head() -> None:
    from vllm.model_executor.models import ModelRegistry

    for name in ("CohereForCausalLM", "Cohere2ForCausalLM"):
        mapper = ModelRegistry.models[name].load_model_cls().hf_to_vllm_mapper
        assert mapper.orig_to_new_prefix["lm_head"] is None, "vLLM has changed: take it out of inexact.py"


def test_vllms_rotary_kernel_for_cpus_still_takes_heads_for_one() -> None:
    """Compares the kernel with vLLM's own torch code."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the kernel is the CPU's")
    current_platform.import_kernels()
    rotary = {"rope_type": "default", "rope_theta": 10000.0}
    with set_current_vllm_config(VllmConfig()):
        embedding = get_rope(64, max_position=64, rope_parameters=rotary, is_neox_style=False, dtype=torch.float32)
    positions, generator = torch.arange(5), torch.Generator().manual_seed(0)
    query, key = (torch.randn(5, heads, 64, generator=generator) for heads in (4, 1))
    right, _ = embedding.forward_native(positions, query.clone(), key.clone())
    flat, _ = embedding.forward_cpu(positions, query.flatten(1).clone(), key.flatten(1).clone())
    torch.testing.assert_close(flat.view_as(right), right)
    by_heads, _ = embedding.forward_cpu(positions, query.clone(), key.clone())
    assert not torch.allclose(by_heads, right), "vLLM has changed: take the case out of inexact.py"
