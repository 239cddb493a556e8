"""The model that was trained, merged weights when served, and both exports are the same model.

For the architectures and tokenizers that people use, with every linear layer as a target, a tied head included.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from loraf_serve.backends.merged_weights import BASE, MergedWeights, key_of
from loraf_train.commands.export import export
from loraf_train.sequence import preflight, runner
from tests.loraf_train import exported
from tests.loraf_train.small_tokenizers import sentencepiece_tokenizer, wordpiece_tokenizer
from tests.standins import byte_tokenizer

TOKENIZERS = {"metaspace": sentencepiece_tokenizer, "bytes": byte_tokenizer, "wordpiece": wordpiece_tokenizer}
TIED = {"tie_word_embeddings": True}
# name → (model type, settings of its config, tokenizer, targets)
CASES = {
    "llama": ("llama", {}, "metaspace", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"),
    "llama-tied": ("llama", TIED, "bytes", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"),
    "qwen2": ("qwen2", {}, "bytes", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "qwen3": ("qwen3", TIED, "bytes", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"),
    "gemma2": ("gemma2", {}, "metaspace", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"),
    "gemma3": ("gemma3_text", {}, "metaspace", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "phi3": ("phi3", {}, "metaspace", "qkv_proj o_proj gate_up_proj down_proj"),
    "gpt_neox": ("gpt_neox", {}, "bytes", "query_key_value dense dense_h_to_4h dense_4h_to_h lm_head"),
    "opt": ("opt", {}, "wordpiece", "q_proj k_proj v_proj out_proj fc1 fc2 lm_head"),
    "mixtral": ("mixtral", {}, "wordpiece", "q_proj k_proj v_proj o_proj"),
    "deepseek_v3": (
        "deepseek_v3",
        {},
        "wordpiece",
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj",
    ),
}
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9}
FILE = """
model: base
output: ckpt
precision: float32
adapter: {{rank: 4, sparsity: 0.5, target_modules: [{targets}]}}
calibration: {{steps: 1}}
training: {{learning_rate: 5e-2, batch_size: 2, max_steps: 2, dropout: 0}}
tasks:
  - {{name: first, alpha: 6, data: {{train: a.jsonl}}}}
  - {{name: second, alpha: 11, data: {{train: a.jsonl}}}}
"""
ROWS = [{"prompt": "two and two?", "completion": " four"}, {"prompt": "the sky?", "completion": " blue"}]


class LastModel(runner.Observer):
    """Keeps the logits of the last task's model, with the layers that were trained in it."""

    def trained(self, task, model):
        self.logits = exported.logits(model)


@pytest.mark.parametrize("name", CASES)
def test_what_was_trained_is_what_is_served_and_exported(name, tmp_path):
    model_type, settings, tokenizer, targets = CASES[name]
    base = exported.build(model_type, tmp_path / "base", tokenizer=TOKENIZERS[tokenizer](), vocab_size=400, **settings)
    (tmp_path / "tasks.yaml").write_text(FILE.format(targets=targets.replace(" ", ", ")))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prepared = preflight.prepare(tmp_path / "tasks.yaml")
    for dtype, limit in LIMITS.items():
        errors = disagreements(prepared, base, tmp_path / str(dtype), dtype)
        assert all(error <= limit for error in errors.values()), (dtype, errors)
    merged = tmp_path / "torch.float32/merged"
    if "lm_head" in targets:  # other programs go by what the config says
        assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    text = "two and two? Blue sky"
    assert AutoTokenizer.from_pretrained(merged)(text)["input_ids"] == prepared.tokenizer(text)["input_ids"]


def disagreements(prepared, base: Path, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Trains two tasks. Returns how far each other form of the model is from it, as a part of the largest logit."""
    model, seen = exported.load(base, dtype).requires_grad_(False), LastModel()
    of_base = exported.logits(model)
    config = prepared.config.model_copy(update={"output": folder / "ckpt"})
    checkpoint = runner.run(config, prepared.data, seen, (model, prepared.tokenizer, base))
    assert torch.equal(exported.logits(model), of_base), "training must leave the base as it was"
    scale = seen.logits.abs().max()
    assert (seen.logits - of_base).abs().max() > 0.01 * scale, "the tasks change too little for this to mean anything"

    weights = MergedWeights(model)
    weights.add("digest", checkpoint)
    weights.use(key_of("digest", checkpoint.manifest.all_tasks()))
    found = {"served": exported.logits(model)}
    weights.use(BASE)
    assert torch.equal(exported.logits(model), of_base)

    for form in ("merged", "peft"):
        export(checkpoint.path, folder / form, form, tasks="all", dtype=str(dtype).removeprefix("torch."))
    found["merged"] = exported.logits(exported.load(folder / "merged", dtype))
    found["peft"] = exported.logits(PeftModel.from_pretrained(model, str(folder / "peft")).eval())
    return {form: ((logits - seen.logits).abs().max() / scale).item() for form, logits in found.items()}
