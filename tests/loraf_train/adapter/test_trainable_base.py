"""Layers that share a weight, as targets, and the names by which PEFT finds layers."""

from __future__ import annotations

import pytest
import torch

from loraf.errors import ConfigError
from loraf_train.adapter.peft_targets import peft_targets
from loraf_train.adapter.trainable_base import find_targets, fused_experts, own_weights
from tests.loraf_train import exported


def without_weights(model_type: str, **settings):
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    values = {key: value for key, value in exported.SIZES.items() if key in known} | exported.NEEDS.get(model_type, {})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config_class(**values | settings))


def test_blocks_that_share_their_weights_are_refused_by_name():
    model = without_weights("zamba2")
    with pytest.raises(ConfigError) as caught:
        find_targets(model, ["q_proj", "in_proj", "gate_up_proj"], "tasks.yaml")
    messages = [str(problem) for problem in caught.value.problems]
    assert [problem.field for problem in caught.value.problems] == ["adapter.target_modules"] * 2
    assert "model.layers.1.shared_transformer.self_attn.q_proj" in messages[0]
    assert "model.layers.3.shared_transformer.self_attn.q_proj" in messages[0]
    assert "gate_up_proj" in messages[1]
    assert find_targets(model, ["in_proj"])


def test_a_head_that_is_tied_to_the_embedding_is_a_target():
    for model_type in ("llama", "bert-generation"):
        model = without_weights(model_type, tie_word_embeddings=True)
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        assert head.weight is model.get_input_embeddings().weight, model_type
        assert find_targets(model, [name.rpartition(".")[2]]) == {name: head}


def test_weights_changed_in_place_leave_the_embedding_alone(tmp_path):
    model = exported.load(exported.build("llama", tmp_path / "base", tie_word_embeddings=True))
    shared, before = model.lm_head.weight, exported.logits(model)
    values = shared.detach().clone()
    with own_weights(model, find_targets(model, ["lm_head", "q_proj"])):
        assert torch.equal(exported.logits(model), before)
        model.lm_head.weight.data += 1
        model.config.tie_word_embeddings = False  # as PEFT does
        assert torch.equal(model.model.embed_tokens.weight, values)
    assert model.lm_head.weight is shared is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(shared, values)


def test_peft_finds_layers_named_like_experts_by_their_weights():
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    weights = ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert peft_targets("llama", names) == (names, [])
    for model_type in ("glm4_moe", "qwen2_moe", "deepseek_v3", "minimax_m2"):
        assert peft_targets(model_type, names) == (names[1:2], weights)


def test_weights_in_fused_experts_are_counted():
    assert fused_experts(without_weights("llama")) == 0
    assert fused_experts(without_weights("qwen2_moe")) == 2 * 4 * (2 * 48 * 64 + 64 * 48)
    assert fused_experts(without_weights("gpt_neox")) == 0
