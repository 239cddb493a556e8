"""Loading the base model for training: complete, frozen, in the configured precision."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraf.errors import ConfigError
from loraf_train.sequence import runner
from tests.loraf_train import toys
from tests.standins import make_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("mistral", tmp_path_factory.mktemp("mistral"))


def test_the_model_is_frozen_and_float32_on_a_cpu_or_bfloat16_if_configured(model_folder, tmp_path, capfd):
    config = toys.run_config(model_folder, tmp_path / "ckpt", toys.task("one"))
    for precision, dtype in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        if precision == "auto" and torch.cuda.is_available():
            continue
        model, tokenizer, folder = runner.load_model(config.model_copy(update={"precision": precision}))
        assert {p.dtype for p in model.parameters()} == {dtype} and not any(p.requires_grad for p in model.parameters())
        assert tokenizer("a")["input_ids"] and folder == model_folder and not model.training
    assert capfd.readouterr() == ("", "")


def test_a_model_with_missing_weights_is_refused(model_folder, tmp_path):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = toys.run_config(broken, tmp_path / "ckpt", toys.task("one"))
    missing = r"lacks weights of the model: model.layers.1.self_attn.q_proj.weight .* complete"
    with pytest.raises(ConfigError, match=missing):
        runner.load_model(config)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="broken: has no model.safetensors"):
        runner.load_model(config)
