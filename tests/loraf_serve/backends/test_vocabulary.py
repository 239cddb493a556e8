"""The model's vocabulary is read from config and weights, and end tokens beyond it are left out."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from loraf.errors import ConfigError
from loraf_serve.backends.fallback import Fallback
from loraf_serve.backends.vocabulary import ends_within, vocab_size
from tests.loraf_serve.fake_backend import FakeBackend


def model(folder, config: dict, **tensors: int):
    """A folder with a config and a file of weights; `tensors`: rows by name."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(rows, 2) for name, rows in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "tensors", "size"),
    [
        ({"vocab_size": 320}, {"model.embed_tokens.weight": 320}, 320),
        ({"vocab_size": 320}, {"model.embed_tokens.weight": 300}, 300),  # the embedding was made smaller
        ({"vocab_size": 300}, {"model.embed_tokens.weight": 320}, 300),  # padded
        ({"text_config": {"vocab_size": 99}}, {}, 99),
        ({"vocab_size": 50, "text_config": None}, {"transformer.wte.weight": 48}, 48),
        ({}, {"model.language_model.embed_tokens.weight": 77}, 77),
        ({}, {"model.embed_tokens.weight": 5, "model.vision_tower.embed_tokens.weight": 3}, 5),
        ({"vocab_size": 60}, {"model.embed_tokens.weight": 5, "model.other.embed_tokens.weight": 3}, 60),
        ({"vocab_size": "many"}, {"lm_head.weight": 3, "model.embed_tokens_per_layer.weight": 4}, None),
    ],
)
def test_the_vocabulary_is_what_both_config_and_embedding_can_hold(tmp_path, config, tensors, size):
    assert vocab_size(model(tmp_path, config, **tensors)) == size


def test_without_readable_weights_the_config_counts(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 12}')
    assert vocab_size(tmp_path) == 12
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert vocab_size(tmp_path) == 12


@pytest.mark.parametrize("text", ["{", "[]", '{"text_config": 3}'])
def test_a_malformed_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        vocab_size(tmp_path)


@pytest.mark.parametrize(
    ("ends", "valid", "warned"),
    [
        (None, set(), ""),
        (2, {2}, ""),
        ([2, 15], {2, 15}, ""),
        (16, set(), "16"),
        ([2, 16, 400, -1], {2}, "16, 400, -1"),
        (["</s>", 3], {3}, "'</s>'"),
        ("</s>", set(), "'</s>'"),
    ],
)
def test_end_tokens_beyond_the_vocabulary_are_left_out_with_a_warning(caplog, ends, valid, warned):
    with caplog.at_level(logging.WARNING):
        assert ends_within(16, ends, "generation_config.json") == valid
    text = f"generation_config.json: end tokens beyond the model's vocabulary of 16 are ignored: {warned}"
    assert [record.getMessage() for record in caplog.records] == ([text] if warned else [])


def test_a_fallback_has_the_vocabulary_of_its_current_backend():
    backend = FakeBackend()
    backend.vocab_size, backend.end_tokens = 16, frozenset({2})
    fallback = Fallback(backend, {}, print, lambda adapter: adapter)
    assert fallback.vocab_size == 16 and fallback.end_tokens == {2}


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "main", "more"),
    [([2, 16, 400], 2, 2, set()), ([2, 3], 16, None, {2, 3}), (None, 15, 15, set()), (16, None, None, set())],
)
def test_the_merged_backend_ends_answers_only_at_tokens_that_the_model_has(configured, of_tokenizer, main, more):
    from loraf_serve.backends.merged import _ends

    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert _ends(model, of_tokenizer, 16) == (main, more)
