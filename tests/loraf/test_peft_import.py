"""Reading PEFT LoRA directories gives what PEFT computes from them, or an error that names the obstacle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from loraf import peft_import
from loraf.errors import ConfigError, Problem
from loraf.peft_import import CONFIG, WEIGHTS, read_peft
from tests import standins
from tests.loraf_train import foreign_loras


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return standins.make_model("qwen2", tmp_path_factory.mktemp("model"))


def edit(folder: Path, **changes) -> None:
    """Changes fields of adapter_config.json. `...` removes one."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, foreign_loras.PATTERNS], ids=["plain", "rs", "patterns"])
def test_factors_give_the_delta_that_peft_computes(model, tmp_path, config):
    foreign_loras.make(tmp_path, model, **config)
    found = read_peft(tmp_path)
    expected = foreign_loras.deltas(tmp_path, model)
    assert found.modules.keys() == expected.keys() and len(expected) >= 4
    for name, factors in found.modules.items():
        torch.testing.assert_close(factors.scale * factors.b @ factors.a, expected[name], rtol=1e-5, atol=1e-6)
        assert factors.shape == tuple(expected[name].shape)
    assert len({factors.scale for factors in found.modules.values()}) == (5 if config is foreign_loras.PATTERNS else 1)
    assert found.base_model == str(model) and found.file.bytes == (tmp_path / WEIGHTS).stat().st_size


def test_patterns_match_the_weight_s_name_where_a_layer_is_named_by_its_weight(model, tmp_path):
    config = {
        "target_modules": ["q_proj"],
        "target_parameters": ["layers.0.mlp.up_proj.weight", "down_proj.weight"],
        "rank_pattern": {"down_proj.weight": 3, "up_proj": 7},
        "alpha_pattern": {"up_proj": 5, "layers.1.mlp.down_proj.weight": 9, "q_proj.weight": 6},
    }
    foreign_loras.make(tmp_path, model, **config)
    found = read_peft(tmp_path).modules
    expected = foreign_loras.deltas(tmp_path, model)
    assert found.keys() == expected.keys()
    for name, factors in found.items():
        delta = factors.scale * factors.b @ factors.a
        torch.testing.assert_close(delta, expected[name].view_as(delta), rtol=1e-5, atol=1e-6)


def test_missing_config_fields_have_peft_s_defaults(model, tmp_path):
    foreign_loras.make(tmp_path, model, r=8, lora_alpha=8)
    edit(tmp_path, r=..., lora_alpha=..., use_rslora=..., rank_pattern=None, alpha_pattern=..., some_new_field=False)
    assert {factors.scale for factors in read_peft(tmp_path).modules.values()} == {1.0}


REFUSED = [
    ({"peft_type": "LOHA"}, "peft_type: is 'LOHA'"),
    ({"task_type": "SEQ_CLS"}, "task_type: is 'SEQ_CLS'"),
    ({"use_dora": True}, "use_dora: DoRA scales"),
    ({"bias": "lora_only"}, "bias: is 'lora_only'"),
    ({"lora_bias": True}, "lora_bias: B has a bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: whole modules"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices: rows of the embedding"),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters: it adapts parameters"),
    ({"layer_replication": [[0, 2]]}, "layer_replication: layers"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: it is active only after"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"a_new_trick": {"on": 1}}, "a_new_trick: changes how the adapter works"),
    ({"r": 0}, "r: 0 is not a valid rank"),
    ({"r": "4"}, "r: is '4', not an integer"),
    ({"r": 5}, "the config says rank 5"),
    ({"lora_alpha": 0}, "lora_alpha: is 0 everywhere"),
    ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is not a valid pattern"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_unsupported_peft_features_are_refused_by_name(model, tmp_path, changes, message):
    foreign_loras.make(tmp_path, model)
    read_peft(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError) as refused:
        read_peft(tmp_path)
    assert message in str(refused.value)
    assert all(problem.remedy and problem.file for problem in refused.value.problems)


def test_all_problems_are_reported_at_once(model, tmp_path):
    foreign_loras.make(tmp_path, model)
    edit(tmp_path, use_dora=True, bias="all", modules_to_save=["score"])
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ConfigError) as refused:
        read_peft(tmp_path)
    said = str(refused.value)
    assert len(refused.value.problems) == 4
    assert all(text in said for text in ("use_dora", "bias", "modules_to_save", "is not a safetensors file"))


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str
)
def test_other_tensors_are_refused_whatever_the_config_says(model, tmp_path, settings):
    """The adapters are written by PEFT."""
    foreign_loras.make(tmp_path, model, **settings)
    edit(tmp_path, use_dora=False, lora_bias=False)
    with pytest.raises(ConfigError, match="holds tensors other than lora_A and lora_B of linear layers"):
        read_peft(tmp_path)


