"""A model is tried out without weights: which linear layers it calls, and which it computes with by itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from loraf.errors import ConfigError
from loraf_train.adapter import model_limits, probe
from loraf_train.adapter.layer import LorafLinear
from loraf_train.adapter.trainable_base import attached, find_targets

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(**config) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | config))


def mamba() -> transformers.PreTrainedModel:
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


def gemma3_with_vision() -> transformers.PreTrainedModel:
    text = SMALL | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 36, "boi_token_index": 37, "eoi_token_index": 38}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


class HeadByHand(transformers.LlamaForCausalLM):
    """Asks its layers' weights for a dtype, and computes with one of them itself."""

    def forward(self, *args, **kwargs):
        assert self.model.layers[0].mlp.up_proj.weight.dtype == self.dtype
        nn.functional.linear(torch.zeros(16, dtype=self.dtype), self.model.layers[1].mlp.gate_proj.weight)
        return super().forward(*args, **kwargs)


def test_every_projection_of_a_plain_model_is_called_and_no_weight_read():
    used = probe.uses(llama())
    assert used is not None
    assert {f"model.layers.*.{part}" for part in ("self_attn.q_proj", "mlp.down_proj")} <= used.called
    assert used.weight_read == frozenset()
    assert list(find_targets(llama(), PROJECTIONS)) == [
        name for name, module in llama().named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def test_a_model_is_tried_once_whatever_its_dtype(monkeypatch):
    first = probe.uses(llama())
    monkeypatch.setattr(probe, "_try_out", lambda *_: pytest.fail("tried again"))
    assert probe.uses(llama().to(torch.bfloat16)) is first


def test_weights_that_the_model_computes_with_itself_cannot_be_targets():
    """`dt_proj` is multiplied by hand everywhere; the other two are handed to a fused kernel where there is one."""
    with pytest.raises(ConfigError) as caught:
        find_targets(mamba(), ("in_proj", "x_proj", "dt_proj", "out_proj"), "tasks.yaml")
    text = str(caught.value)
    for ending in ("x_proj", "dt_proj", "out_proj"):
        assert f"weight of backbone.layers.0.mixer.{ending} itself" in text and f"leave out '{ending}'" in text
    assert "in_proj itself" not in text
    assert len(find_targets(mamba(), ("in_proj",))) == 2


def test_asking_for_a_dtype_is_no_use_but_computing_is():
    model = HeadByHand(transformers.LlamaConfig(**SMALL))
    assert len(find_targets(model, ("up_proj",))) == 2
    with pytest.raises(ConfigError, match=r"computes with the weight of model.layers.0.mlp.gate_proj itself"):
        find_targets(model, ("up_proj", "gate_proj"))


def test_the_vision_tower_is_no_target():
    model = gemma3_with_vision()
    targets = find_targets(model, PROJECTIONS)
    assert len(targets) == 2 * len(PROJECTIONS) and all("language_model" in name for name in targets)
    assert any("vision" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    with pytest.raises(
        ConfigError, match=r"does not call model.vision_tower.*fc1 when it reads text → leave out 'fc1'"
    ):
        find_targets(model, ("q_proj", "fc1"))


def test_an_adapters_weight_has_a_dtype_and_cannot_be_computed_with():
    model = HeadByHand(transformers.LlamaConfig(**SMALL))

    def layer(name: str) -> dict[str, LorafLinear]:
        linear = model.get_submodule(name)
        return {name: LorafLinear(linear, torch.ones(2, linear.in_features), torch.arange(3), 1.0)}

    ids = torch.ones((1, 3), dtype=torch.long)
    with attached(model, layer("model.layers.0.mlp.up_proj")):
        adapted = model.model.layers[0].mlp.up_proj
        assert (adapted.in_features, adapted.out_features, adapted.bias) == (16, 24, None)
        assert adapted.weight.shape == (24, 16) and adapted.weight.device == model.device
        model(input_ids=ids)
    with (
        attached(model, layer("model.layers.1.mlp.gate_proj")),
        pytest.raises(ConfigError, match="leaves out the adapter"),
    ):
        model(input_ids=ids)


# --- what a model can hold ---------------------------------------------------------------------------------------


def gpt2() -> transformers.PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_positions=24, **sizes))


def opt() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OPTConfig(vocab_size=40, max_position_embeddings=24, word_embed_proj_dim=16, **sizes)
    return transformers.OPTForCausalLM(config)


def gptj() -> transformers.PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=40, n_positions=24, **sizes))


@pytest.mark.parametrize("make", [gpt2, opt, gptj])
def test_a_table_of_positions_ends_where_the_model_fails(make):
    model = make().eval()
    limit = model_limits.positions(model)
    assert limit == 24 and model_limits.vocabulary(model) == 40
    with torch.no_grad():
        model(input_ids=torch.ones((1, limit), dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones((1, limit + 1), dtype=torch.long))


def test_rotary_positions_have_no_end():
    model = llama().eval()
    assert (model_limits.positions(model), model_limits.context(model)) == (None, 32)
    model(input_ids=torch.ones((1, 40), dtype=torch.long))


@pytest.mark.parametrize(("pad", "eos", "chosen"), [(0, 2, 0), (40, 2, 2), (None, 2, 2), (99, None, 0), (-1, 50, 0)])
def test_padding_uses_an_id_that_the_embedding_has(pad, eos, chosen):
    class Tokenizer:
        pad_token_id, eos_token_id = pad, eos

    assert model_limits.padding_id(Tokenizer(), 40) == chosen
