"""Tiny random models of any type, and both exports of a checkpoint for one compared with the formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.delta import delta_weight
from loraf.errors import ConfigError
from loraf_train.adapter.trainable_base import find_targets, shapes_of
from loraf_train.commands.export import export
from tests.standins import byte_tokenizer, random_values

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 41, 42]])
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.08, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "is_decoder": True, "num_layers": 2, "n_layer": 2,
    "n_embd": 64, "n_head": 4, "n_positions": 256, "d_model": 64, "ffn_dim": 96, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 2, "word_embed_proj_dim": 64,
}  # fmt: skip
_MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
_DELTA_NET = {
    "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _MLA | {"q_lora_rank": 32},
    "deepseek_v3": _MLA | {"q_lora_rank": 32},
    "deepseek_v32": _MLA | {"q_lora_rank": 32},
    "glm4_moe_lite": _MLA | {"q_lora_rank": 32},
    "glm_moe_dsa": _MLA | {"q_lora_rank": 32},
    "axk1": _MLA | {"q_lora_rank": 32},
    "axk2": _MLA | {"q_lora_rank": 32},
    "longcat_flash": _MLA | {"q_lora_rank": 32, "num_layers": 1, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48},
    "minicpm3": _MLA | {"q_lora_rank": 32},
    "youtu": _MLA | {"q_lora_rank": 32},
    "qwen3_next": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "olmoe": {"num_key_value_heads": 4},
    "flex_olmo": {"num_key_value_heads": 4},
    "phi3": {"original_max_position_embeddings": 256},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "afmoe": {"num_dense_layers": 1, "num_shared_experts": 1, "layer_types": ["sliding_attention", "full_attention"]},
    "dots1": {"layer_types": ["full_attention", "full_attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "mamba_d_state": 16,
               "n_mamba_heads": 4, "mamba_ngroups": 1, "adapter_rank": 4, "num_mem_blocks": 1},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
                         "mamba_n_groups": 1, "mamba_expand": 2, "shared_intermediate_size": 64},
    "falcon_h1": {"mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4,
                  "mamba_expand": 1},
}  # fmt: skip


def build(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, tokenizer=None, **settings: Any) -> Path:
    """Saves a random model with its tokenizer. Biases are random too; `settings` are of its config."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    values = {key: value for key, value in SIZES.items() if key in known} | NEEDS.get(model_type, {}) | settings
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**values), dtype=dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, 0.08)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    import transformers

    # Some kernels of experts take no float64.
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def trainable(model: torch.nn.Module) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Returns the shapes of the linear layers that can be trained, and last name → why not of the others."""
    endings = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    shapes, refused = {}, {}
    for ending in sorted(endings):
        try:
            shapes |= shapes_of(find_targets(model, [ending]))
        except ConfigError as error:
            refused[ending] = error.problems[0].message
    return shapes, refused


def by_formula(base: Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The base with ΔW of all tasks added, each module with a weight of its own."""
    model = load(base, dtype)
    for name in checkpoint.manifest.modules:
        module = model.get_submodule(name)
        delta = delta_weight(checkpoint, name, checkpoint.manifest.all_tasks(), dtype=dtype)
        module.weight = torch.nn.Parameter(module.weight.detach() + delta, False)
    return model


def loaders(base: Path, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[Path], torch.nn.Module]]:
    """How each export is loaded, by (name of the export and) program."""
    from peft import PeftModel

    def with_transformers(folder: Path) -> torch.nn.Module:
        model = load(base, dtype)
        model.load_adapter(str(folder))
        return model.eval()

    return {
        "merged": lambda folder: load(folder, dtype),
        "peft": lambda folder: PeftModel.from_pretrained(load(base, dtype), str(folder)).eval(),
        "peft, load_adapter": with_transformers,
    }


def compare(base: Path, scratch: Path) -> dict[str, Any]:
    """Exports a random checkpoint that adapts every layer that can be trained, and compares logits.

    Returns:
        `modules`, `refused` (last names), `effect`, and for each way to load an export either its error or, under
        `refusals`, why it is refused.
    """
    model = load(base)
    shapes, refused = trainable(model)
    found: dict[str, Any] = {"modules": sorted({name.rsplit(".", 1)[-1] for name in shapes}), "refused": refused}
    if not shapes:
        return found
    checkpoint = Checkpoint.create(scratch / "ckpt", describe(str(base), base), 4, shapes, 0)
    values = random_values(shapes, 4, ("a", "b"), 0.6, 0, 0.4)
    for i, task in enumerate(("a", "b")):
        checkpoint.add_task(task, values[task], alpha=6.0, sparsity=0.6, trained_with=("a",)[:i])
    expected = logits(by_formula(base, checkpoint))
    scale = expected.abs().max()
    found["effect"] = round(((expected - logits(model)).abs().max() / scale).item(), 4)
    found["errors"] = {}
    for name, load_it in loaders(base).items():
        form = name.split(",")[0]
        out = scratch / form
        if not out.exists():
            try:
                export(scratch / "ckpt", out, form, tasks="all")
            except ConfigError as error:
                found.setdefault("refusals", {})[form] = error.problems[0].message
                continue
        found["errors"][name] = float(f"{((logits(load_it(out)) - expected).abs().max() / scale).item():.1e}")
    return found
