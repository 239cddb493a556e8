"""A model with a vision tower is trained on text: only its text part is adapted, and it is left as it was."""

from __future__ import annotations

import dataclasses

import torch

from loraf_train.data.examples import Example
from loraf_train.sequence import runner
from tests.loraf_train import toys
from tests.loraf_train.adapter.test_probe import gemma3_with_vision
from tests.standins import byte_tokenizer


def test_a_multimodal_model_is_trained_in_its_text_part_alone(tmp_path):
    folder = tmp_path / "base"
    torch.manual_seed(0)
    gemma3_with_vision().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    task = toys.task("one", training={"max_steps": 2, "batch_size": 2})
    config = toys.run_config(folder, tmp_path / "ckpt", task)
    model, tokenizer, _ = runner.load_model(config)
    tokenizer.pad_token_id = 60  # beyond the 40 rows of the embedding, which the shorter example is padded for
    examples = [Example([1, 5, 6, 7, 2], 2), Example([1, 8, 2], 1)]
    data = {"one": dataclasses.replace(toys.data(1), train=examples)}
    checkpoint = runner.run(config, data, loaded=(model, tokenizer, folder))
    modules = checkpoint.manifest.modules
    assert len(modules) == 2 * len(config.adapter.target_modules)
    assert all("language_model" in name for name in modules)
    assert sum(values.values.count_nonzero() for values in checkpoint.tasks["one"].values()) > 0
    assert "use_cache" not in model.config.to_dict() or model.config.to_dict()["use_cache"] is None
