"""A base model is checked without its weights: what fails when it is loaded, or answers wrongly, is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loraf.errors import ConfigError
from loraf_train.data.examples import EvaluationExample, Example
from loraf_train.data.task_data import EvaluationSet
from loraf_train.sequence.base_checks import BaseModelShape, base_model_shape, load_tokenizer
from loraf_train.sequence.model_fit import beyond_context, oversized
from loraf_train.settings.config import RunConfig
from tests.loraf_train import toys
from tests.loraf_train.adapter.test_probe import gemma3_with_vision, gpt2, llama, mamba, opt
from tests.standins import byte_tokenizer, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def mistakes(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        base_model_shape(folder, ("q_proj",), "tasks.yaml")
    return str(caught.value)


# --- models that are right ----------------------------------------------------------------------------------------


def mixtral() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=40, **sizes, **experts))


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (llama, "q_proj"),
        (lambda: llama(tie_word_embeddings=True), "q_proj"),
        (lambda: llama().to(torch.float16), "q_proj"),
        (mixtral, "q_proj"),  # stored expert by expert, loaded as one tensor
        (gemma3_with_vision, "q_proj"),
        (mamba, "in_proj"),
        (opt, "q_proj"),
        (gpt2, "lm_head"),
    ],
    ids=["llama", "tied", "float16", "mixtral", "gemma3", "mamba", "opt", "gpt2"],
)
def test_a_model_as_transformers_stores_it_has_no_mistake(tmp_path, make, target):
    made = make()
    made.save_pretrained(tmp_path)
    shape = base_model_shape(tmp_path, (target,))
    assert shape.modules and shape.vocabulary == 40
    assert shape.parameters == sum(p.numel() for p in made.parameters())


def test_a_config_may_leave_out_the_architecture_and_name_code_that_is_not_needed(folder):
    change_config(folder, architectures=..., auto_map={"AutoModelForCausalLM": "own.Model"})
    assert len(base_model_shape(folder, ("q_proj",)).modules) == 2
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "score.weight": torch.ones(2, 128)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert len(base_model_shape(folder, ("q_proj",)).modules) == 2


# --- models that are not ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 64}, r"has the shape \(128, 192\), but config.json gives it \(128, 64\) (and 5 more"),
        ({"num_hidden_layers": 1}, "a smaller model than the weights are: it leaves out model.layers.1."),
        ({"num_hidden_layers": 3}, "lacks weights of the model: model.layers.2."),
        ({"vocab_size": 321}, "has the shape (320, 128), but config.json gives it (321, 128)"),
        ({"pad_token_id": 320}, "config.json: pad_token_id: 320 is beyond the vocabulary of 320 tokens"),
        ({"model_type": "nothing-known"}, "config.json: transformers cannot build the model"),
        ({"hidden_size": "128"}, "config.json: transformers cannot build the model"),
        ({"num_attention_heads": 0}, "config.json: transformers cannot build the model"),
        ({"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "is_encoder_decoder: bart has an encoder"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: the weights are quantised (fp8)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    change_config(folder, **changes)
    if "flash_attention_2" in changes.values() and transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash attention is installed")
    assert message.replace("\\", "") in mistakes(folder)


def test_a_bias_that_the_config_switches_off_is_missed(tmp_path):
    llama(attention_bias=True).save_pretrained(tmp_path)
    change_config(tmp_path, attention_bias=False)
    assert "leaves out model.layers.0.self_attn.k_proj.bias" in mistakes(tmp_path)


def test_weights_in_eight_bits_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(192, 128, dtype=torch.int8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight is stored as F8_E4M3 (and 1 more)" in mistakes(folder)


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_a_models_own_code_is_never_run_whatever_anybody_answers(folder, part, monkeypatch):
    ran = folder / "RAN"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if part == "tokenizer":
        path = folder / "tokenizer_config.json"
        (folder / "tokenizer.json").unlink()
        named = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
        with pytest.raises(ConfigError, match="tokenizer"):
            load_tokenizer(folder)
    else:
        kind = {"config": "AutoConfig", "model": "AutoModelForCausalLM"}[part]
        other = {"config": "own-kind", "model": "vit"}[part]
        change_config(folder, model_type=other, auto_map={kind: "own.Own"})
        text = mistakes(folder)
        assert "config.json: auto_map: needs code that the model brings along" in text and "never run" in text
    assert not ran.exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "no object"])
def test_a_tokenizer_that_is_missing_or_damaged_is_refused(folder, damage):
    if damage == "missing":
        for file in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
            file.unlink()
    elif damage == "cut":
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:1000])
    else:
        (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"copy: the tokenizer .*tokenizer\.json"):
        load_tokenizer(folder)


# --- records and what the model can hold ----------------------------------------------------------------------------


@pytest.fixture
def shape(model):
    """A function that makes the shape of a model that was trained on 10 tokens at most and has 100 token ids."""
    found = base_model_shape(model, ("q_proj",))
    return lambda **sizes: dataclasses.replace(found, **{"context": 10, "positions": None, "vocabulary": 100} | sizes)


def held(
    config: RunConfig, model: BaseModelShape, train: list[int], prompt: list[int], metric: str = "exact_match"
) -> tuple[list[str], list[str]]:
    """(mistakes, warnings) of a task with one training example and one of evaluation."""
    examples = [EvaluationExample(Example([*prompt, 2], len(prompt)), "")]
    evaluation = {"asked": EvaluationSet("asked", examples, ())}
    data = {"one": dataclasses.replace(toys.data(1), train=[Example(train, 1)], evaluation=evaluation, metric=metric)}
    mistakes, warnings = oversized(config, model, byte_tokenizer(), data), beyond_context(config, model, data)
    return [str(p) for p in mistakes], [str(p) for p in warnings]


def test_ids_beyond_the_embedding_are_refused_in_training_and_in_evaluation(tmp_path, shape):
    config = toys.run_config(Path("model"), tmp_path / "ckpt", toys.task("one"))
    assert held(config, shape(), [5, 99], [99, 0]) == ([], [])
    trained, asked = held(config, shape(), [5, 100], [5, 103])[0]
    token = byte_tokenizer().convert_ids_to_tokens(103)
    assert "tasks[0].data.train: training example 1 has the token" in trained and "with id 100" in trained
    assert f"tasks[0].data.eval.asked: the prompt of example 1 has the token {token!r} with id 103" in asked


def test_learned_positions_are_a_limit_and_rotary_ones_are_advice(tmp_path, shape):
    config = toys.run_config(Path("model"), tmp_path / "ckpt", toys.task("one"))
    long = [5] * 11
    mistakes, warnings = held(config, shape(positions=10), long, long)
    assert len(mistakes) == 2 and warnings == []
    assert "training.max_length: training example 1 has 11 tokens, but the model has 10 positions" in mistakes[0]
    assert "data.eval.asked: the prompt of example 1 has 11 tokens" in mistakes[1]
    assert held(config, shape(positions=10), long[1:], long[1:]) == ([], [])
    assert len(held(config, shape(positions=10), [5], long[1:], "loss")[0]) == 1  # reads the answer as well
    mistakes, warnings = held(config, shape(), long, long)
    assert mistakes == [] and len(warnings) == 2 and "the model's context is 10" in warnings[0]