TENSORS = [
    (lambda tensors, a: tensors.pop(a), "has lora_B only"),
    (lambda tensors, a: tensors.update({a: tensors[a].double()}), "lora_A is torch.float64"),
    (lambda tensors, a: tensors.update({a: tensors[a].reshape(-1)}), "the config says rank 4"),
    (lambda tensors, a: tensors[a].view(-1)[3:4].fill_(float("nan")), "lora_A has a value that is not finite"),
    (lambda tensors, a: tensors.clear(), "holds no adapted layer"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[message for _, message in TENSORS])
def test_damaged_tensors_are_refused(model, tmp_path, change, message):
    foreign_loras.make(tmp_path, model)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    rewrite(tmp_path, lambda tensors: change(tensors, name))
    with pytest.raises(ConfigError, match=message):
        read_peft(tmp_path)


def test_pickled_weights_are_never_read(model, tmp_path):
    foreign_loras.make(tmp_path, model)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="pickled files are never read → load the adapter with PEFT and save it"):
        read_peft(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    (tmp_path / CONFIG).write_text("{]")
    with pytest.raises(ConfigError) as refused:
        read_peft(tmp_path)
    assert "is not JSON" in str(refused.value) and "cannot be read" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank_pattern": {r"(\w|\w\w|\.)*[!?]": 4}}, "rank_pattern: matching its keys"),
        ({"alpha_pattern": {r"(\w|\w\w|\.)*[!?]": 4}}, "alpha_pattern: matching its keys"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is not a valid pattern"),
        ({"rank_pattern": {"a)(b": 4}}, "rank_pattern: 'a)(b' is not a valid pattern"),
        ({"rank_pattern": {"(?i)q": 4}}, "rank_pattern: '(?i)q' is not a valid pattern"),
        ({"rank_pattern": {"(" * 500 + ")" * 500: 4}}, "is not a valid pattern"),
        ({"rank_pattern": {"a{99999999999999999999}": 4}}, "is not a valid pattern"),
        ({"r": 2**100}, "is not a valid rank"),
        ({"lora_alpha": 1e300}, "lora_alpha: 1e+300 is out of range"),
        ({"alpha_pattern": {"q_proj": -1e300}}, "alpha_pattern.q_proj: -1e+300 is out of range"),
    ],
)
def test_patterns_and_numbers_that_would_take_for_ever_are_refused(model, tmp_path, monkeypatch, change, says):
    monkeypatch.setattr(peft_import, "_MATCHING_SECONDS", 0.01)
    foreign_loras.make(tmp_path, model)
    edit(tmp_path, **change)
    with pytest.raises(ConfigError) as caught:
        read_peft(tmp_path)
    assert says in str(caught.value)
    assert all(problem.file == str(tmp_path / CONFIG) for problem in caught.value.problems)


@pytest.mark.parametrize("key", [r"([a-z0-9._]+)+!", r"((.*)*)*!", "(x+x+)+y", r"(\w|\w\w|\.)*[!?]"])
def test_a_pattern_that_would_take_re_for_ever_takes_seconds(model, tmp_path, key):
    foreign_loras.make(tmp_path, model)
    edit(tmp_path, rank_pattern={key: 7})
    assert {factors.a.shape[0] for factors in read_peft(tmp_path).modules.values()} == {4}  # it matches no module


def test_no_weight_is_read_unless_the_shapes_fit(model, tmp_path):
    """A file of holes takes no space on the disk, but all of the memory."""
    header = {
        f"base_model.model.layers.{i}.q_proj.lora_{part}.weight": {
            "dtype": "F32",
            "shape": [4, 1 << 24] if part == "A" else [1 << 24, 4],
            "data_offsets": [(2 * i + "AB".index(part)) << 28, (2 * i + "AB".index(part) + 1) << 28],
        }
        for i in range(1000)
        for part in "AB"
    }
    text = json.dumps(header).encode()
    with open(tmp_path / WEIGHTS, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + (2000 << 28))  # half a terabyte
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    found = read_peft(tmp_path, lambda shapes: [Problem(f"{len(shapes)} modules do not fit")])
    assert [problem.message for problem in found.misfits] == ["1000 modules do not fit"] and not found.modules
